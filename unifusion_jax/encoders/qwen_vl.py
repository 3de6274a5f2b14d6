"""Qwen2.5-VL: a vision tower that attends in windows, a merger of patches, and a causal decoder with M-RoPE.

Images keep nearly their own size (`native.NativeConfig`): a tile is the square of patches that becomes one token, and a
row's tiles come in groups of whole windows. Source of the layout: arXiv 2502.13923 and transformers' Qwen2.5-VL.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from unifusion_jax import layers as nn
from unifusion_jax.encoders.batch import EncoderBatch
from unifusion_jax.encoders.decoder import DecoderConfig, Positions, rotate
from unifusion_jax.encoders.families import decoder_config
from unifusion_jax.encoders.model import DecoderSizes, LanguageModel
from unifusion_jax.encoders.vision import Block, BlockConfig
from unifusion_jax.parallel.attention import attention

# Full attention runs over at most about this many queries at a time, which bounds its scores in memory.
_QUERIES_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes and switches of the vision tower.

    Attributes:
      patch_px: side of a patch.
      frames: equal frames that a still image is repeated to.
      merge_patches: side of the square of patches that becomes one token.
      window_tiles: side of an attention window, in such squares.
      hidden_size: width.
      num_layers: blocks.
      num_heads: attention heads; the width of one is a multiple of 4 for rotary positions on two axes.
      ffn_size: inner width of the gated feed-forward layer.
      full_layers: blocks, counted from 0, that attend over the whole image.
      activation: of the gate.
      rope_theta: base of the rotary frequencies.
    """

    patch_px: int = 14
    frames: int = 2
    merge_patches: int = 2
    window_tiles: int = 4
    hidden_size: int = 1280
    num_layers: int = 32
    num_heads: int = 16
    ffn_size: int = 3420
    full_layers: tuple[int, ...] = (7, 15, 23, 31)
    activation: str = "silu"
    rope_theta: float = 1e4

    def __post_init__(self):
        for name in ("patch_px", "frames", "merge_patches", "window_tiles", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"QwenVisionConfig.{name} must be positive, got {getattr(self, name)}.")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                "QwenVisionConfig.hidden_size must be a multiple of 4 * num_heads, got "
                f"{self.hidden_size} and {self.num_heads}."
            )
        if not set(self.full_layers) <= set(range(self.num_layers)):
            raise ValueError(
                f"QwenVisionConfig.full_layers must lie in 0 .. {self.num_layers - 1}, got {self.full_layers}."
            )
        _ = self.block  # its own checks

    @property
    def tile_px(self) -> int:
        """Side of the square that becomes one token."""
        return self.patch_px * self.merge_patches

    @property
    def block(self) -> BlockConfig:
        """Sizes of the blocks."""
        return BlockConfig(
            self.hidden_size, self.num_heads, self.ffn_size, norm="rms_norm", activation=self.activation, gated=True
        )

    @property
    def rope_frequencies(self) -> Float[np.ndarray, "quarter"]:
        """Radians per row or column of each rotary pair of that axis, float32."""
        axis_dim = self.hidden_size // self.num_heads // 2
        exponents = np.arange(0, axis_dim, 2, dtype=np.float32) / np.float32(axis_dim)
        return 1.0 / np.float32(self.rope_theta) ** exponents


@dataclasses.dataclass(frozen=True)
class QwenVLConfig(DecoderSizes):
    """Sizes of a Qwen2.5-VL model: its vision tower and its decoder."""

    vision: QwenVisionConfig
    decoder: DecoderConfig

    tokens_per_tile = 1

    def build(self, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> "QwenVL":
        """Makes the network with random parameters."""
        return QwenVL(self, param_dtype=param_dtype, rngs=rngs)

    @classmethod
    def qwen2_5_vl_7b(cls) -> "QwenVLConfig":
        """Qwen2.5-VL-7B: 8.29 billion parameters."""
        decoder = DecoderConfig(152064, 3584, 28, 28, 4, 128, 18944, max_positions=128000, mrope_section=(16, 24, 24))
        return cls(QwenVisionConfig(), decoder)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, has_head: bool = True) -> "QwenVLConfig":
        """Reads a `config.json`, with the language model's keys at the top (older files) or under "text_config".

        Raises:
          ValueError: naming key and value, for what is not supported.
        """
        text = config.get("text_config") or config
        tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "mrope"):
            raise ValueError(f"Unsupported rotary scaling {kind!r} of Qwen2.5-VL; supported: 'default', 'mrope'.")
        given = {key: value for key, value in text.items() if value is not None}
        plain = {"model_type": "qwen2", "rope_parameters": None, "rope_scaling": None}
        theta = rope.get("rope_theta", given.get("rope_theta", 1e6))
        decoder = decoder_config({**_TEXT_DEFAULTS, **given, **plain, "rope_theta": theta}, tie_embeddings=bool(tied))
        section = tuple(rope.get("mrope_section", (16, 24, 24)))
        vision = _vision(config.get("vision_config") or {}, decoder.hidden_size)
        return cls(vision, dataclasses.replace(decoder, mrope_section=section))


