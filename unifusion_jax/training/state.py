"""What training changes: parameters, their average, the optimizer, the step and running metric sums."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Params = dict[str, Any]
Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The device-side state of a run, saved as one unit.

    Its leaves may also be shapes, shardings or other stand-ins, so the annotations name no array type.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: float32 parameters.
      ema: their exponential moving average, sharded like them; an empty dict when it is off.
      opt_state: optimizer state.
      metrics: name -> float32 [sum, weight] since the last logged step. Part of the state, so that an interrupted run logs
        the same averages as an uninterrupted one.
    """

    step: Any
    params: Params
    ema: Params
    opt_state: optax.OptState
    metrics: Metrics

    @property
    def inference_params(self) -> Params:
        """The averaged parameters, or the plain ones when averaging is off."""
        return self.ema or self.params


def create_state(
    params: Params, tx: optax.GradientTransformation, use_ema: bool, metric_names: list[str]
) -> TrainState:
    """Makes the state of step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if use_ema else {},
        opt_state=tx.init(params),
        metrics={name: jnp.zeros((2,), jnp.float32) for name in metric_names},
    )


def state_shardings(abstract: TrainState, param_shardings: Params, mesh: Mesh) -> Any:
    """Returns a `TrainState` of shardings: what has the parameters' tree is sharded like them, the rest is replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())
    params_tree = jax.tree.structure(abstract.params)

    def is_params(node: Any) -> bool:
        return jax.tree.structure(node) == params_tree

    def place(node: Any) -> Any:
        return param_shardings if is_params(node) else jax.tree.map(lambda _: replicated, node)

    opt_state = jax.tree.map(place, abstract.opt_state, is_leaf=is_params)
    placed: dict[str, Any] = {
        "step": replicated,
        "params": param_shardings,
        "ema": param_shardings if abstract.ema else {},
        "opt_state": opt_state,
        "metrics": jax.tree.map(lambda _: replicated, abstract.metrics),
    }
    return TrainState(**placed)
