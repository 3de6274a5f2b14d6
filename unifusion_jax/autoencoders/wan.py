"""The Wan and Qwen-Image autoencoders (arXiv:2503.20314, arXiv:2508.02324) on still images: a 2-D network.

Parameters are named as in `blocks.py`; `names.py` maps them to diffusers' files. Letters as there.
"""

import itertools
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
    initial_moments,
)
from unifusion_jax.autoencoders.latents import LatentModule, Moments, pack_cells, unpack_cells
from unifusion_jax.autoencoders.wan_config import AutoencoderKLWanConfig


def patchify(images: Float[Array, "B h w c"], side: int) -> Float[Array, "B h2 w2 c2"]:
    """Folds squares of pixels into channels, ordered (channel, column, row), unlike the packing of latents."""
    return pack_cells(images.swapaxes(1, 2), side).swapaxes(1, 2)


def unpatchify(patches: Float[Array, "B h w c"], side: int) -> Float[Array, "B h2 w2 c2"]:
    """The inverse of `patchify`."""
    return unpack_cells(patches.swapaxes(1, 2), side).swapaxes(1, 2)


def averaged(x: Float[Array, "B h w c"], out_channels: int, *, side: int, frames: int) -> Float[Array, "B h2 w2 c2"]:
    """The shortcut of a residual encoder level: `side` x `side` cells and `frames` frames averaged by groups of channels.

    A still image is the last of its frames and the others are zeros, which count in the average.
    """
    packed = pack_cells(x, side)
    cells = packed.reshape(*packed.shape[:3], x.shape[-1], 1, side**2)
    cells = jnp.pad(cells, [(0, 0)] * 4 + [(frames - 1, 0), (0, 0)])
    return cells.reshape(*packed.shape[:3], out_channels, -1).mean(axis=-1)


def repeated(x: Float[Array, "B h w c"], out_channels: int, *, frames: int) -> Float[Array, "B h2 w2 c2"]:
    """The shortcut of a residual decoder level: channels repeated into 2 x 2 cells and `frames` frames, the last is kept."""
    repeats = out_channels * frames * 4 // x.shape[-1]
    cells = jnp.repeat(x, repeats, axis=-1).reshape(*x.shape[:3], out_channels, frames, 4)
    return unpack_cells(cells[..., -1, :].reshape(*x.shape[:3], out_channels * 4), 2)


class ResidualDown(nnx.Module):
    """Encoder level of Wan 2.2 and Qwen-Image 2.1: residual blocks and a halving beside an averaged shortcut."""

    def __init__(self, widths: tuple[int, int], depth: int, make: Makers, *, frames: int, down: bool):
        before, after = widths
        self.resnets = Numbered(ResnetBlock(after if i else before, after, make) for i in range(depth))
        self.downsampler = Resample(after, make, up=False) if down else None
        self.out_channels, self.frames = after, frames

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Runs the level; the resolution changes at its end."""
        side = 1 if self.downsampler is None else 2
        shortcut = averaged(x, self.out_channels, side=side, frames=self.frames)
        for resnet in self.resnets:
            x = resnet(x)
        return shortcut + (x if self.downsampler is None else self.downsampler(x))


class Encoder(nnx.Module):
    """Patches to the mean and log-variance of z, side by side in the channels."""

    def __init__(self, config: AutoencoderKLWanConfig, make: Makers):
        widths = config.encoder_widths
        self.conv_in = make.conv(config.in_channels, widths[0], 3)
        blocks: list[nnx.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            down = index < len(widths) - 2
            if config.is_residual:
                frames = config.frames(index) if down else 1
                blocks.append(ResidualDown((before, after), config.num_res_blocks, make, frames=frames, down=down))
                continue
            for block in range(config.num_res_blocks):
                blocks.append(ResnetBlock(after if block else before, after, make))
            if down:
                blocks.append(Resample(after, make, up=False))
        self.down_blocks = Numbered(blocks)
        self.mid_block = MidBlock(widths[-1], make, attend=True)
        self.norm_out = make.norm(widths[-1])
        self.conv_out = make.conv(widths[-1], 2 * config.z_channels, 3)

    def __call__(self, patches: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns moments [B, h / 2**(levels - 1), w / 2**(levels - 1), 2 * z_channels]."""
        x = self.conv_in(patches)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid_block(x))))


