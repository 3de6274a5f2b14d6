"""The latent diffusion transformer."""

from unifusion_jax.dit.transformer import DiT as DiT
from unifusion_jax.dit.transformer import DiTConfig as DiTConfig
