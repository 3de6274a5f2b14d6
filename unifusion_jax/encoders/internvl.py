"""InternVL (2.5 and 3): InternViT tiles, pixel shuffle, projector and a causal decoder.

Reads the `config.json` of both published layouts, transformers' ("internvl", hub names ending in -hf) and the original
("internvl_chat"), and writes the former.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from unifusion_jax import layers as nn
from unifusion_jax.encoders.batch import EncoderBatch
from unifusion_jax.encoders.decoder import DecoderConfig
from unifusion_jax.encoders.families import decoder_config, text_config
from unifusion_jax.encoders.model import DecoderSizes, LanguageModel
from unifusion_jax.encoders.vision import Projector, VisionConfig, VisionTower, pixel_shuffle


@dataclasses.dataclass(frozen=True)
class InternVLConfig(DecoderSizes):
    """Sizes of an InternVL model: its vision tower and its decoder."""

    vision: VisionConfig
    decoder: DecoderConfig

    def build(self, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> "InternVL":
        """Makes the network with random parameters."""
        return InternVL(self, param_dtype=param_dtype, rngs=rngs)

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that one tile becomes."""
        return self.vision.tokens_per_tile

    @property
    def projector_features(self) -> int:
        """Input width of the projector: the patches merged by the pixel shuffle."""
        return self.vision.hidden_size * self.vision.shuffle**2

    @classmethod
    def internvl3_8b(cls) -> "InternVLConfig":
        """InternVL3-8B: Qwen2.5-7B behind InternViT-300M."""
        return cls(VisionConfig(), DecoderConfig(151674, 3584, 28, 28, 4, 128, 18944))

    @classmethod
    def internvl3_2b(cls) -> "InternVLConfig":
        """InternVL3-2B: Qwen2.5-1.5B behind InternViT-300M."""
        return cls(VisionConfig(), DecoderConfig(151674, 1536, 28, 12, 2, 128, 8960))

    @classmethod
    def internvl3_1b(cls) -> "InternVLConfig":
        """InternVL3-1B: Qwen2.5-0.5B behind InternViT-300M."""
        return cls(VisionConfig(), DecoderConfig(151674, 896, 24, 14, 2, 64, 4864))

    @classmethod
    def internvl2_5_8b(cls) -> "InternVLConfig":
        """InternVL2.5-8B: InternLM2.5-7B behind InternViT-300M."""
        return cls(
            VisionConfig(), DecoderConfig(92553, 4096, 32, 32, 8, 128, 14336, rms_eps=1e-5, attention_bias=False)
        )

    @classmethod
    def demo(cls, vocab_size: int) -> "InternVLConfig":
        """The bundled small model: tiles of 32 px, 4 tokens a tile; 2.66 million parameters with 1,536 tokens."""
        vision = VisionConfig(
            image_px=32, patch_px=8, hidden_size=96, num_layers=4, num_heads=3, ffn_size=384, layer_scale_init=1.0
        )
        decoder = DecoderConfig(
            vocab_size, 128, 10, 4, 2, 32, 320, max_positions=2048, rope_theta=1e4, tie_embeddings=False
        )
        return cls(vision, decoder)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, has_head: bool = True) -> "InternVLConfig":
        """Reads a `config.json` of either layout.

        Args:
          config: the parsed file.
          has_head: whether the weights hold an output head; decides about tied embeddings where the file is silent.

        Raises:
          ValueError: naming key and value, for what is not supported.
        """
        if config.get("model_type") == "internvl_chat":
            return cls(_original_vision(config), decoder_config(_text(config, "llm_config"), tie_embeddings=False))
        text = _text(config, "text_config")
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
        _expect(config, "vision_feature_layer", -1)
        _expect(config, "vision_feature_select_strategy", "default")
        _expect(config, "projector_hidden_act", "gelu")
        return cls(
            _hf_vision(config), decoder_config(text, tie_embeddings=not has_head if tied is None else bool(tied))
        )

    def to_hf(self, *, image_token_id: int, eos_token_id: int, pad_token_id: int, system: str) -> dict[str, Any]:
        """Returns the `config.json` of the transformers layout; `system` is the default system message, "" for none."""
        vision = self.vision
        if vision.shuffle_transposed:
            raise ValueError("The transformers layout has pixel shuffle version 2 only, this model uses version 1.")
        return {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            "downsample_ratio": 1 / vision.shuffle,
            "eos_token_id": eos_token_id,
            "image_seq_length": self.tokens_per_tile,
            "image_token_id": image_token_id,
            "pad_token_id": pad_token_id,
            "projector_hidden_act": "gelu",
            "system_message": system,
            "text_config": {**text_config(self.decoder), "eos_token_id": eos_token_id, "pad_token_id": pad_token_id},
            "tie_word_embeddings": self.decoder.tie_embeddings,
            "vision_config": {
                "model_type": "internvl_vision",
                "architectures": ["InternVLVisionModel"],
                "attention_bias": vision.qkv_bias,
                "hidden_act": "gelu",
                "hidden_size": vision.hidden_size,
                "image_size": [vision.image_px, vision.image_px],
                "intermediate_size": vision.ffn_size,
                "layer_norm_eps": vision.norm_eps,
                "layer_scale_init_value": vision.layer_scale_init,
                "norm_type": vision.norm,
                "num_attention_heads": vision.num_heads,
                "num_channels": 3,
                "num_hidden_layers": vision.num_layers,
                "patch_size": [vision.patch_px, vision.patch_px],
                "use_absolute_position_embeddings": True,
                "use_mask_token": False,
                "use_mean_pooling": True,
                "use_qk_norm": vision.qk_norm,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        }


def _text(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    text = config.get(key)
    if not isinstance(text, Mapping):
        raise ValueError(f"config.json of an InternVL model needs an object {key!r}, got {text!r}.")
    return text


def _expect(config: Mapping[str, Any], key: str, expected: Any) -> None:
    if config.get(key, expected) != expected:
        raise ValueError(f"{key}={config[key]!r} is not supported, expected {expected!r}.")


def _square(value: Any, name: str) -> int:
    sides = value if isinstance(value, Sequence) else (value, value)
    if len(set(sides)) != 1:
        raise ValueError(f"{name}={value!r} is not supported: tiles and patches must be square.")
    return int(sides[0])


def _shuffle(config: Mapping[str, Any]) -> int:
    ratio = config.get("downsample_ratio", 0.5)
    if not 0 < ratio <= 1 or (1 / ratio) % 1:
        raise ValueError(f"downsample_ratio={ratio!r} is not supported: it must be 1 / n.")
    return int(1 / ratio)


def _hf_vision(config: Mapping[str, Any]) -> VisionConfig:
    vision = config.get("vision_config") or {}
    _expect(vision, "use_mean_pooling", True)
    _expect(vision, "use_absolute_position_embeddings", True)
    _expect(vision, "hidden_act", "gelu")
    return VisionConfig(
        image_px=_square(vision.get("image_size", 448), "image_size"),
        patch_px=_square(vision.get("patch_size", 14), "patch_size"),
        hidden_size=vision.get("hidden_size", 1024),
        num_layers=vision.get("num_hidden_layers", 24),
        num_heads=vision.get("num_attention_heads", 16),
        ffn_size=vision.get("intermediate_size", 4096),
        norm=vision.get("norm_type", "layer_norm"),
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        qkv_bias=vision.get("attention_bias", False),
        qk_norm=vision.get("use_qk_norm", False),
        layer_scale_init=vision.get("layer_scale_init_value", 0.1),
        shuffle=_shuffle(config),
    )


def _original_vision(config: Mapping[str, Any]) -> VisionConfig:
    """Reads the original layout, whose class defaults are those of the 6B tower."""
    vision = config.get("vision_config") or {}
    _expect(vision, "hidden_act", "gelu")
    _expect(config, "select_layer", -1)
    return VisionConfig(
        image_px=_square(config.get("force_image_size") or vision.get("image_size", 224), "image_size"),
        patch_px=_square(vision.get("patch_size", 14), "patch_size"),
        hidden_size=vision.get("hidden_size", 3200),
        num_layers=vision.get("num_hidden_layers", 48),
        num_heads=vision.get("num_attention_heads", 25),
        ffn_size=vision.get("intermediate_size", 12800),
        norm=vision.get("norm_type", "rms_norm"),
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        qkv_bias=vision.get("qkv_bias", False),
        qk_norm=vision.get("qk_normalization", True),
        shuffle=_shuffle(config),
        shuffle_transposed=config.get("ps_version", "v1") == "v1",
    )


class InternVL(LanguageModel):
    """Vision tower, projector and decoder."""

    def __init__(self, config: InternVLConfig, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        options = {"param_dtype": param_dtype, "rngs": rngs}
        self.vision = VisionTower(config.vision, **options)
        self.projector = Projector(config.projector_features, config.decoder.hidden_size, **options)
        super().__init__(config, **options)

    def image_features(
        self, batch: EncoderBatch, *, remat: nn.Remat | None = None
    ) -> Float[Array, "B image_tokens H"] | None:
        """Returns the embeddings of a row's tiles, tile after tile, row by row within a tile."""
        if batch.pixels is None or not batch.pixels.shape[1]:
            return None
        vision, pixels = self.config.vision, jnp.asarray(batch.pixels)
        states = self.vision(pixels.reshape(-1, *pixels.shape[2:]), remat=remat)[:, 1:]
        grid = states.reshape(-1, vision.side_patches, vision.side_patches, vision.hidden_size)
        merged = pixel_shuffle(grid, vision.shuffle, transposed=vision.shuffle_transposed)
        return self.projector(merged.reshape(pixels.shape[0], -1, self.config.projector_features))
