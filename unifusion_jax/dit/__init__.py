"""The latent diffusion transformer."""

from unifusion_jax.dit.condition import Condition as Condition
from unifusion_jax.dit.transformer import DiT as DiT
from unifusion_jax.dit.transformer import DiTConfig as DiTConfig
