"""What every frozen encoder offers to `Encoder`: sizes, and the states of a batch; and the network of text-only models.

A family with pictures derives from `LanguageModel` and gives its image features, and where it needs them other rotary
positions or image blocks that attend in both directions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from unifusion_jax import layers as nn
from unifusion_jax.encoders.batch import EncoderBatch
from unifusion_jax.encoders.decoder import Decoder, DecoderConfig, Positions, token_positions


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


@dataclasses.dataclass(frozen=True)
class TextConfig(DecoderSizes):
    """Sizes of a text-only language model."""

    decoder: DecoderConfig

    def build(self, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> LanguageModel:
        """Makes the network with random parameters."""
        return LanguageModel(self, param_dtype=param_dtype, rngs=rngs)
