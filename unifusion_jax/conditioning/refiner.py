"""The bidirectional refiner: transformer blocks over the sequence that undo the position bias of causal attention."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from unifusion_jax.dit.blocks import Block
from unifusion_jax.dit.rope import RopeConfig, rope_table, sequence_positions
from unifusion_jax.layers import Remat, Stack
from unifusion_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class RefinerConfig:
    """Sizes of the refiner (paper, section 3 "Position Bias" and appendix A.1.2).

    Attributes:
      hidden_size: width of the sequence.
      num_heads: attention heads.
      ffn_size: width of the SwiGLU layers.
      num_blocks: blocks; the paper has two, 0 turns the refiner off.
    """

    hidden_size: int
    num_heads: int
    ffn_size: int
    num_blocks: int = 2

    def __post_init__(self):
        if self.num_blocks < 0:
            raise ValueError(f"refiner num_blocks must be 0 or more, got {self.num_blocks}.")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"refiner width {self.hidden_size} is not a multiple of num_heads {self.num_heads}.")

    @property
    def rope(self) -> RopeConfig:
        """Rotary embedding over the token index, laid out as in the DiT."""
        return RopeConfig.for_head_dim(self.hidden_size // self.num_heads)


class Refiner(nnx.Module):
    """Bidirectional transformer blocks over the condition tokens; padding is never attended to."""

    def __init__(
        self, config: RefinerConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        self.blocks = Stack(
            lambda rngs: Block(
                config.hidden_size, config.num_heads, config.ffn_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            ),
            config.num_blocks,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B C D"], mask: Bool[Array, "B C"], *, remat: Remat | None = None
    ) -> Float[Array, "B C D"]:
        """Returns refined tokens; rows at masked positions carry no meaning."""
        rope = rope_table(sequence_positions(x.shape[1]), self.config.rope)

        def run(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return constrain(block(x, mask=mask, rope=rope), "batch", "length", None), None

        return self.blocks.scan(run, constrain(x, "batch", "length", None), remat=remat)[0]