# What transformers' configuration classes assume for keys that config.json leaves out.
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
}


def _vision(vision: Mapping[str, Any], hidden_size: int) -> QwenVisionConfig:
    out = vision.get("out_hidden_size", 3584)
    if out != hidden_size:
        raise ValueError(f"vision_config.out_hidden_size={out} must equal the decoder's hidden_size={hidden_size}.")
    patch_px, merge = vision.get("patch_size", 14), vision.get("spatial_merge_size", 2)
    return QwenVisionConfig(
        patch_px=patch_px,
        frames=vision.get("temporal_patch_size", 2),
        merge_patches=merge,
        window_tiles=vision.get("window_size", 112) // merge // patch_px,
        hidden_size=vision.get("hidden_size", 3584),
        num_layers=vision.get("depth", 32),
        num_heads=vision.get("num_heads", 16),
        ffn_size=vision.get("intermediate_size", 3420),
        full_layers=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
        activation=vision.get("hidden_act", "silu"),
        rope_theta=(vision.get("rope_parameters") or {}).get("rope_theta", 1e4),
    )


class QwenVisionTower(nnx.Module):
    """Patches of two equal frames, blocks with rotary positions on two axes, and the merger to the decoder's width."""

    def __init__(self, config: QwenVisionConfig, out_features: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        width, merged = config.hidden_size, config.hidden_size * config.merge_patches**2
        shape = (config.frames, config.patch_px, config.patch_px, 3, width)
        self.patch = nn.normal(shape, (None, None, None, "conv_in", "conv_out"), param_dtype=param_dtype, rngs=rngs)
        self.layers = nn.Stack(
            lambda rngs: Block(config.block, param_dtype=param_dtype, rngs=rngs), config.num_layers, rngs=rngs
        )
        options = {"bias": True, "dtype": None, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = nn.RMSNorm(width, param_dtype=param_dtype)
        self.up = nn.linear(merged, merged, ("embed", "mlp"), **options)
        self.down = nn.linear(merged, out_features, ("mlp", "embed"), **options)

    def __call__(
        self, pixels: Float[Array, "B T h w 3"], grid: Int[Array, "B T 3"], *, remat: nn.Remat | None = None
    ) -> Float[Array, "B T H"]:
        """Returns the embedding of each tile.

        Args:
          pixels: tiles in groups of whole windows, each group of `window_tiles` ** 2; the last may be cut short.
          grid: image, row and column of each tile, -1 for places without one (their embeddings are noise).
          remat: wraps the scanned block.
        """
        tiles = pixels.shape[1]
        spare = -tiles % self.config.window_tiles**2
        pixels = jnp.pad(pixels, ((0, 0), (0, spare), (0, 0), (0, 0), (0, 0)))
        grid = jnp.pad(grid, ((0, 0), (0, spare), (0, 0)), constant_values=-1)
        x, rows, columns = self._patches(pixels, grid)
        frequencies = self.config.rope_frequencies
        angles = jnp.concatenate([rows[..., None] * frequencies, columns[..., None] * frequencies], axis=-1)
        rope = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
        per_tile = self.config.merge_patches**2
        windows = grid.at[..., 1:].set(grid[..., 1:] // self.config.window_tiles)
        images, windows = jnp.repeat(grid[..., 0], per_tile, axis=1), jnp.repeat(windows, per_tile, axis=1)
        full = np.isin(np.arange(self.config.num_layers), self.config.full_layers)

        def apply(block: Block, x: jax.Array, full: jax.Array) -> tuple[jax.Array, None]:
            def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
                query, key = rotate(query, rope), rotate(key, rope)
                return jax.lax.cond(
                    full,
                    lambda: _attend_images(query, key, value, images),
                    lambda: _attend_windows(query, key, value, windows, per_tile * self.config.window_tiles**2),
                )

            return block(x, attend), None

        x, _ = self.layers.scan(apply, x, full, remat=remat)
        merged = self.norm(x).reshape(*pixels.shape[:2], -1)[:, :tiles]
        return self.down(jax.nn.gelu(self.up(merged), approximate=False))

    def _patches(self, pixels: jax.Array, grid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns embedded patches [B, patches, W], those of a tile together, and the row and column of each."""
        config, side = self.config, self.config.merge_patches
        batch, tiles = pixels.shape[:2]
        cells = pixels.reshape(batch, tiles, side, config.patch_px, side, config.patch_px, 3).swapaxes(3, 4)
        cells = cells.reshape(batch, tiles * side**2, -1).astype(self.patch[...].dtype)
        kernel = self.patch[...].reshape(-1, config.hidden_size)
        inner = jnp.arange(side)
        rows = grid[..., 1, None, None] * side + inner[:, None] + jnp.zeros_like(inner)
        columns = grid[..., 2, None, None] * side + inner + jnp.zeros_like(inner)[:, None]
        shape = (batch, tiles * side**2)
        return jnp.tile(cells, config.frames) @ kernel, rows.reshape(shape), columns.reshape(shape)


def _attend_images(
    query: Float[Array, "B S A E"],
    key: Float[Array, "B S A E"],
    value: Float[Array, "B S A E"],
    images: Int[Array, "B S"],
) -> Float[Array, "B S A E"]:
    """Lets every patch see its whole image, some queries at a time."""
    length = query.shape[1]
    parts = next(n for n in range(1, length + 1) if length % n == 0 and length // n <= _QUERIES_AT_ONCE)

    def attend(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, own = part
        return attention(query, key, value, mask=own[:, :, None] == images[:, None, :])

    split = [jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0) for x in (query, images)]
    return jnp.moveaxis(jax.lax.map(attend, (split[0], split[1])), 0, 1).reshape(query.shape)


def _attend_windows(
    query: Float[Array, "B S A E"],
    key: Float[Array, "B S A E"],
    value: Float[Array, "B S A E"],
    windows: Int[Array, "B S 3"],
    size: int,
) -> Float[Array, "B S A E"]:
    """Lets every patch see its window; `size` patches in a row hold whole windows."""

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(-1, size, *x.shape[2:])

    own = grouped(windows)
    same: Bool[Array, "groups size size"] = jnp.all(own[:, :, None] == own[:, None], axis=-1)
    return attention(grouped(query), grouped(key), grouped(value), mask=same).reshape(query.shape)


def reading_order(grid: Int[Array, "B T 3"]) -> Int[Array, "B T"]:
    """Returns the places of a row's tiles image by image, row by row; places without a tile last."""
    image, row, column = (grid[..., axis] for axis in range(3))
    return jnp.lexsort((column, row, jnp.where(image < 0, grid.shape[1], image)), axis=-1)


def mrope_positions(
    mask: Bool[Array, "B S"], is_image: Bool[Array, "B S"], grid: Int[Array, "B T 3"]
) -> Int[Array, "3 B S"]:
    """Returns the time, row and column position of each token.

    A word takes one position on all axes. The tokens of an image all stand at the time it begins, their row and column
    counted from there; what follows begins where its longer side ends.
    """
    order = reading_order(grid)
    tiles = jnp.take_along_axis(grid, order[..., None], axis=1)
    image = jnp.where(tiles[..., 0] < 0, grid.shape[1], tiles[..., 0])
    longer = jnp.max(tiles[..., 1:], axis=-1) + 1
    sides = jax.vmap(lambda side, owner: jax.ops.segment_max(side, owner, num_segments=grid.shape[1] + 1))(
        longer, image
    )
    is_image = is_image & mask
    token_tile = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, grid.shape[1] - 1)
    image, row, column = (jnp.take_along_axis(x, token_tile, axis=1) for x in (image, tiles[..., 1], tiles[..., 2]))
    side = jnp.take_along_axis(sides, image, axis=1)
    first = is_image & (row == 0) & (column == 0)
    advance = jnp.where(is_image, jnp.where(first, side, 0), mask)
    end = jnp.cumsum(advance, axis=1)
    time = jnp.where(is_image, end - side, end - 1)
    zero = jnp.zeros_like(time)
    offsets = [zero, jnp.where(is_image, row, 0), jnp.where(is_image, column, 0)]
    return jnp.maximum(jnp.stack([time + offset for offset in offsets]), 0).astype(jnp.int32)


class QwenVL(LanguageModel):
    """Vision tower and decoder."""

    def __init__(self, config: QwenVLConfig, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.vision = QwenVisionTower(config.vision, config.decoder.hidden_size, **options)
        super().__init__(config, **options)

    def image_features(
        self, batch: EncoderBatch, *, remat: nn.Remat | None = None
    ) -> Float[Array, "B image_tokens H"] | None:
        """Returns the embeddings of a row's tiles, image by image, row by row."""
        if batch.pixels is None or not batch.pixels.shape[1]:
            return None
        grid = jnp.asarray(batch.grid)
        features = self.vision(jnp.asarray(batch.pixels), grid, remat=remat)
        return jnp.take_along_axis(features, reading_order(grid)[..., None], axis=1)

    def positions(self, batch: EncoderBatch) -> Positions:
        """Returns M-RoPE positions; plain ones, which are the same, for a batch without pictures."""
        if batch.grid is None or not batch.grid.shape[1]:
            return super().positions(batch)
        return mrope_positions(jnp.asarray(batch.mask), jnp.asarray(batch.is_image), jnp.asarray(batch.grid))
