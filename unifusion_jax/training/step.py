"""One optimizer step as a pure function over pytrees."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.rng import stream_key
from unifusion_jax.training.state import Params, TrainState
from unifusion_jax.training.task import Objective, Sums

LossFunction = Callable[[Params, Any, Any, Key[Array, ""], Any], tuple[Float[Array, ""], Sums]]


def make_train_step(
    loss: LossFunction, tx: optax.GradientTransformation, *, ema_decay: float, seed: int
) -> Callable[[TrainState, Any, Any, Any], tuple[TrainState, Float[Array, "3"]]]:
    """Returns `step(state, frozen, batch, static) -> (state, measures)`, to be compiled with `static` static.

    `loss(params, frozen, batch, key, static)` returns the scalar to descend and metrics as (sum, weight) pairs. The loss, the
    gradient norm and the metrics are added to the state's running sums; nothing is sent to the host. The measures are those of
    `health.MEASURES`: where one is not finite, the step is counted and changes nothing else.
    """

    def train_step(state: TrainState, frozen: Any, batch: Any, static: Any) -> tuple[TrainState, Float[Array, "3"]]:
        key = stream_key(seed, "train", state.step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key, static)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        one, grad_norm = jnp.ones(()), optax.global_norm(grads)
        metrics = {"loss": (value, one), "grad_norm": (grad_norm, one), **metrics}
        done = TrainState(
            step=state.step + 1,
            params=params,
            ema=_average(state.ema, params, ema_decay, state.step) if state.ema else {},
            opt_state=opt_state,
            metrics=state.metrics
            | {
                name: state.metrics[name] + jnp.stack([jnp.asarray(part, jnp.float32) for part in pair])
                for name, pair in metrics.items()
            },
        )
        measures = jnp.stack([value, grad_norm, optax.global_norm(updates)]).astype(jnp.float32)
        return _unless_harmful(done, state, measures), measures

    return train_step


def compiled_train_step(task: Objective, tx: optax.GradientTransformation, config: TrainConfig, shardings: Any) -> Any:
    """Returns `make_train_step`'s function under jit: `static` is static, the state is donated and stays where it lies."""
    step = make_train_step(task.loss, tx, ema_decay=config.ema_decay, seed=config.seed)
    return jax.jit(step, static_argnums=3, donate_argnums=0, out_shardings=(shardings, shardings.step))


def _unless_harmful(done: TrainState, before: TrainState, measures: Float[Array, "3"]) -> TrainState:
    """Returns the state after a step, or, where NaN or infinity came up, the one before with the step counted."""
    finite = jnp.isfinite(measures).all()
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), done, before)
    return dataclasses.replace(kept, step=done.step)


def _average(ema: Params, params: Params, decay: float, step: Int[Array, ""]) -> Params:
    """Moves the average towards the parameters; early on it follows faster, so that it forgets the initial weights."""
    rate = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, value: average + rate * (value - average), ema, params)


def reset_metrics(state: TrainState) -> TrainState:
    """Returns the state with its running sums at zero."""
    return TrainState(state.step, state.params, state.ema, state.opt_state, jax.tree.map(jnp.zeros_like, state.metrics))
