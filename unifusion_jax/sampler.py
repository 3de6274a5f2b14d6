"""The compiled parts of sampling: condition and noise first, then any stretch of the solver's steps.

Settings (steps, guidance, the stretch) are values, so a model is compiled once for each number of pictures, size and length of
the condition. The functions stand outside of the model's class: models of one configuration share what is compiled.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from unifusion_jax import weights
from unifusion_jax.dit import Condition
from unifusion_jax.encoders.batch import LayerStates
from unifusion_jax.flow import SamplingConfig, guided, integrate, is_first
from unifusion_jax.model import ModelConfig, UniFusionModel

# Lengths are padded to a multiple of this, so that few are compiled.
STEP_TOKENS = 32


def round_up(tokens: int) -> int:
    """Returns the next multiple of `STEP_TOKENS`, at least one."""
    return max(1, -(-tokens // STEP_TOKENS)) * STEP_TOKENS


def padded(states: LayerStates, tokens: int) -> LayerStates:
    """Returns the states on the host, with room for `tokens` tokens a row; what does not fit must be padding."""

    def fit(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)[:, :tokens]
        return np.pad(leaf, [(0, 0), (0, tokens - leaf.shape[1])] + [(0, 0)] * (leaf.ndim - 2))

    return jax.tree.map(fit, states)


def joined(parts: Sequence[tuple[Sequence[int], LayerStates]]) -> LayerStates:
    """Puts the rows of several batches into one.

    Args:
      parts: for each batch, the numbers that its rows have in the whole, and its states.
    """
    if len(parts) == 1:
        return parts[0][1]
    tokens = max(states.mask.shape[1] for _, states in parts)
    order = np.argsort(np.concatenate([np.asarray(numbers, int) for numbers, _ in parts]))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *(padded(states, tokens) for _, states in parts))


@functools.cache
def _graphdef(config: ModelConfig) -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: UniFusionModel(config, rngs=nnx.Rngs(0))))


def module(config: ModelConfig, params: weights.Params) -> UniFusionModel:
    """Returns the trained stack around these parameters, for compiled code or to look into."""
    return nnx.merge(_graphdef(config), params)


@functools.partial(jax.jit, static_argnames=("model", "cells"))
def begin(
    params: weights.Params,
    states: tuple[LayerStates, ...],
    keys: Key[Array, " B"],
    *,
    model: ModelConfig,
    cells: tuple[int, int],
) -> tuple[Float[Array, "B h w c"], tuple[Condition, ...]]:
    """Returns the initial noise of every picture, and the condition of every row of the states.

    Args:
      params: of the trained stack.
      states: one condition, or two to switch between, of equal shapes.
      keys: of the noise, one a picture; several pictures may share a row of the states.
      model: sizes of the stack.
      cells: height and width of the latents.
    """
    stack = module(model, params)
    conditions = [stack.condition(jnp.asarray(each.states, jnp.float32), jnp.asarray(each.mask)) for each in states]
    shape = (*cells, model.dit.latent_channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys), tuple(conditions)


@functools.partial(jax.jit, static_argnames="model")
def denoise(
    params: weights.Params,
    latents: Float[Array, "B h w c"],
    conditions: tuple[Condition, ...],
    sampling: SamplingConfig,
    start: int | Int[Array, ""],
    stop: int | Int[Array, ""],
    *,
    model: ModelConfig,
) -> Float[Array, "B h w c"]:
    """Runs the solver from step `start` to before step `stop`; see `begin` for the rest."""
    stack = module(model, params)
    null = stack.null_condition(conditions[0].short())

    def conditional(x: Float[Array, "B h w c"], t: Float[Array, " B"]) -> Float[Array, "B h w c"]:
        condition = conditions[0]
        if len(conditions) > 1:
            first = is_first(t, sampling)
            condition = jax.tree.map(lambda one, other: jnp.where(first, one, other), *conditions)
        return stack.velocity(x, t, condition)

    def unconditional(x: Float[Array, "B h w c"], t: Float[Array, " B"]) -> Float[Array, "B h w c"]:
        return stack.velocity(x, t, null)

    return integrate(guided(conditional, unconditional, sampling), latents, sampling, start=start, stop=stop)
