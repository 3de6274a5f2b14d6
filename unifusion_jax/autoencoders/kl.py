"""The AutoencoderKL network (Rombach et al. 2022, arXiv:2112.10752) over NHWC images.

Attributes are named as in diffusers, so that a parameter's path is its name there. Letters: B batch, h and w height and
width (pixels for images, cells for latents), c channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from unifusion_jax.autoencoders.blocks import (
    Makers,
    MidBlock,
    Numbered,
    Resample,
    ResnetBlock,
    SpatialAttention,
    initial_moments,
)
from unifusion_jax.autoencoders.config import ATTENTION_DOWN, ATTENTION_UP, AutoencoderKLConfig
from unifusion_jax.autoencoders.latents import LatentModule, Moments


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention where asked, then a change of resolution if any."""

    def __init__(self, widths: tuple[int, int], depth: int, make: Makers, *, attend: bool, resample: str | None):
        in_channels, out_channels = widths
        self.resnets = Numbered(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, make) for i in range(depth)
        )
        self.attentions = Numbered(SpatialAttention(out_channels, make) for _ in range(depth)) if attend else None
        if resample is not None:
            setattr(self, resample, Numbered([Resample(out_channels, make, up=resample == "upsamplers")]))
        self.resample = resample

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Runs the level; the resolution changes at its end."""
        attentions = iter(self.attentions) if self.attentions is not None else None
        for resnet in self.resnets:
            x = resnet(x)
            x = next(attentions)(x) if attentions is not None else x
        for module in getattr(self, self.resample) if self.resample is not None else ():
            x = module(x)
        return x


class Encoder(nnx.Module):
    """Images to the mean and log-variance of z, side by side in the channels."""

    def __init__(self, config: AutoencoderKLConfig, make: Makers):
        widths = config.block_out_channels
        self.conv_in = make.conv(config.in_channels, widths[0], 3)
        self.down_blocks = Numbered(
            Level(
                (widths[max(i - 1, 0)], widths[i]),
                config.layers_per_block,
                make,
                attend=kind == ATTENTION_DOWN,
                resample="downsamplers" if i < len(widths) - 1 else None,
            )
            for i, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidBlock(widths[-1], make, attend=config.mid_block_add_attention)
        self.conv_norm_out = make.norm(widths[-1])
        last = nnx.initializers.zeros_init() if config.use_quant_conv else initial_moments
        self.conv_out = make.conv(widths[-1], 2 * config.z_channels, 3, bias_init=last)

    def __call__(self, images: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns moments [B, h / 2**(levels - 1), w / 2**(levels - 1), 2 * z_channels]."""
        x = self.conv_in(images)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """z to images."""

    def __init__(self, config: AutoencoderKLConfig, make: Makers):
        widths = config.decoder_widths[::-1]
        self.conv_in = make.conv(config.z_channels, widths[0], 3)
        self.mid_block = MidBlock(widths[0], make, attend=config.mid_block_add_attention)
        self.up_blocks = Numbered(
            Level(
                (widths[max(i - 1, 0)], widths[i]),
                config.layers_per_block + 1,
                make,
                attend=kind == ATTENTION_UP,
                resample="upsamplers" if i < len(widths) - 1 else None,
            )
            for i, kind in enumerate(config.up_block_types)
        )
        self.conv_norm_out = make.norm(widths[-1])
        self.conv_out = make.conv(widths[-1], config.out_channels, 3)

    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns images [B, h * 2**(levels - 1), w * 2**(levels - 1), out_channels]."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class RunningStatistics(nnx.Module):
    """FLUX.2's stored mean and variance of the packed latents: a batch norm that is never trained."""

    def __init__(self, channels: int):
        self.running_mean = nnx.BatchStat(jnp.zeros((channels,)))
        self.running_var = nnx.BatchStat(jnp.ones((channels,)))


class AutoencoderKL(LatentModule):
    """Encoder, decoder and 1x1 convolutions around z, as `config` says; for FLUX.2 with stored latent statistics."""

    config: AutoencoderKLConfig

    def __init__(
        self, config: AutoencoderKLConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        self.dtype = dtype
        make = Makers(dtype, param_dtype, rngs, groups=config.norm_num_groups)
        channels = config.z_channels
        self.encoder = Encoder(config, make)
        self.decoder = Decoder(config, make)
        quant_conv = functools.partial(make.conv, 2 * channels, 2 * channels, 1, bias_init=initial_moments)
        self.quant_conv = quant_conv() if config.use_quant_conv else None
        self.post_quant_conv = make.conv(channels, channels, 1) if config.use_post_quant_conv else None
        self.bn = RunningStatistics(config.latent_channels) if config.batch_norm_eps else None

    def encode_moments(self, images: Float[Array, "B h w c"]) -> Moments:
        """Returns the posterior of z, before normalisation and packing; float32."""
        moments = self.encoder(images.astype(self.dtype))
        return Moments.split(moments if self.quant_conv is None else self.quant_conv(moments))

    def encode_z(self, images: Float[Array, "B h w 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B h2 w2 c"]:
        """Returns float32 z: the posterior's mean, or a sample of it when a key is given."""
        moments = self.encode_moments(images)
        return moments.mean if key is None else moments.sample(key)

    def decode_z(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns float32 images, not clipped, from z as it is before normalisation and packing."""
        z = z.astype(self.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)

    def _statistics(self) -> tuple[Float[Array, "#c"], Float[Array, "#c"]]:
        config = self.config
        if self.bn is None or config.batch_norm_eps is None:
            return super()._statistics()
        variance = self.bn.running_var[...].astype(jnp.float32) + config.batch_norm_eps
        return self.bn.running_mean[...].astype(jnp.float32), jnp.sqrt(variance)
