"""What an autoencoder is trained on: faithful pixels, faithful edges, and latents that stay near a unit Gaussian."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from unifusion_jax.autoencoders.kl import AutoencoderKL


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of `autoencoder_loss`.

    Squared error leads: from scratch it finds the large areas and their colours sooner than absolute error does.

    Attributes:
      l1: mean absolute pixel error.
      l2: mean squared pixel error.
      gradient: mean absolute error of horizontal and vertical pixel differences, averaged over scales; keeps edges
        sharp without a perceptual network.
      gradient_scales: number of scales, each half the resolution of the one before.
      kl: divergence of the posterior from a unit Gaussian, mean over the elements of z. Keeps z bounded and smooth.
    """

    l1: float = 0.1
    l2: float = 4.0
    gradient: float = 0.1
    gradient_scales: int = 3
    kl: float = 1e-4

    def __post_init__(self):
        if min(self.l1, self.l2, self.gradient, self.kl) < 0 or self.gradient_scales < 1:
            raise ValueError(f"Loss weights must not be negative and gradient_scales at least 1, got {self}.")


def autoencoder_loss(
    module: AutoencoderKL, images: Float[Array, "B h w 3"], key: PRNGKeyArray, weights: LossWeights | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the training loss of a batch of float images in [-1, 1], and its parts.

    One sample of the posterior is decoded. Metrics: loss, l1, l2, gradient, kl, psnr_db (decibels, of images in
    [-1, 1]), latent_mean and latent_std (of z, before normalisation).
    """
    weights = weights or LossWeights()
    moments = module.encode_moments(images)
    error = module.decode_z(moments.sample(key)) - images
    l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
    gradient = _gradient_error(error, weights.gradient_scales)
    kl = 0.5 * jnp.mean(jnp.square(moments.mean) + jnp.exp(moments.logvar) - 1.0 - moments.logvar)
    loss = weights.l1 * l1 + weights.l2 * l2 + weights.gradient * gradient + weights.kl * kl
    metrics = {
        "loss": loss,
        "l1": l1,
        "l2": l2,
        "gradient": gradient,
        "kl": kl,
        "psnr_db": 10.0 * jnp.log10(4.0 / jnp.maximum(l2, 1e-12)),
        "latent_mean": jnp.mean(moments.mean),
        "latent_std": jnp.std(moments.mean),
    }
    return loss, jax.lax.stop_gradient(metrics)


def _gradient_error(error: Float[Array, "B h w c"], scales: int) -> Float[Array, ""]:
    """Mean absolute pixel difference of the error image, averaged over scales. Differences are linear, so those of the
    error are the error of the differences."""
    total = jnp.zeros((), error.dtype)
    for _ in range(scales):
        rows, columns = jnp.diff(error, axis=1), jnp.diff(error, axis=2)
        total += 0.5 * (jnp.mean(jnp.abs(rows)) + jnp.mean(jnp.abs(columns)))
        height, width = error.shape[1] // 2 * 2, error.shape[2] // 2 * 2
        error = error[:, :height, :width].reshape(len(error), height // 2, 2, width // 2, 2, -1).mean((2, 4))
    return total / scales
