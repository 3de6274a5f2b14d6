"""Flow matching: t in [0, 1], t=0 is data and t=1 is noise, x_t = (1-t) x0 + t eps, and the network learns v = eps - x0."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Latents = Float[Array, "B h w c"]


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Timestep sampling and condition dropout in training.

    Attributes:
      logit_mean: mean of the logit-normal timestep (Esser et al. 2024, section 3.1).
      logit_std: its standard deviation.
      shift: moves timesteps towards noise; 0 derives it from the number of latent cells as sqrt(cells / base_cells) (Esser
        et al. 2024, equation 23), so that a larger picture is noised as strongly to the eye as a small one.
      base_cells: number of latent cells at which the derived shift is 1.
      condition_dropout: share of samples whose condition becomes the null token.
      timesteps_per_sample: (t, noise) pairs drawn for each encoded sample. More than one spreads the cost of the frozen
        encoder and autoencoder over several training samples of the DiT.
      loss_bins: number of equal t-bins the loss is logged in.
    """

    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 0.0
    base_cells: int = 256
    condition_dropout: float = 0.1
    timesteps_per_sample: int = 1
    loss_bins: int = 4

    def __post_init__(self):
        if self.logit_std <= 0:
            raise ValueError(f"flow.logit_std must be positive, got {self.logit_std}.")
        if self.shift < 0 or self.base_cells < 1:
            raise ValueError(f"flow.shift must be >= 0 and base_cells >= 1, got {self.shift} and {self.base_cells}.")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"flow.condition_dropout is a share in [0, 1), got {self.condition_dropout}.")
        if self.timesteps_per_sample < 1 or self.loss_bins < 1:
            raise ValueError("flow.timesteps_per_sample and flow.loss_bins must be at least 1.")

    def shift_for(self, cells: int) -> float:
        """The shift used for a picture of `cells` latent cells."""
        return self.shift or math.sqrt(cells / self.base_cells)


def shift_timesteps(t: Float[Array, "*T"], shift: float | Float[Array, ""]) -> Float[Array, "*T"]:
    """Maps t to shift * t / (1 + (shift - 1) t); 0 and 1 stay where they are."""
    return shift * t / (1 + (shift - 1) * t)


def sample_timesteps(key: Key[Array, ""], count: int, config: FlowConfig, cells: int) -> Float[Array, " count"]:
    """Draws logit-normal times, shifted for the picture's size, in float32."""
    normal = jax.random.normal(key, (count,), jnp.float32)
    return shift_timesteps(jax.nn.sigmoid(config.logit_mean + config.logit_std * normal), config.shift_for(cells))


def interpolate(x0: Latents, noise: Latents, t: Float[Array, " B"]) -> Latents:
    """Returns x_t = (1-t) x0 + t noise."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * noise


def flow_matching_loss(
    velocity: Callable[[Latents, Float[Array, " B"]], Latents], x0: Latents, noise: Latents, t: Float[Array, " B"]
) -> Float[Array, " B"]:
    """Mean squared error between the predicted velocity and noise - x0, per sample, in float32.

    Samples are weighted equally: a sample's loss never depends on which others share its batch.
    """
    predicted = velocity(interpolate(x0, noise, t), t)
    return jnp.mean(jnp.square(predicted - (noise - x0)), axis=(1, 2, 3))


def loss_by_bin(
    loss: Float[Array, " B"], t: Float[Array, " B"], bins: int
) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
    """Returns sums and counts of the per-sample loss over equal bins of t."""
    index = jnp.clip((t * bins).astype(jnp.int32), 0, bins - 1)
    member = jax.nn.one_hot(index, bins, dtype=jnp.float32)
    return loss @ member, member.sum(axis=0)
