"""Hidden state injection: every DiT block gets condition tokens of its own, added to those of the stream."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from unifusion_jax.conditioning.conditioner import Conditioner
from unifusion_jax.conditioning.lap import LAP, LAPConfig
from unifusion_jax.dit.condition import Condition
from unifusion_jax.dit.transformer import DiTConfig
from unifusion_jax.layers import Remat, RMSNorm, Stack, linear


def injected(by_block: Float[Array, "layers B C D"], mask: Bool[Array, "B C"]) -> Condition:
    """Makes a condition of one sequence a block.

    The first is the input; each later one is added behind the block before its own, where the stream enters the block. Behind
    the last block nothing is added: only latent tokens are read there.
    """
    added = by_block.at[0].set(0)
    return Condition(by_block[0], mask, added=jnp.moveaxis(added, 0, 1))


class InjectedLayer(nnx.Module):
    """Norm and, where asked for, a map to the DiT's width, of one encoder layer."""

    def __init__(self, encoder_size: int, model_size: int, *, maps: bool, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        self.norm = RMSNorm(encoder_size, param_dtype=param_dtype)
        axes = ("embed", "embed_out")
        self.project = (
            linear(encoder_size, model_size, axes, bias=True, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            if maps
            else nnx.data(None)
        )

    def __call__(self, x: Float[Array, "B C H"]) -> Float[Array, "B C D"]:
        """Returns what is added to the stream."""
        x = self.norm(x.astype(self.dtype))
        return x if self.project is None else self.project(x)


class HiddenStateInjection(Conditioner):
    """Encoder layer l for DiT block l (paper, section 2.1): the first one as input, the others added to the stream."""

    def build(self, num_layers: int, encoder_size: int, dit: DiTConfig, *, rngs: nnx.Rngs, **options: Any) -> None:
        """Makes a norm, and where asked for a map, for each layer."""
        maps = self.config.learned_maps
        self.layers = Stack(
            lambda rngs: InjectedLayer(encoder_size, dit.hidden_size, maps=maps, rngs=rngs, **options),
            num_layers,
            rngs=rngs,
        )

    def made(self, states: Float[Array, "B C N H"], mask: Bool[Array, "B C"], *, remat: Remat | None) -> Condition:
        """Brings each layer to the stream's scale and width."""
        numbers = range(self.layers.depth)
        return injected(self.layers.chosen(numbers, lambda layer, x: layer(x), jnp.moveaxis(states, 2, 0)), mask)


class PooledLayers(nnx.Module):
    """A LAP and the map to the DiT's width, for one block."""

    def __init__(self, lap: LAPConfig, model_size: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.lap = LAP(lap, **options)
        self.project = linear(lap.encoder_size, model_size, ("embed", "embed_out"), bias=True, **options)

    def __call__(self, states: Float[Array, "B C N H"]) -> Float[Array, "B C D"]:
        """Pools the layers of each token."""
        return self.project(self.lap(states))


class LAPInjection(Conditioner):
    """A LAP for every DiT block (paper, appendix A.1.1): the first pools the input, the others what is added."""

    def build(self, num_layers: int, encoder_size: int, dit: DiTConfig, *, rngs: nnx.Rngs, **options: Any) -> None:
        """Makes a pooling and a map for each block of the DiT."""
        lap = self.config.lap(num_layers, encoder_size)
        self.laps = Stack(
            lambda rngs: PooledLayers(lap, dit.hidden_size, rngs=rngs, **options), dit.num_layers, rngs=rngs
        )

    def made(self, states: Float[Array, "B C N H"], mask: Bool[Array, "B C"], *, remat: Remat | None) -> Condition:
        """Pools once for each block, one after the other: their activations would not fit side by side."""

        def pool(layer: PooledLayers, carry: tuple, _: None) -> tuple[tuple, jax.Array]:
            return carry, layer(states)

        return injected(self.laps.scan(pool, (), remat=remat)[1], mask)
