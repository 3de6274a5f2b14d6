"""InternViT, pixel shuffle and the projector: image tiles in, language-model embeddings out.

Source of the layout: OpenGVLab/InternVL `modeling_intern_vit.py` and `modeling_internvl_chat.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from unifusion_jax import layers as nn
from unifusion_jax.parallel.attention import attention


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes and switches of InternViT and of the pixel shuffle behind it.

    Attributes:
      image_px: side of a tile; positions are learned for this size.
      patch_px: side of a patch.
      hidden_size: width.
      num_layers: blocks.
      num_heads: attention heads, a divisor of the width.
      ffn_size: inner width of the feed-forward layer.
      norm: "layer_norm", or "rms_norm" (the 6B tower).
      norm_eps: of both norms of a block.
      qkv_bias: biases on the q, k and v maps.
      qk_norm: RMS norm of queries and keys over the full width.
      layer_scale_init: first value of the learned scales per channel.
      shuffle: side of the square of patches that is merged into one token (2 for a downsample ratio of 0.5).
      shuffle_transposed: pixel shuffle version 1, whose result is transposed in space.
    """

    image_px: int = 448
    patch_px: int = 14
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    ffn_size: int = 4096
    norm: str = "layer_norm"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale_init: float = 0.1
    shuffle: int = 2
    shuffle_transposed: bool = False

    def __post_init__(self):
        if self.image_px % (self.patch_px * self.shuffle):
            raise ValueError(
                "VisionConfig.image_px must be a multiple of patch_px * shuffle, got "
                f"{self.image_px}, {self.patch_px} and {self.shuffle}."
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                "VisionConfig.hidden_size must be a multiple of num_heads, got "
                f"{self.hidden_size} and {self.num_heads}."
            )
        if self.norm not in ("layer_norm", "rms_norm"):
            raise ValueError(f"VisionConfig.norm must be 'layer_norm' or 'rms_norm', got {self.norm!r}.")

    @property
    def side_patches(self) -> int:
        """Patches along one side of a tile."""
        return self.image_px // self.patch_px

    @property
    def tokens_per_tile(self) -> int:
        """Language-model tokens that one tile becomes."""
        return (self.side_patches // self.shuffle) ** 2


def _norm(config: VisionConfig, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps, param_dtype=param_dtype)
    return nn.layer_norm(config.hidden_size, eps=config.norm_eps, dtype=None, param_dtype=param_dtype, rngs=rngs)


class Block(nnx.Module):
    """x + ls1 * attention(norm x), then x + ls2 * mlp(norm x), with a learned scale per channel."""

    def __init__(self, config: VisionConfig, *, param_dtype: Any, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        options = {"dtype": None, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = _norm(config, param_dtype, rngs)
        self.q = nn.linear(width, width, ("embed", "heads"), bias=config.qkv_bias, **options)
        self.k = nn.linear(width, width, ("embed", "heads"), bias=config.qkv_bias, **options)
        self.v = nn.linear(width, width, ("embed", "heads"), bias=config.qkv_bias, **options)
        self.o = nn.linear(width, width, ("heads", "embed"), bias=True, **options)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(width, eps=1e-6, param_dtype=param_dtype)
            self.k_norm = nn.RMSNorm(width, eps=1e-6, param_dtype=param_dtype)
        self.mlp_norm = _norm(config, param_dtype, rngs)
        self.up = nn.linear(width, config.ffn_size, ("embed", "mlp"), bias=True, **options)
        self.down = nn.linear(config.ffn_size, width, ("mlp", "embed"), bias=True, **options)
        self.scale1 = nnx.Param(jnp.full((width,), config.layer_scale_init, param_dtype), axes=("norm",))
        self.scale2 = nnx.Param(jnp.full((width,), config.layer_scale_init, param_dtype), axes=("norm",))

    def __call__(self, x: Float[Array, "B S W"]) -> Float[Array, "B S W"]:
        """Runs the block; every token sees every other."""
        normed = self.attention_norm(x)
        query, key, value = self.q(normed), self.k(normed), self.v(normed)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        heads = (*x.shape[:2], self.config.num_heads, -1)
        mixed = attention(query.reshape(heads), key.reshape(heads), value.reshape(heads)).reshape(x.shape)
        x = x + self.scale1[...] * self.o(mixed)
        inner = jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False)
        return x + self.scale2[...] * self.down(inner)


class VisionTower(nnx.Module):
    """InternViT without a final norm."""

    def __init__(self, config: VisionConfig, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        positions = config.side_patches**2 + 1
        size = {"stride_px": config.patch_px, "padding": "VALID"}
        self.patch = nn.conv(3, width, config.patch_px, **size, dtype=None, param_dtype=param_dtype, rngs=rngs)
        normal = nnx.initializers.normal(0.02)
        self.cls = nnx.Param(normal(rngs.params(), (1, 1, width), param_dtype), axes=(None, None, "norm"))
        self.positions = nnx.Param(normal(rngs.params(), (1, positions, width), param_dtype), axes=(None, None, "norm"))
        self.layers = nn.Stack(
            lambda rngs: Block(config, param_dtype=param_dtype, rngs=rngs), config.num_layers, rngs=rngs
        )

    def __call__(self, pixels: Float[Array, "B h w 3"], *, remat: nn.Remat | None = None) -> Float[Array, "B tokens W"]:
        """Returns the states after the last block of the CLS token and the patches, row by row."""
        patches = self.patch(pixels.astype(self.patch.kernel[...].dtype))
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        cls = jnp.broadcast_to(self.cls[...], (patches.shape[0], 1, patches.shape[-1])).astype(patches.dtype)
        x = jnp.concatenate([cls, patches], axis=1) + self.positions[...]
        x, _ = self.layers.scan(lambda block, x, _: (block(x), None), x, remat=remat)
        return x


def pixel_shuffle(
    grid: Float[Array, "B rows columns W"], side: int, *, transposed: bool = False
) -> Float[Array, "B merged_rows merged_columns merged_W"]:
    """Merges squares of side x side cells into one, channels ordered (row, column, channel) within the square.

    `transposed` gives the older "v1" order of cells, the transpose in space.
    """
    batch, rows, columns, width = grid.shape
    cells = grid.reshape(batch, rows // side, side, columns // side, side, width).transpose(0, 1, 3, 2, 4, 5)
    merged = cells.reshape(batch, rows // side, columns // side, side * side * width)
    return merged.swapaxes(1, 2) if transposed else merged


class Projector(nnx.Module):
    """Layer norm and a two-layer perceptron from shuffled patches to the language model's width."""

    def __init__(self, in_features: int, out_features: int, *, param_dtype: Any, rngs: nnx.Rngs):
        options = {"bias": True, "dtype": None, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = nn.layer_norm(in_features, eps=1e-5, dtype=None, param_dtype=param_dtype, rngs=rngs)
        self.up = nn.linear(in_features, out_features, ("embed", "mlp"), **options)
        self.down = nn.linear(out_features, out_features, ("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch H"]:
        """Maps merged patches to embeddings."""
        return self.down(jax.nn.gelu(self.up(self.norm(x)), approximate=False))
