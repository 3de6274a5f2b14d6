"""Layerwise key-value fusion: DiT block l also attends to the keys and values of encoder layer l."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from unifusion_jax.conditioning.conditioner import Conditioner
from unifusion_jax.dit.blocks import RopeTable
from unifusion_jax.dit.condition import Condition
from unifusion_jax.dit.rope import apply_rope, rope_table, sequence_positions
from unifusion_jax.dit.transformer import DiTConfig
from unifusion_jax.layers import Remat, RMSNorm, Stack, linear


class FusedLayer(nnx.Module):
    """Brings the keys and values of one encoder layer into the attention of one DiT block."""

    def __init__(self, encoder_size: int, dit: DiTConfig, *, maps: bool, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.dit = dit
        self.dtype = dtype
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        half = encoder_size // 2
        self.key = linear(half, dit.hidden_size, ("embed", "heads"), **options) if maps else nnx.data(None)
        self.value = linear(half, dit.hidden_size, ("embed", "heads"), **options) if maps else nnx.data(None)
        self.key_norm = RMSNorm(dit.head_dim, param_dtype=param_dtype)

    def __call__(
        self, x: Float[Array, "B K H"], rope: RopeTable
    ) -> tuple[Float[Array, "B K A E"], Float[Array, "B K A E"]]:
        """Returns keys and values in the DiT's heads; an encoder's key-value head serves several where it has fewer."""
        key, value = jnp.split(x.astype(self.dtype), 2, axis=-1)
        if self.key is not None and self.value is not None:
            key, value = self.key(key), self.value(value)
        key, value = (part.reshape(*x.shape[:2], -1, self.dit.head_dim) for part in (key, value))
        key = apply_rope(self.key_norm(key), rope)
        shared = self.dit.num_heads // key.shape[2]
        return jnp.repeat(key, shared, axis=2), jnp.repeat(value, shared, axis=2)


class KVFusion(Conditioner):
    """Keys and values of encoder layer l beside those of DiT block l (paper, section 2.1; Liu et al. 2024).

    The encoder exports keys as its maps make them, before its rotation. A rotated key carries its place in the chat at the
    encoder's frequencies, and a DiT query, which turns about three axes at other frequencies, would read noise from it. So
    keys get the DiT's own norm of keys and its rotation, at the places that condition tokens have in the input sequence:
    the kept tokens, counted from 1. No tokens enter that sequence, and dropping the condition hides the keys.
    """

    def build(self, num_layers: int, encoder_size: int, dit: DiTConfig, *, rngs: nnx.Rngs, **options: Any) -> None:
        """Makes a norm of keys, and where asked for maps, for each layer."""
        self.dit = dit
        maps = self.config.learned_maps
        self.layers = Stack(
            lambda rngs: FusedLayer(encoder_size, dit, maps=maps, rngs=rngs, **options),
            num_layers,
            rngs=rngs,
        )

    def made(self, states: Float[Array, "B C N H"], mask: Bool[Array, "B C"], *, remat: Remat | None) -> Condition:
        """Brings each layer's keys and values into the DiT's heads."""
        rope = rope_table(sequence_positions(states.shape[1]), self.dit.rope)
        numbers = range(self.layers.depth)
        key, value = self.layers.chosen(numbers, lambda layer, x: layer(x, rope), jnp.moveaxis(states, 2, 0))
        key, value = (jnp.moveaxis(part, 0, 1) for part in (key, value))
        batch = states.shape[0]
        none = jnp.zeros((batch, 0, self.dit.hidden_size), key.dtype)
        return Condition(none, jnp.zeros((batch, 0), bool), key=key, value=value, kv_mask=jnp.asarray(mask))
