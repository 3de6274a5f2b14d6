"""What every frozen encoder offers to `Encoder`: sizes, and the states of a batch; and the network of text-only models.

A family with pictures derives from `LanguageModel` and gives its image features, and where it needs them other rotary
positions or image blocks that attend in both directions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from unifusion_jax import layers as nn
from unifusion_jax.encoders.batch import EncoderBatch
from unifusion_jax.encoders.decoder import Decoder, DecoderConfig, Positions, token_positions
from unifusion_jax.encoders.decoder_config import Llama3Scaling
from unifusion_jax.encoders.families import decoder_config


class DecoderSizes:
    """Sizes that `Encoder` asks of a configuration, for those that have a `decoder`.

    The configuration of a model without decoder (T5) gives the same names itself, with `decodes = False`.
    """

    decoder: DecoderConfig
    decodes = True

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.decoder.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width H of the states."""
        return self.decoder.hidden_size

    @property
    def num_layers(self) -> int:
        """Number of blocks, and of the last layer."""
        return self.decoder.num_layers

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens."""
        return self.decoder.max_positions

    @property
    def key_value_shape(self) -> tuple[int, int]:
        """Key-value heads G and their width E."""
        return self.decoder.key_value_shape


class LanguageModel(nnx.Module):
    """A causal decoder and what turns a batch into its input; text-only as it stands."""

    def __init__(self, config: Any, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.decoder = Decoder(config.decoder, param_dtype=param_dtype, rngs=rngs)

    def image_features(
        self, batch: EncoderBatch, *, remat: nn.Remat | None = None
    ) -> Float[Array, "B image_tokens H"] | None:
        """Returns what stands in the places of a row's image tokens, in order; None for a batch without pictures."""
        if batch.pixels is not None:
            raise ValueError("The batch has pictures, but this language model reads text only.")
        return None

    def positions(self, batch: EncoderBatch) -> Positions:
        """Returns the rotary positions: existing tokens counted from 0."""
        return token_positions(jnp.asarray(batch.mask))

    def image_blocks(self, batch: EncoderBatch) -> Int[Array, "B S"] | None:
        """Returns the positive number of the image whose tokens see each other, 0 for other tokens; None: all causal."""
        return None

    def embed(self, batch: EncoderBatch, *, remat: nn.Remat | None = None) -> Float[Array, "B S H"]:
        """Returns what enters the first block: token embeddings, with image features in the places of image tokens."""
        embeddings = self.embed_tokens(jnp.asarray(batch.token_ids))
        features = self.image_features(batch, remat=remat)
        if features is None:
            return embeddings
        is_image = jnp.asarray(batch.is_image)
        order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
        placed = jnp.take_along_axis(features.astype(embeddings.dtype), order[:, :, None], axis=1)
        return jnp.where(is_image[:, :, None], placed, embeddings)

    def embed_tokens(self, token_ids: Int[Array, "B S"]) -> Float[Array, "B S H"]:
        """Returns the embeddings of token ids alone."""
        return self.decoder.embed(token_ids)

    def states(
        self,
        batch: EncoderBatch,
        layers: Sequence[int],
        *,
        keep_index: Int[Array, "B C"] | None = None,
        remat: nn.Remat | None = None,
    ) -> Float[Array, "B C N H"]:
        """Exports the states of `layers` of a batch, of all tokens or of those at `keep_index`; see `Decoder.states`."""
        return self.decoder.states(
            self.embed(batch, remat=remat),
            jnp.asarray(batch.mask),
            layers,
            positions=self.positions(batch),
            images=self.image_blocks(batch),
            keep_index=keep_index,
            remat=remat,
        )

    def final_norm(self, states: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        """Returns states after the final norm."""
        return self.decoder.final_norm(states)

    def key_values(self, states: Float[Array, "B C N H"], layers: Sequence[int]) -> Float[Array, "B C N F"]:
        """Returns keys, not rotated, and values of `layers` from the states of the layers before them, F = 2 G E."""
        return self.decoder.key_values(states, layers)


@dataclasses.dataclass(frozen=True)
class TextConfig(DecoderSizes):
    """Sizes of a text-only language model."""

    decoder: DecoderConfig

    def build(self, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> LanguageModel:
        """Makes the network with random parameters."""
        return LanguageModel(self, param_dtype=param_dtype, rngs=rngs)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, has_head: bool = True) -> "TextConfig":
        """Reads a `config.json`; `has_head` decides about tied embeddings where the file is silent.

        Raises ValueError, naming key and value, for what is not supported.
        """
        tied = config.get("tie_word_embeddings")
        if tied is None:
            tied = config.get("model_type") == "gemma3_text" or not has_head
        return cls(decoder_config(config, tie_embeddings=bool(tied)))

    @classmethod
    def llama3_1_8b(cls) -> "TextConfig":
        """Llama 3.1 8B."""
        return cls(
            DecoderConfig(
                128256, 4096, 32, 32, 8, 128, 14336, max_positions=131072, rms_eps=1e-5, rope_theta=5e5,
                rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192), attention_bias=False,
            )
        )  # fmt: skip

    @classmethod
    def gemma3_4b(cls) -> "TextConfig":
        """Language model of Gemma 3 4B."""
        return cls(_gemma3(2560, 34, 8, 4, 256, 10240))

    @classmethod
    def gemma3_12b(cls) -> "TextConfig":
        """Language model of Gemma 3 12B."""
        return cls(_gemma3(3840, 48, 16, 8, 256, 15360))

    @classmethod
    def gemma3_27b(cls) -> "TextConfig":
        """Language model of Gemma 3 27B, whose scores are scaled by the width per head, not by the head's own."""
        return cls(_gemma3(5376, 62, 32, 16, 128, 21504, query_scalar=168))


def _gemma3(
    hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, ffn: int, *, query_scalar: int = 256
) -> DecoderConfig:
    text = {
        "model_type": "gemma3_text", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": ffn, "sliding_window": 1024,
        "query_pre_attn_scalar": query_scalar, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }  # fmt: skip
    return decoder_config(text, tie_embeddings=True)
