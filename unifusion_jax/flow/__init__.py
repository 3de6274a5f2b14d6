"""Flow matching: loss, timestep sampling, solvers, guidance."""

from unifusion_jax.flow.matching import FlowConfig as FlowConfig
from unifusion_jax.flow.matching import flow_matching_loss as flow_matching_loss
from unifusion_jax.flow.matching import interpolate as interpolate
from unifusion_jax.flow.matching import loss_by_bin as loss_by_bin
from unifusion_jax.flow.matching import sample_timesteps as sample_timesteps
from unifusion_jax.flow.matching import shift_timesteps as shift_timesteps
from unifusion_jax.flow.sampling import SamplingConfig as SamplingConfig
from unifusion_jax.flow.sampling import guided as guided
from unifusion_jax.flow.sampling import integrate as integrate
from unifusion_jax.flow.sampling import is_first as is_first
from unifusion_jax.flow.sampling import timesteps as timesteps
