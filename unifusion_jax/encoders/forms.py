"""What is exported of a layer: its states, the same after the final norm, or its attention's keys and values."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from unifusion_jax.encoders.batch import LayerStates

Form = Literal["states", "final_norm", "key_values"]


def exported_size(config: Any, form: Form) -> int:
    """Length of what an encoder of these sizes exports of one layer of one token."""
    heads, head_dim = config.key_value_shape
    return 2 * heads * head_dim if form == "key_values" else config.hidden_size


def sources(layers: tuple[int, ...], form: Form) -> tuple[int, ...]:
    """The layers whose states are needed: a block makes its keys and values of the state before it."""
    return tuple(layer - 1 for layer in layers) if form == "key_values" else layers


def formed(model: Any, states: LayerStates, layers: tuple[int, ...], form: Form) -> LayerStates:
    """Turns the states of `sources` into what is exported of `layers`."""
    if form == "states":
        return states
    made = model.final_norm(states.states) if form == "final_norm" else model.key_values(states.states, layers)
    return dataclasses.replace(states, states=jnp.where(states.mask[:, :, None, None], made, 0))
