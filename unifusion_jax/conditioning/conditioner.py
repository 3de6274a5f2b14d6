"""From layer states to what the DiT is told: one module with one signature, a class for each strategy."""

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from unifusion_jax.conditioning.config import ConditioningConfig
from unifusion_jax.conditioning.lap import LAP
from unifusion_jax.conditioning.refiner import Refiner
from unifusion_jax.dit.condition import Condition
from unifusion_jax.dit.transformer import DiTConfig
from unifusion_jax.layers import Remat, RMSNorm, linear, rms_normalised


class Conditioner(nnx.Module):
    """What all strategies share: the refiner, before or behind what a strategy makes of the states in `made`.

    Args:
      config: of the strategy.
      num_layers: exported encoder layers.
      encoder_size: length of what is exported of a layer.
      dit: sizes of the DiT.
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: of their initial values.
    """

    def __init__(
        self,
        config: ConditioningConfig,
        *,
        num_layers: int,
        encoder_size: int,
        dit: DiTConfig,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.build(num_layers, encoder_size, dit, **options)
        # Made last: the order of modules decides which random numbers each begins with.
        self.refiner = (
            Refiner(config.refiner(encoder_size, dit.hidden_size), **options) if config.refines else nnx.data(None)
        )

    @abc.abstractmethod
    def build(self, num_layers: int, encoder_size: int, dit: DiTConfig, *, rngs: nnx.Rngs, **options: Any) -> None:
        """Makes the strategy's own modules; `options` are dtype and param_dtype."""

    def normalised(self, states: Float[Array, "B C N H"]) -> Float[Array, "B C N H"]:
        """Returns the states as a refiner before this strategy sees them, no layer's scale dominating."""
        return rms_normalised(states, eps=1e-6).astype(states.dtype)

    @abc.abstractmethod
    def made(self, states: Float[Array, "B C N H"], mask: Bool[Array, "B C"], *, remat: Remat | None) -> Condition:
        """Makes the condition of the states; the strategy itself."""

    def __call__(
        self, states: Float[Array, "B C N H"], mask: Bool[Array, "B C"], *, remat: Remat | None = None
    ) -> Condition:
        """Returns the condition of a batch of exported states, in the compute dtype."""
        batch, tokens, layers, width = states.shape
        if self.refiner is not None and self.config.refiner_position == "before_lap":
            # Every layer is a sequence of its own here.
            rows = self.normalised(states).swapaxes(1, 2).reshape(batch * layers, tokens, width)
            rows = self.refiner(rows, jnp.repeat(mask, layers, axis=0), remat=remat)
            states = rows.reshape(batch, layers, tokens, width).swapaxes(1, 2)
        condition = self.made(states, mask, remat=remat)
        if self.refiner is not None and self.config.refiner_position == "after_lap":
            refined = self.refiner(condition.tokens, condition.mask, remat=remat)
            condition = dataclasses.replace(condition, tokens=refined)
        return condition


class LAPConditioner(Conditioner):
    """LAP, the refiner and the projection to the DiT's width (paper, figure 1)."""

    def build(self, num_layers: int, encoder_size: int, dit: DiTConfig, *, rngs: nnx.Rngs, **options: Any) -> None:
        """Makes the pooling and the map to the DiT's width."""
        self.lap = LAP(self.config.lap(num_layers, encoder_size), rngs=rngs, **options)
        self.project = linear(encoder_size, dit.hidden_size, ("embed", "embed_out"), bias=True, rngs=rngs, **options)

    def normalised(self, states: Float[Array, "B C N H"]) -> Float[Array, "B C N H"]:
        """Returns the states normalised as LAP does."""
        return self.lap.norm(states)

    def made(self, states: Float[Array, "B C N H"], mask: Bool[Array, "B C"], *, remat: Remat | None) -> Condition:
        """Pools the layers of each token."""
        return Condition(self.project(self.lap(states, remat=remat)), mask)


class LayerConditioner(Conditioner):
    """One layer as a drop-in replacement of a text encoder's output (paper, section 2.1; the T5 baseline).

    The encoder has applied its own final norm where the layer is the last. The norm here gives any layer unit scale, with a
    learned weight for each channel.
    """

    def build(self, num_layers: int, encoder_size: int, dit: DiTConfig, *, rngs: nnx.Rngs, **options: Any) -> None:
        """Makes the norm and the map to the DiT's width."""
        self.dtype = options["dtype"]
        self.norm = RMSNorm(encoder_size, param_dtype=options["param_dtype"])
        self.project = linear(encoder_size, dit.hidden_size, ("embed", "embed_out"), bias=True, rngs=rngs, **options)

    def normalised(self, states: Float[Array, "B C N H"]) -> Float[Array, "B C N H"]:
        """Returns the states after the norm."""
        return self.norm(states)

    def made(self, states: Float[Array, "B C N H"], mask: Bool[Array, "B C"], *, remat: Remat | None) -> Condition:
        """Normalises and projects the one layer."""
        return Condition(self.project(self.norm(states[:, :, 0].astype(self.dtype))), mask)
