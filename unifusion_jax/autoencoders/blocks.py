"""Building blocks of the convolutional autoencoders, over NHWC images.

Attributes are named as in diffusers' AutoencoderKL, so that a parameter's path is its name there; `names.py` has the
spellings of the other classes. Letters: B batch, h and w height and width, c channels.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from unifusion_jax import layers
from unifusion_jax.parallel.attention import attention

_NORM_EPS = 1e-6
# A new posterior is narrow (standard deviation 0.05). From unit noise a small network first learns to outshout it, which
# costs thousands of steps.
_INITIAL_LOGVAR = -6.0
# Wan and Qwen-Image divide by the length of the channel vector and guard only against zero.
_TINY = 1e-24


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


@dataclasses.dataclass(frozen=True)
class Makers:
    """The layer constructors with one network's dtypes and kind of norm filled in.

    Attributes:
      dtype: type of the activations.
      param_dtype: type of the weights.
      rngs: source of the random weights.
      groups: groups of every group norm; None for root-mean-square norms over the channels (Wan, Qwen-Image).
      fused_qkv: whether attention maps to query, key and value by one matrix.
    """

    dtype: Any
    param_dtype: Any
    rngs: nnx.Rngs
    groups: int | None = None
    fused_qkv: bool = False

    def _options(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}

    def conv(self, in_channels: int, out_channels: int, kernel_px: int, **options: Any) -> nnx.Conv:
        """Makes a convolution, see `layers.conv`."""
        return layers.conv(in_channels, out_channels, kernel_px, **self._options(), **options)

    def linear(self, in_channels: int, out_channels: int) -> nnx.Linear:
        """Makes a linear map over the channels, with bias."""
        return layers.linear(in_channels, out_channels, ("conv_in", "conv_out"), bias=True, **self._options())

    def norm(self, channels: int) -> Callable[[jax.Array], jax.Array]:
        """Makes a norm."""
        if self.groups is None:
            return layers.RMSNorm(channels, eps=_TINY, param_dtype=self.param_dtype)
        return GroupNorm(channels, self.groups, dtype=self.dtype, param_dtype=self.param_dtype)


def initial_moments(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any = jnp.float32, out_sharding: Any = None
) -> Array:
    """Bias of the layer that makes the moments: mean 0, a small variance."""
    half = shape[0] // 2
    return jnp.concatenate([jnp.zeros((half,), dtype), jnp.full((half,), _INITIAL_LOGVAR, dtype)])


class ResnetBlock(nnx.Module):
    """Two normalised convolutions and a shortcut, 1x1 where the width changes. A new block is its shortcut alone."""

    def __init__(self, in_channels: int, out_channels: int, make: Makers):
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

    def __init__(self, channels: int, make: Makers):
        self.group_norm = make.norm(channels)
        if make.fused_qkv:
            self.to_qkv = make.linear(channels, 3 * channels)
        else:
            self.to_q, self.to_k, self.to_v = (make.linear(channels, channels) for _ in range(3))
        self.to_out = make.linear(channels, channels)
        self.fused_qkv = make.fused_qkv

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Mixes the cells of each image."""
        batch, height, width, channels = x.shape
        tokens = self.group_norm(x).reshape(batch, height * width, 1, channels)
        if self.fused_qkv:
            query, key, value = jnp.split(self.to_qkv(tokens), 3, axis=-1)
        else:
            query, key, value = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        mixed = attention(query, key, value)
        return x + self.to_out(mixed.reshape(batch, height, width, channels))


class Resample(nnx.Module):
    """Halves or doubles the resolution; the convolution sits under the name `conv`."""

    def __init__(self, channels: int, make: Makers, *, up: bool, out_channels: int | None = None):
        self.up = up
        if up:
            self.conv = make.conv(channels, out_channels or channels, 3)
        else:  # one row and column of zeros, at the bottom and the right only
            self.conv = make.conv(channels, out_channels or channels, 3, stride_px=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns half or twice the resolution."""
        if self.up:
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(x)


class MidBlock(nnx.Module):
    """Residual block, attention (optional), residual block at the coarsest resolution."""

    def __init__(self, channels: int, make: Makers, *, attend: bool):
        self.resnets = Numbered(ResnetBlock(channels, channels, make) for _ in range(2))
        self.attentions = Numbered([SpatialAttention(channels, make)]) if attend else None

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Keeps resolution and width."""
        first, second = self.resnets
        x = first(x)
        for attend in self.attentions if self.attentions is not None else ():
            x = attend(x)
        return second(x)
