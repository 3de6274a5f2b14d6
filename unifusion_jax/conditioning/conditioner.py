"""From layer states to condition tokens: pooling, refining and projecting, as one module with one signature."""

import dataclasses
import difflib
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from unifusion_jax.conditioning.lap import LAP, LAPConfig
from unifusion_jax.conditioning.refiner import Refiner, RefinerConfig
from unifusion_jax.layers import Remat, linear

STRATEGIES = ("lap",)


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """How the encoder's layer states become the DiT's condition tokens.

    Attributes:
      strategy: "lap" is the paper's model.
      lap_blocks: transformer blocks over the layer axis.
      lap_heads: their attention heads.
      lap_ffn_ratio: their feed-forward width over the encoder's width.
      layer_embedding: a learned vector per layer at LAP's input.
      refiner_blocks: bidirectional blocks; 0 turns the refiner off.
      refiner_heads: their attention heads.
      refiner_ffn_ratio: their feed-forward width over the width they work in.
      refiner_position: "after_lap" (paper, section 4) or "before_lap" (section 3), where the refiner sees every layer's
        sequence at the encoder's width.
    """

    strategy: str = "lap"
    lap_blocks: int = 2
    lap_heads: int = 28
    lap_ffn_ratio: float = 2.0
    layer_embedding: bool = True
    refiner_blocks: int = 2
    refiner_heads: int = 32
    refiner_ffn_ratio: float = 2.0
    refiner_position: str = "after_lap"

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            near = difflib.get_close_matches(self.strategy, STRATEGIES, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"conditioning.strategy must be one of {list(STRATEGIES)}, got {self.strategy!r}.{hint}")
        if self.refiner_position not in ("after_lap", "before_lap"):
            raise ValueError(
                f"conditioning.refiner_position must be 'after_lap' or 'before_lap', got {self.refiner_position!r}."
            )

    def lap(self, num_layers: int, encoder_size: int) -> LAPConfig:
        """Sizes of LAP for an encoder that exports `num_layers` states of width `encoder_size`."""
        return LAPConfig(
            num_layers,
            encoder_size,
            self.lap_heads,
            _round_to(encoder_size * self.lap_ffn_ratio, 16),
            self.lap_blocks,
            self.layer_embedding,
        )

    def refiner(self, encoder_size: int, model_size: int) -> RefinerConfig:
        """Sizes of the refiner at the width its position implies."""
        width = model_size if self.refiner_position == "after_lap" else encoder_size
        return RefinerConfig(
            width, self.refiner_heads, _round_to(width * self.refiner_ffn_ratio, 16), self.refiner_blocks
        )


def _round_to(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


class LAPConditioner(nnx.Module):
    """LAP, the refiner and the projection to the DiT's width (paper, figure 1)."""

    def __init__(
        self,
        config: ConditioningConfig,
        *,
        num_layers: int,
        encoder_size: int,
        model_size: int,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.lap = LAP(config.lap(num_layers, encoder_size), **options)
        self.project = linear(encoder_size, model_size, ("embed", "embed_out"), bias=True, **options)
        self.refiner = (
            Refiner(config.refiner(encoder_size, model_size), **options) if config.refiner_blocks else nnx.data(None)
        )

    def __call__(
        self, states: Float[Array, "B C N H"], mask: Bool[Array, "B C"], *, remat: Remat | None = None
    ) -> Float[Array, "B C D"]:
        """Returns condition tokens at the DiT's width."""
        batch, tokens, layers, width = states.shape
        if self.refiner is not None and self.config.refiner_position == "before_lap":
            # Every layer is a sequence of its own here, normalised as LAP would so that no layer's scale dominates.
            rows = self.lap.norm(states).swapaxes(1, 2).reshape(batch * layers, tokens, width)
            rows = self.refiner(rows, jnp.repeat(mask, layers, axis=0), remat=remat)
            states = rows.reshape(batch, layers, tokens, width).swapaxes(1, 2)
        x = self.project(self.lap(states, remat=remat))
        if self.refiner is not None and self.config.refiner_position == "after_lap":
            x = self.refiner(x, mask, remat=remat)
        return x
