"""What the DiT is told, whatever strategy made it: tokens of the input sequence, and what single blocks get besides."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from unifusion_jax.layers import AnyArray, pytree


@pytree
@dataclasses.dataclass(frozen=True)
class BlockCondition:
    """What blocks get of a condition; with a leading axis over blocks when it is handed to the scan.

    Attributes:
      added: added to the condition tokens that enter the block.
      key: keys, rotated and normalised, that all tokens attend to besides those of the sequence; A heads.
      value: their values.
    """

    added: Float[AnyArray, "*layers B C D"] | None = None
    key: Float[AnyArray, "*layers B K A E"] | None = None
    value: Float[AnyArray, "*layers B K A E"] | None = None


@pytree
@dataclasses.dataclass(frozen=True)
class Condition:
    """The condition of a batch. Every array has the batch first, so that rows can be chosen, repeated and sharded.

    Attributes:
      tokens: condition tokens of the input sequence; C = 0 where a strategy puts none there.
      mask: which of them exist.
      added: added to the condition tokens that enter each block; for the first block zero, its input are the tokens.
      key: keys that each block attends to besides those of its sequence, normalised and rotated; A heads as in the DiT.
      value: their values.
      kv_mask: which of these keys exist.
    """

    tokens: Float[AnyArray, "B C D"]
    mask: Bool[AnyArray, "B C"]
    added: Float[AnyArray, "B layers C D"] | None = None
    key: Float[AnyArray, "B layers K A E"] | None = None
    value: Float[AnyArray, "B layers K A E"] | None = None
    kv_mask: Bool[AnyArray, "B K"] | None = None

    def by_block(self) -> BlockCondition:
        """Returns what blocks get, the axis over blocks first."""
        parts = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (self.added, self.key, self.value))
        return BlockCondition(*parts)

    def where(self, rows: Bool[AnyArray, " B"], other: "Condition") -> "Condition":
        """Returns `other` in the marked rows and this condition in the rest; both hold the same parts."""

        def choose(mine: jax.Array, theirs: jax.Array) -> jax.Array:
            marked = jnp.reshape(rows, (-1, *(1,) * (mine.ndim - 1)))
            return jnp.where(marked, theirs.astype(mine.dtype), mine)

        return jax.tree.map(choose, self, other)

    def short(self) -> "Condition":
        """Returns the first token, and the first of the keys, of a condition: room enough for the null condition.

        Whatever stands behind them is masked there, so that it would only cost time.
        """
        added, key, value = (None if leaf is None else leaf[:, :, :1] for leaf in (self.added, self.key, self.value))
        kv_mask = None if self.kv_mask is None else self.kv_mask[:, :1]
        return Condition(self.tokens[:, :1], self.mask[:, :1], added, key, value, kv_mask)
