"""Gemma 3 with pictures: SigLIP, averaged patches, and a decoder in which the tokens of an image see each other.

Source of the layout: arXiv 2503.19786, google-deepmind/gemma `vision/_vision.py`, transformers' Gemma 3.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from unifusion_jax import layers as nn
from unifusion_jax.encoders.batch import EncoderBatch
from unifusion_jax.encoders.decoder import DecoderConfig
from unifusion_jax.encoders.families import decoder_config
from unifusion_jax.encoders.model import DecoderSizes, LanguageModel
from unifusion_jax.encoders.vision import VisionConfig, VisionTower


@dataclasses.dataclass(frozen=True)
class GemmaVisionConfig(DecoderSizes):
    """Sizes of a Gemma 3 model with pictures: its vision tower and its decoder."""

    vision: VisionConfig
    decoder: DecoderConfig

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that one tile becomes."""
        return self.vision.tokens_per_tile

    def build(self, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> "GemmaVision":
        """Makes the network with random parameters."""
        return GemmaVision(self, param_dtype=param_dtype, rngs=rngs)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, has_head: bool = True) -> "GemmaVisionConfig":
        """Reads a `config.json`; keys that it leaves out take the values of transformers' configuration classes.

        Raises:
          ValueError: naming key and value, for what is not supported.
        """
        text = {"model_type": "gemma3_text", **(config.get("text_config") or {})}
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
        return cls(_siglip(config), decoder_config(text, tie_embeddings=bool(tied)))


def _siglip(config: Mapping[str, Any]) -> VisionConfig:
    vision = config.get("vision_config") or {}
    image_px, patch_px = vision.get("image_size", 224), vision.get("patch_size", 16)
    tokens = config.get("mm_tokens_per_image", 256)
    side = math.isqrt(tokens)
    if side**2 != tokens or image_px // patch_px % side:
        raise ValueError(
            f"mm_tokens_per_image={tokens} is not supported: its root must divide the {image_px // patch_px} patches "
            "along a side of an image."
        )
    return VisionConfig(
        image_px=image_px,
        patch_px=patch_px,
        hidden_size=vision.get("hidden_size", 768),
        num_layers=vision.get("num_hidden_layers", 12),
        num_heads=vision.get("num_attention_heads", 12),
        ffn_size=vision.get("intermediate_size", 3072),
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        layer_scale_init=None,
        activation=vision.get("hidden_act", "gelu_pytorch_tanh"),
        cls=False,
        final_norm=True,
        shuffle=image_px // patch_px // side,
    )


class AverageProjector(nnx.Module):
    """Averages squares of patches, norms them and maps them to the decoder's width."""

    def __init__(self, vision: VisionConfig, out_features: int, *, param_dtype: Any, rngs: nnx.Rngs):
        self.vision = vision
        width = vision.hidden_size
        self.norm = nn.RMSNorm(width, eps=vision.norm_eps, offset=1.0, param_dtype=param_dtype)
        self.out = nn.linear(width, out_features, ("mlp", "embed"), dtype=None, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, states: Float[Array, "B patches W"]) -> Float[Array, "B tokens H"]:
        """Returns a tile's tokens, row by row."""
        side, pool = self.vision.side_patches // self.vision.shuffle, self.vision.shuffle
        cells = states.reshape(states.shape[0], side, pool, side, pool, -1)
        return self.out(self.norm(jnp.mean(cells, axis=(2, 4)).reshape(states.shape[0], side**2, -1)))


class GemmaVision(LanguageModel):
    """Vision tower, projector and decoder."""

    def __init__(self, config: GemmaVisionConfig, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.vision = VisionTower(config.vision, **options)
        self.projector = AverageProjector(config.vision, config.decoder.hidden_size, **options)
        super().__init__(config, **options)

    def image_features(
        self, batch: EncoderBatch, *, remat: nn.Remat | None = None
    ) -> Float[Array, "B image_tokens H"] | None:
        """Returns the embeddings of a row's tiles, tile after tile, row by row within a tile."""
        if batch.pixels is None or not batch.pixels.shape[1]:
            return None
        pixels = jnp.asarray(batch.pixels)
        features = self.projector(self.vision(pixels.reshape(-1, *pixels.shape[2:]), remat=remat))
        return features.reshape(pixels.shape[0], -1, features.shape[-1])

    def image_blocks(self, batch: EncoderBatch) -> Int[Array, "B S"] | None:
        """Numbers the runs of image tokens from 1: other tokens stand between any two images."""
        if batch.pixels is None or not batch.pixels.shape[1]:
            return None
        is_image = jnp.asarray(batch.is_image) & jnp.asarray(batch.mask)
        begins = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
        return jnp.where(is_image, jnp.cumsum(begins, axis=1, dtype=jnp.int32), 0)
