"""One optimizer step as a pure function over pytrees."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from unifusion_jax.training.rng import stream_key
from unifusion_jax.training.state import Params, TrainState

Sums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
LossFunction = Callable[[Params, Any, Any, Key[Array, ""], Any], tuple[Float[Array, ""], Sums]]


def make_train_step(
    loss: LossFunction, tx: optax.GradientTransformation, *, ema_decay: float, seed: int
) -> Callable[[TrainState, Any, Any, Any], TrainState]:
    """Returns `step(state, frozen, batch, static) -> state`, to be compiled with `static` static.

    `loss(params, frozen, batch, key, static)` returns the scalar to descend and metrics as (sum, weight) pairs. The loss, the
    gradient norm and the metrics are added to the state's running sums; nothing is sent to the host.
    """

    def train_step(state: TrainState, frozen: Any, batch: Any, static: Any) -> TrainState:
        key = stream_key(seed, "train", state.step)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, key, static)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        one = jnp.ones(())
        metrics = {"loss": (value, one), "grad_norm": (optax.global_norm(grads), one), **metrics}
        return TrainState(
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

    return train_step


def _average(ema: Params, params: Params, decay: float, step: Int[Array, ""]) -> Params:
    """Moves the average towards the parameters; early on it follows faster, so that it forgets the initial weights."""
    rate = 1 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda average, value: average + rate * (value - average), ema, params)


def reset_metrics(state: TrainState) -> TrainState:
    """Returns the state with its running sums at zero."""
    return TrainState(state.step, state.params, state.ema, state.opt_state, jax.tree.map(jnp.zeros_like, state.metrics))
