"""The AutoencoderKL network (Rombach et al. 2022, arXiv:2112.10752) over NHWC images.

Attributes are named as in diffusers, so that a parameter's path is its name there. Letters: B batch, h and w height and
width (pixels for images, cells for latents), c channels.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from unifusion_jax import layers
from unifusion_jax.autoencoders.config import ATTENTION_DOWN, ATTENTION_UP, AutoencoderKLConfig
from unifusion_jax.parallel.attention import attention

_NORM_EPS = 1e-6
_LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution
# A new posterior is narrow (standard deviation 0.05). From unit noise a small network first learns to outshout it, which
# costs thousands of steps.
_INITIAL_LOGVAR = -6.0
# Self-attention holds rows x tokens scores at once: 2**22 float32 scores are 16 MiB per image.
_MAX_SCORES = 2**22


class Moments(NamedTuple):
    """Gaussian posterior of z: its mean and the logarithm of its variance, before normalisation and packing."""

    mean: Float[Array, "B h w c"]
    logvar: Float[Array, "B h w c"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "B h w c"]:
        """Draws z."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


def pack_cells(z: Float[Array, "B h w c"], side: int) -> Float[Array, "B h2 w2 c2"]:
    """Folds squares of side x side cells into channels, ordered (channel, row, column) as `torch.pixel_unshuffle`."""
    batch, height, width, channels = z.shape
    z = z.reshape(batch, height // side, side, width // side, side, channels)
    return z.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // side, width // side, channels * side**2)


def unpack_cells(latents: Float[Array, "B h w c"], side: int) -> Float[Array, "B h2 w2 c2"]:
    """The inverse of `pack_cells`."""
    batch, height, width, channels = latents.shape
    latents = latents.reshape(batch, height, width, channels // side**2, side, side)
    return latents.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * side, width * side, channels // side**2)


class Numbered(nnx.Module):
    """Submodules under the attributes "0", "1", ...: unlike `nnx.List`, every key of the parameter tree is a string."""

    def __init__(self, modules: Iterable[nnx.Module]):
        self.count = 0
        for module in modules:
            setattr(self, str(self.count), module)
            self.count += 1

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, str(index)) for index in range(self.count))


