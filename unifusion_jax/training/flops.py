"""Model FLOPs: what the mathematics of a training step needs, counted in one place for MFU and planning.

A multiply-add counts as two. Attention counts the full S x S square, since the DiT is bidirectional. The backward pass counts
as twice the forward; recomputation (remat) and the frozen networks are not model FLOPs of the trained stack and are left out.
"""

from unifusion_jax.data.mixture import Mixture
from unifusion_jax.model import ModelConfig


def block_flops(tokens: int, width: int, ffn_size: int, *, context: int | None = None) -> float:
    """Forward FLOPs of one transformer block over `tokens` tokens that attend to `context` tokens each."""
    projections = 2 * tokens * (4 * width * width + 3 * width * ffn_size)
    return projections + 4 * tokens * (context or tokens) * width


def condition_flops(model: ModelConfig, tokens: int) -> float:
    """Forward FLOPs of LAP, projection and refiner for `tokens` condition tokens."""
    conditioning, width = model.conditioning, model.dit.hidden_size
    lap = conditioning.lap(model.num_layers, model.encoder_size)
    refiner = conditioning.refiner(model.encoder_size, width)
    sequences = model.num_layers if conditioning.refiner_position == "before_lap" else 1
    return (
        lap.num_blocks * block_flops(tokens * lap.num_layers, lap.encoder_size, lap.ffn_size, context=lap.num_layers)
        + 2 * tokens * lap.num_layers * lap.encoder_size
        + 2 * tokens * lap.encoder_size * width
        + refiner.num_blocks * sequences * block_flops(tokens, refiner.hidden_size, refiner.ffn_size)
    )


def dit_flops(model: ModelConfig, condition_tokens: int, latent_tokens: int) -> float:
    """Forward FLOPs of the DiT for one sample."""
    dit = model.dit
    blocks = dit.num_layers * block_flops(condition_tokens + latent_tokens, dit.hidden_size, dit.ffn_size)
    patches = 4 * latent_tokens * dit.latent_channels * dit.patch_size**2 * dit.hidden_size
    modulation = 2 * dit.hidden_size * (dit.time_features + 9 * dit.hidden_size)
    return blocks + patches + modulation


def training_flops(model: ModelConfig, mixture: Mixture, downsample: int, timesteps_per_sample: int) -> float:
    """Forward and backward FLOPs of one training sample, averaged over the mixture's streams."""
    total = 0.0
    for stream in mixture.streams:
        bucket = stream.bucket
        cells = (bucket.height_px // downsample) * (bucket.width_px // downsample)
        latent_tokens = cells // model.dit.patch_size**2
        forward = condition_flops(model, bucket.max_kept_tokens)
        forward += timesteps_per_sample * dit_flops(model, bucket.max_kept_tokens, latent_tokens)
        total += stream.weight * 3 * forward
    return total
