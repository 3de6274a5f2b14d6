"""Vision transformers over square tiles (InternViT, SigLIP), and what InternVL puts behind its own.

Sources of the layouts: OpenGVLab/InternVL `modeling_intern_vit.py` and `modeling_internvl_chat.py`; transformers' SigLIP.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from unifusion_jax import layers as nn
from unifusion_jax.encoders.decoder_config import ACTIVATIONS
from unifusion_jax.parallel import target
from unifusion_jax.parallel.attention import attention
from unifusion_jax.parallel.sharding import constrain

# From this many tokens an image on, a CPU does one image at a time.
_LARGE_IMAGE_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Sizes and switches of one block of a vision tower.

    Attributes:
      hidden_size: width.
      num_heads: attention heads, a divisor of the width.
      ffn_size: inner width of the feed-forward layer.
      norm: "layer_norm", or "rms_norm".
      norm_eps: of both norms of a block.
      qkv_bias: biases on the q, k and v maps.
      qk_norm: RMS norm of queries and keys over the full width.
      layer_scale_init: first value of the learned scales per channel; None for no scales.
      activation: of the feed-forward layer.
      gated: whether that layer is down(act(gate x) * up x) instead of down(act(up x)).
    """

    hidden_size: int
    num_heads: int
    ffn_size: int
    norm: str = "layer_norm"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale_init: float | None = None
    activation: str = "gelu"
    gated: bool = False

    def __post_init__(self):
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"A vision tower's hidden_size must be a multiple of num_heads, got {self.hidden_size} and "
                f"{self.num_heads}."
            )
        if self.norm not in ("layer_norm", "rms_norm"):
            raise ValueError(f"A vision tower's norm must be 'layer_norm' or 'rms_norm', got {self.norm!r}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.activation!r}, expected one of {sorted(ACTIVATIONS)}.")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes and switches of a tower over square tiles, and how many of its patches become one token.

    Attributes:
      image_px: side of a tile; positions are learned for this size.
      patch_px: side of a patch.
      num_layers: blocks.
      hidden_size, num_heads, ffn_size, norm, norm_eps, qkv_bias, qk_norm, layer_scale_init, activation: of the blocks,
        see `BlockConfig`.
      cls: whether a learned token stands before the patches.
      final_norm: whether a norm follows the last block.
      shuffle: side of the square of patches that becomes one token (2 for a downsample ratio of 0.5).
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
    layer_scale_init: float | None = 0.1
    activation: str = "gelu"
    cls: bool = True
    final_norm: bool = False
    shuffle: int = 2
    shuffle_transposed: bool = False

    def __post_init__(self):
        if self.image_px % (self.patch_px * self.shuffle):
            raise ValueError(
                "VisionConfig.image_px must be a multiple of patch_px * shuffle, got "
                f"{self.image_px}, {self.patch_px} and {self.shuffle}."
            )
        _ = self.block  # its own checks

    @property
    def block(self) -> BlockConfig:
        """Sizes of the blocks."""
        names = [field.name for field in dataclasses.fields(BlockConfig) if field.name != "gated"]
        return BlockConfig(**{name: getattr(self, name) for name in names})

    @property
    def side_patches(self) -> int:
        """Patches along one side of a tile."""
        return self.image_px // self.patch_px

    @property
    def tokens_per_tile(self) -> int:
        """Language-model tokens that one tile becomes."""
        return (self.side_patches // self.shuffle) ** 2


def _norm(config: BlockConfig | VisionConfig, param_dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    if config.norm == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps, param_dtype=param_dtype)
    return nn.layer_norm(config.hidden_size, eps=config.norm_eps, dtype=None, param_dtype=param_dtype, rngs=rngs)


class Block(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x), each branch with a learned scale per channel where configured."""

    def __init__(self, config: BlockConfig, *, param_dtype: Any, rngs: nnx.Rngs):
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
        if config.gated:
            self.gate = nn.linear(width, config.ffn_size, ("embed", "mlp"), bias=True, **options)
        self.up = nn.linear(width, config.ffn_size, ("embed", "mlp"), bias=True, **options)
        self.down = nn.linear(config.ffn_size, width, ("mlp", "embed"), bias=True, **options)
        if config.layer_scale_init is not None:
            self.scale1 = nnx.Param(jnp.full((width,), config.layer_scale_init, param_dtype), axes=("norm",))
            self.scale2 = nnx.Param(jnp.full((width,), config.layer_scale_init, param_dtype), axes=("norm",))

    def __call__(
        self, x: Float[Array, "B S W"], attend: Callable[[Any, Any, Any], jax.Array] = attention
    ) -> Float[Array, "B S W"]:
        """Runs the block.

        Args:
          x: states.
          attend: maps queries, keys and values, each [B, S, heads, E], to their mixture; by default every token sees
            every other.
        """
        normed = self.attention_norm(x)
        query, key, value = self.q(normed), self.k(normed), self.v(normed)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        heads = (*x.shape[:2], self.config.num_heads, -1)
        mixed = attend(query.reshape(heads), key.reshape(heads), value.reshape(heads)).reshape(x.shape)
        x = x + self._scaled("scale1", self.o(mixed))
        return x + self._scaled("scale2", self._mlp(self.mlp_norm(x)))

    def _scaled(self, name: str, branch: jax.Array) -> jax.Array:
        return branch if self.config.layer_scale_init is None else getattr(self, name)[...] * branch

    def _mlp(self, x: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        inner = activation(self.gate(x)) * self.up(x) if self.config.gated else activation(self.up(x))
        return self.down(inner)


class VisionTower(nnx.Module):
    """Patches with learned positions, blocks, and a last norm where configured."""

    def __init__(self, config: VisionConfig, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        positions = config.side_patches**2 + config.cls
        size = {"stride_px": config.patch_px, "padding": "VALID"}
        self.patch = nn.conv(3, width, config.patch_px, **size, dtype=None, param_dtype=param_dtype, rngs=rngs)
        table: dict[str, Any] = {"axes": (None, None, "norm"), "param_dtype": param_dtype, "rngs": rngs}
        if config.cls:
            self.cls = nn.normal((1, 1, width), **table)
        self.positions = nn.normal((1, positions, width), **table)
        self.layers = nn.Stack(
            lambda rngs: Block(config.block, param_dtype=param_dtype, rngs=rngs), config.num_layers, rngs=rngs
        )
        if config.final_norm:
            self.norm = _norm(config, param_dtype, rngs)

    def __call__(self, pixels: Float[Array, "B h w 3"], *, remat: nn.Remat | None = None) -> Float[Array, "B tokens W"]:
        """Returns the states of the CLS token, if there is one, and of the patches, row by row."""
        if target.current().device.platform != "cpu" or self.positions.shape[1] < _LARGE_IMAGE_TOKENS:
            return self._states(pixels, remat)
        # On a CPU all that a block computes is written out; large images are no slower one by one, and take less memory.
        return jax.lax.map(lambda image: self._states(image[None], remat)[0], pixels)

    def _states(self, pixels: Float[Array, "B h w 3"], remat: nn.Remat | None) -> Float[Array, "B tokens W"]:
        x = self.patch(pixels.astype(self.patch.kernel[...].dtype))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.config.cls:
            cls = jnp.broadcast_to(self.cls[...], (x.shape[0], 1, x.shape[-1])).astype(x.dtype)
            x = jnp.concatenate([cls, x], axis=1)
        x = x + self.positions[...]
        x = constrain(x, "batch", None, None)
        x, _ = self.layers.scan(lambda block, x, _: (constrain(block(x), "batch", None, None), None), x, remat=remat)
        return self.norm(x) if self.config.final_norm else x


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
