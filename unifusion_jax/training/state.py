"""What training changes: parameters, their average, the optimizer, the step and running metric sums."""

import dataclasses
import itertools
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
    """Returns a `TrainState` of shardings: what belongs to a parameter is sharded like it, the rest is replicated.

    A leaf of the optimizer state belongs to the parameter that has its shape and whose path its own path ends in. Moments
    do; the counts, and the gaps where an optimizer treats some parameters otherwise, do not.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    leaves = jax.tree_util.tree_leaves_with_path(abstract.params)
    of_param = {
        _last_names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(param_shardings), strict=True)
    }

    def place(path: Any, leaf: Any) -> NamedSharding:
        shape, sharding = of_param.get(_last_names(path), (None, replicated))
        return sharding if shape == leaf.shape else replicated

    placed: dict[str, Any] = {
        "step": replicated,
        "params": param_shardings,
        "ema": param_shardings if abstract.ema else {},
        "opt_state": jax.tree_util.tree_map_with_path(place, abstract.opt_state),
        "metrics": jax.tree.map(lambda _: replicated, abstract.metrics),
    }
    return TrainState(**placed)


def _last_names(path: Any) -> tuple[str, ...]:
    """The run of dict keys at the end of a tree path: a parameter's path, wherever its tree hangs."""
    keys = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    return tuple(key.key for key in keys)[::-1]
