"""From layer states to what the DiT is told: one module with one signature, a class for each strategy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from unifusion_jax.conditioning.config import ConditioningConfig
from unifusion_jax.conditioning.lap import LAP
from unifusion_jax.conditioning.refiner import Refiner
from unifusion_jax.dit.condition import Condition
from unifusion_jax.dit.transformer import DiTConfig
from unifusion_jax.layers import Remat, RMSNorm, linear


class Conditioner(nnx.Module):
    """What all strategies share: the refiner, before or behind what a strategy makes of the states in `made`."""

    config: ConditioningConfig
    refiner: Any

    def _add_refiner(self, config: ConditioningConfig, encoder_size: int, dit: DiTConfig, **options: Any) -> None:
        """Called last by constructors."""
        self.config = config
        self.refiner = (
            Refiner(config.refiner(encoder_size, dit.hidden_size), **options) if config.refines else nnx.data(None)
        )

    def normalised(self, states: Float[Array, "B C N H"]) -> Float[Array, "B C N H"]:
        """Returns the states as a refiner before this strategy sees them, no layer's scale dominating."""
        wide = states.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)).astype(states.dtype)

    def made(self, states: Float[Array, "B C N H"], mask: Bool[Array, "B C"], *, remat: Remat | None) -> Condition:
        """Makes the condition of the states; the strategy itself."""
        raise NotImplementedError

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
        self.lap = LAP(config.lap(num_layers, encoder_size), **options)
        self.project = linear(encoder_size, dit.hidden_size, ("embed", "embed_out"), bias=True, **options)
        self._add_refiner(config, encoder_size, dit, **options)

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
        self.dtype = dtype
        self.norm = RMSNorm(encoder_size, param_dtype=param_dtype)
        self.project = linear(encoder_size, dit.hidden_size, ("embed", "embed_out"), bias=True, **options)
        self._add_refiner(config, encoder_size, dit, **options)

    def normalised(self, states: Float[Array, "B C N H"]) -> Float[Array, "B C N H"]:
        """Returns the states after the norm."""
        return self.norm(states)

    def made(self, states: Float[Array, "B C N H"], mask: Bool[Array, "B C"], *, remat: Remat | None) -> Condition:
        """Normalises and projects the one layer."""
        return Condition(self.project(self.norm(states[:, :, 0].astype(self.dtype))), mask)