class Up(nnx.Module):
    """Decoder level: residual blocks, then a doubling; with `frames`, beside a repeated shortcut (Wan 2.2)."""

    def __init__(
        self, widths: tuple[int, int], depth: int, make: Makers, *, resampled: int | None, frames: int | None = None
    ):
        before, after = widths
        self.resnets = Numbered(ResnetBlock(after if i else before, after, make) for i in range(depth))
        self.resampled, self.frames = resampled, frames
        if resampled is not None:
            upsampler = Resample(after, make, up=True, out_channels=resampled)
            if frames is None:
                self.upsamplers = Numbered([upsampler])
            else:
                self.upsampler = upsampler

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Runs the level; the resolution changes at its end."""
        start = x
        for resnet in self.resnets:
            x = resnet(x)
        if self.resampled is None:
            return x
        if self.frames is None:
            (upsampler,) = self.upsamplers
            return upsampler(x)
        return self.upsampler(x) + repeated(start, self.resampled, frames=self.frames)


class Decoder(nnx.Module):
    """z to patches."""

    def __init__(self, config: AutoencoderKLWanConfig, make: Makers):
        widths = config.decoder_widths
        self.conv_in = make.conv(config.z_channels, widths[0], 3)
        self.mid_block = MidBlock(widths[0], make, attend=True)
        blocks = []
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            up = index < len(widths) - 2
            if config.is_residual:
                options = {"resampled": after if up else None, "frames": config.frames(-1 - index) if up else None}
            else:  # upsampling halves the width, so every level but the first starts from half
                before = before // 2 if index else before
                options = {"resampled": after // 2 if up else None}
            blocks.append(Up((before, after), config.num_res_blocks + 1, make, **options))
        self.up_blocks = Numbered(blocks)
        self.norm_out = make.norm(widths[-1])
        self.conv_out = make.conv(widths[-1], config.out_channels, 3)

    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns patches [B, h * 2**(levels - 1), w * 2**(levels - 1), out_channels]."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class AutoencoderKLWan(LatentModule):
    """Encoder, decoder and 1x1 convolutions around z, as `config` says. Decoded images are clipped to [-1, 1]."""

    def __init__(
        self,
        config: AutoencoderKLWanConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = dtype
        self.patch, self.has_alpha = config.patch_size or 1, config.has_alpha
        make = Makers(dtype, param_dtype, rngs, fused_qkv=True)
        channels = config.z_channels
        self.encoder = Encoder(config, make)
        self.quant_conv = make.conv(2 * channels, 2 * channels, 1, bias_init=initial_moments)
        self.post_quant_conv = make.conv(channels, channels, 1)
        self.decoder = Decoder(config, make)

    def encode_moments(self, images: Float[Array, "B h w 3"]) -> Moments:
        """Returns the posterior of z, before normalisation and packing; float32."""
        images = images.astype(self.dtype)
        if self.has_alpha:  # opaque
            images = jnp.concatenate([images, jnp.ones_like(images[..., :1])], axis=-1)
        return Moments.split(self.quant_conv(self.encoder(patchify(images, self.patch))))

    def encode_z(self, images: Float[Array, "B h w 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B h2 w2 c"]:
        """Returns float32 z: the posterior's mean, or a sample of it when a key is given."""
        moments = self.encode_moments(images)
        return moments.mean if key is None else moments.sample(key)

    def decode_z(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 3"]:
        """Returns float32 images, clipped to [-1, 1], from z as it is before normalisation and packing."""
        patches = self.decoder(self.post_quant_conv(z.astype(self.dtype)))
        return jnp.clip(unpatchify(patches, self.patch)[..., :3].astype(jnp.float32), -1.0, 1.0)
