"""What goes into an encoder and what comes out, as pytrees.

Letters: B batch, S tokens, C kept tokens, N exported layers, H encoder width, T tiles.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from unifusion_jax.layers import AnyArray as AnyArray
from unifusion_jax.layers import pytree as pytree


@pytree
@dataclasses.dataclass(frozen=True)
class EncoderBatch:
    """Prompts as token ids and image tiles, padded to one length.

    Attributes:
      token_ids: int32.
      mask: which tokens exist. Padding may stand on either side; positions count existing tokens only.
      is_image: image tokens. Those of a row, in order, are the tokens of its tiles, in order.
      keep: tokens whose states condition the image generator: image tokens and the words chosen by `Prompt.target`.
      pixels: normalised tiles, rows padded with zero tiles; None for a batch without images.
      is_target: the assistant's answer with its closing token, where training gives one; else None or all False.
      grid: number of its image, row and column of each tile, -1 where there is none, for models whose tiles need them.
    """

    token_ids: Int[AnyArray, "B S"]
    mask: Bool[AnyArray, "B S"]
    is_image: Bool[AnyArray, "B S"]
    keep: Bool[AnyArray, "B S"]
    pixels: Float[AnyArray, "B T h w 3"] | None = None
    is_target: Bool[AnyArray, "B S"] | None = None
    grid: Int[AnyArray, "B T 3"] | None = None

    @classmethod
    def from_tokens(cls, token_ids: Any, mask: Any = None) -> "EncoderBatch":
        """Makes a text-only batch from token ids [B, S] and a mask [B, S] (all by default); all tokens are kept."""
        token_ids = np.asarray(token_ids)
        mask = np.ones(token_ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)
        if token_ids.ndim != 2 or mask.shape != token_ids.shape or not np.issubdtype(token_ids.dtype, np.integer):
            raise ValueError(
                "Expected integer token ids [B, S] and a mask of the same shape, got "
                f"{token_ids.dtype} {token_ids.shape} and {mask.shape}."
            )
        return cls(token_ids.astype(np.int32), mask, np.zeros_like(mask), mask)

    def max_kept(self) -> int:
        """Returns the largest number of kept tokens in a row (host only), at least 1."""
        return max(1, int(np.max(np.sum(np.asarray(self.keep & self.mask), axis=1), initial=0)))


@pytree
@dataclasses.dataclass(frozen=True)
class LayerStates:
    """States of the kept tokens of each row, moved together to the left in their order.

    Attributes:
      states: residual stream after each exported layer; zero where `mask` is False.
      mask: which places hold a token.
      is_image: which of them are image tokens.
    """

    states: Float[AnyArray, "B C N H"]
    mask: Bool[AnyArray, "B C"]
    is_image: Bool[AnyArray, "B C"]