class GroupNorm(nnx.Module):
    """Group norm over NHWC images with exact float32 statistics.

    Sums run over whole channels first and are then joined by group. The usual reshape to (groups, channels per group)
    puts a short axis innermost, which makes the norm several times slower on CPUs.
    """

    def __init__(self, channels: int, groups: int, *, dtype: Any, param_dtype: Any):
        self.groups = groups
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype), axes=("norm",))

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Normalises each group of channels of each image."""
        wide = x.astype(jnp.float32)
        centred = wide - self._group_mean(wide)
        multiplier = jax.lax.rsqrt(self._group_mean(jnp.square(centred)) + _NORM_EPS) * self.scale[...]
        return (centred * multiplier + self.bias[...]).astype(self.dtype)

    def _group_mean(self, x: Float[Array, "B h w c"]) -> Float[Array, "B 1 1 c"]:
        """Mean over pixels and the channels of a group, repeated for each of these channels."""
        batch, _, _, channels = x.shape
        by_channel = x.mean(axis=1).mean(axis=1)
        by_group = by_channel.reshape(batch, self.groups, -1).mean(axis=-1)
        return jnp.repeat(by_group, channels // self.groups, axis=1)[:, None, None]


class _Makers:
    """The layer constructors with this network's groups and dtypes filled in."""

    def __init__(self, config: AutoencoderKLConfig, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = functools.partial(layers.conv, **options)
        self.linear = functools.partial(layers.linear, **options, bias=True)
        self.norm = functools.partial(GroupNorm, groups=config.norm_num_groups, dtype=dtype, param_dtype=param_dtype)


def _initial_moments(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32, out_sharding: Any = None
) -> Array:
    """Bias of the layer that makes the moments: mean 0, a small variance."""
    half = shape[0] // 2
    return jnp.concatenate([jnp.zeros((half,), dtype), jnp.full((half,), _INITIAL_LOGVAR, dtype)])


class ResnetBlock(nnx.Module):
    """Two normalised convolutions and a shortcut, 1x1 where the width changes. A new block is its shortcut alone."""

    def __init__(self, in_channels: int, out_channels: int, make: _Makers):
        self.norm1 = make.norm(in_channels)
        self.conv1 = make.conv(in_channels, out_channels, 3)
        self.norm2 = make.norm(out_channels)
        self.conv2 = make.conv(out_channels, out_channels, 3, kernel_init=nnx.initializers.zeros_init())
        self.conv_shortcut = make.conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c2"]:
        """Maps in_channels to out_channels at the same resolution."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nnx.Module):
    """Single-head self-attention over all cells, with a residual connection."""

    def __init__(self, channels: int, make: _Makers):
        self.group_norm = make.norm(channels)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            make.linear(channels, channels, ("conv_in", "conv_out")) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Mixes the cells of each image."""
        batch, height, width, channels = x.shape
        tokens = self.group_norm(x).reshape(batch, height * width, 1, channels)
        query, key, value = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        rows = max(1, _MAX_SCORES // (height * width * width))
        if rows >= height:
            mixed = attention(query, key, value)
        else:  # 1024 px images have 16384 cells: score a few rows at a time instead of all pairs at once
            by_row = query.reshape(batch, height, width, 1, channels).swapaxes(0, 1)
            mixed = jax.lax.map(lambda row: attention(row, key, value), by_row, batch_size=rows).swapaxes(0, 1)
        return x + self.to_out(mixed.reshape(batch, height, width, channels))


class Resample(nnx.Module):
    """Halves or doubles the resolution; the convolution sits under the name `conv`."""

    def __init__(self, channels: int, make: _Makers, *, up: bool):
        self.up = up
        if up:
            self.conv = make.conv(channels, channels, 3)
        else:  # one row and column of zeros, at the bottom and the right only
            self.conv = make.conv(channels, channels, 3, stride_px=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c"]:
        """Returns half or twice the resolution."""
        if self.up:
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(x)


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention where asked, then a change of resolution if any."""

    def __init__(self, widths: tuple[int, int], depth: int, make: _Makers, *, attend: bool, resample: str | None):
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


class MidBlock(nnx.Module):
    """Residual block, attention (optional), residual block at the coarsest resolution."""

    def __init__(self, channels: int, make: _Makers, *, attend: bool):
        self.resnets = Numbered(ResnetBlock(channels, channels, make) for _ in range(2))
        self.attentions = Numbered([SpatialAttention(channels, make)]) if attend else None

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Keeps resolution and width."""
        first, second = self.resnets
        x = first(x)
        for attend in self.attentions if self.attentions is not None else ():
            x = attend(x)
        return second(x)


class Encoder(nnx.Module):
    """Images to the mean and log-variance of z, side by side in the channels."""

    def __init__(self, config: AutoencoderKLConfig, make: _Makers):
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
        last = nnx.initializers.zeros_init() if config.use_quant_conv else _initial_moments
        self.conv_out = make.conv(widths[-1], 2 * config.z_channels, 3, bias_init=last)

    def __call__(self, images: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns moments [B, h / 2**(levels - 1), w / 2**(levels - 1), 2 * z_channels]."""
        x = self.conv_in(images)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """z to images."""

    def __init__(self, config: AutoencoderKLConfig, make: _Makers):
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


class AutoencoderKL(nnx.Module):
    """Encoder, decoder, 1x1 convolutions around z and the normalisation of the latents, as `config` says.

    Images are float in [-1, 1]; latents are normalised and packed. `dtype` is the type of the activations; statistics
    of the norms and the softmax are float32 in any case.
    """

    def __init__(
        self, config: AutoencoderKLConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        self.dtype = dtype
        make = _Makers(config, dtype, param_dtype, rngs)
        channels = config.z_channels
        self.encoder = Encoder(config, make)
        self.decoder = Decoder(config, make)
        quant_conv = functools.partial(make.conv, 2 * channels, 2 * channels, 1, bias_init=_initial_moments)
        self.quant_conv = quant_conv() if config.use_quant_conv else None
        self.post_quant_conv = make.conv(channels, channels, 1) if config.use_post_quant_conv else None
        self.bn = RunningStatistics(config.latent_channels) if config.batch_norm_eps else None

    def encode_moments(self, images: Float[Array, "B h w c"]) -> Moments:
        """Returns the posterior of z, before normalisation and packing; float32."""
        moments = self.encoder(images.astype(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Moments(mean, jnp.clip(logvar, *_LOGVAR_RANGE))

    def encode(self, images: Float[Array, "B h w 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B h2 w2 c"]:
        """Returns normalised float32 latents: of the posterior mean, or of a sample when a key is given."""
        moments = self.encode_moments(images)
        return self.normalise(moments.mean if key is None else moments.sample(key))

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 3"]:
        """Returns float32 images, not clipped, from normalised latents."""
        return self.decode_z(self.denormalise(latents))

    def decode_z(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns float32 images from z as it is before normalisation and packing."""
        z = z.astype(self.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)

    def normalise(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Packs z and brings it to zero mean and unit standard deviation."""
        latents = pack_cells(z.astype(jnp.float32), self.config.pack)
        mean, std = self._statistics()
        return (latents - mean) / std

    def denormalise(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """The inverse of `normalise`."""
        mean, std = self._statistics()
        return unpack_cells(latents.astype(jnp.float32) * std + mean, self.config.pack)

    def _statistics(self) -> tuple[Float[Array, "#c"], Float[Array, "#c"]]:
        """Mean and standard deviation by which packed latents are normalised."""
        config = self.config
        if self.bn is not None and config.batch_norm_eps is not None:
            variance = self.bn.running_var[...].astype(jnp.float32) + config.batch_norm_eps
            return self.bn.running_mean[...].astype(jnp.float32), jnp.sqrt(variance)
        if config.latents_mean is not None and config.latents_std is not None:
            # packed channels are ordered (channel, row, column), so each statistic repeats for the cells of the square
            mean, std = (
                jnp.repeat(jnp.array(values), config.pack**2) for values in (config.latents_mean, config.latents_std)
            )
            return mean, std / config.scaling_factor
        return jnp.array([config.shift_factor or 0.0]), jnp.array([1.0 / config.scaling_factor])
