"""One optimizer step as a pure function over pytrees."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.rng import stream_key
from unifusion_jax.training.state import Params, TrainState
from unifusion_jax.training.task import Objective, Sums


def make_train_step(
    task: Objective, tx: optax.GradientTransformation, config: TrainConfig
) -> Callable[[TrainState, Any, Any, Any], tuple[TrainState, Float[Array, "3"]]]:
    """Returns `step(state, frozen, batch, static) -> (state, measures)`, to be compiled with `static` static.

    The task's loss, its metrics and the gradient norm are added to the state's running sums; nothing is sent to the host. The
    measures are those of `health.MEASURES`: where one is not finite, the step is counted and changes nothing else.
    """

    def train_step(state: TrainState, frozen: Any, batch: Any, static: Any) -> tuple[TrainState, Float[Array, "3"]]:
        key = stream_key(config.seed, "train", state.step)
        draws = task.draw(batch, key, static)

        def gradients(batch: Any, draws: Any) -> tuple[tuple[Float[Array, ""], Sums], Params]:
            return jax.value_and_grad(task.loss, has_aux=True)(state.params, frozen, batch, draws, static)

        if config.accumulate_steps == 1:
            (value, metrics), grads = gradients(batch, draws)
        else:
            (value, metrics), grads = _accumulated(gradients, batch, draws, config.accumulate_steps)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        one, grad_norm = jnp.ones(()), optax.global_norm(grads)
        metrics = {"loss": (value, one), "grad_norm": (grad_norm, one), **metrics}
        done = TrainState(
            step=state.step + 1,
            params=params,
            ema=_average(state.ema, params, config.ema_decay, state.step) if state.ema else {},
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
    step = make_train_step(task, tx, config)
    return jax.jit(step, static_argnums=3, donate_argnums=0, out_shardings=(shardings, shardings.step))


def _unless_harmful(done: TrainState, before: TrainState, measures: Float[Array, "3"]) -> TrainState:
    """Returns the state after a step, or, where NaN or infinity came up, the one before with the step counted."""
    finite = jnp.isfinite(measures).all()
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), done, before)
    return dataclasses.replace(kept, step=done.step)


def _accumulated(gradients: Callable[[Any, Any], Any], batch: Any, draws: Any, parts: int) -> Any:
    """Adds up loss, metrics and gradients of equal parts of a batch; loss and gradients are then those of the batch.

    Part i takes every so-manieth row from row i on, so that each device works on a part of its own rows.
    """

    def cut(leaf: Any) -> jax.Array:
        rows = jnp.asarray(leaf).reshape(-1, parts, *leaf.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    def add(total: Any, part: tuple[Any, Any]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(*part)), None

    cuts = jax.tree.map(cut, (batch, draws))
    shapes = jax.eval_shape(gradients, *jax.tree.map(lambda leaf: leaf[0], cuts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((value, metrics), grads), _ = jax.lax.scan(add, zeros, cuts)
    value, grads = jax.tree.map(lambda leaf: leaf / parts, (value, grads))
    return (value, metrics), grads


def _average(ema: Params, params: Params, decay: float, step: Int[Array, ""]) -> Params:
    """Moves the average towards the parameters; early on it follows faster, so that it forgets the initial weights."""
    rate = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, value: average + rate * (value - average), ema, params)


def reset_metrics(state: TrainState) -> TrainState:
    """Returns the state with its running sums at zero."""
    return TrainState(state.step, state.params, state.ema, state.opt_state, jax.tree.map(jnp.zeros_like, state.metrics))
