"""What is compiled for a run: making the state, taking a step, and emptying the running sums."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.optimizer import make_optimizer
from unifusion_jax.training.rng import stream_key
from unifusion_jax.training.state import TrainState, create_state, state_shardings
from unifusion_jax.training.step import compiled_train_step, reset_metrics
from unifusion_jax.training.task import Objective


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled functions of a run, and what they work on.

    Attributes:
      mesh: the devices.
      tx: the optimizer.
      make: makes the state of step 0 from a key; not compiled.
      abstract: shapes of the state.
      shardings: where its arrays lie.
      step: (state, frozen, batch, static) -> (state, measures), see `step.make_train_step`; consumes the state.
      reset: state -> the state with its running sums at zero; consumes the state.
    """

    mesh: Mesh
    tx: optax.GradientTransformation
    make: Callable[[Key[Array, ""]], TrainState]
    abstract: TrainState
    shardings: TrainState
    step: Callable[[TrainState, Any, Any, Any], tuple[TrainState, jax.Array]]
    reset: Callable[[TrainState], TrainState]

    def first_state(self, seed: int) -> TrainState:
        """Makes the state of step 0, each device its own part."""
        return jax.jit(self.make, out_shardings=self.shardings)(stream_key(seed, "init"))

    def placed(self) -> TrainState:
        """Returns shapes with shardings, which a checkpoint is restored into."""
        return jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), self.abstract, self.shardings
        )


def make_program(task: Objective, config: TrainConfig, mesh: Mesh) -> Program:
    """Prepares the functions of a run. Nothing is compiled before it is called."""
    tx = make_optimizer(config.optimizer, config.total_steps)
    names = ["loss", "grad_norm", *task.metric_names]

    def make(key: Key[Array, ""]) -> TrainState:
        return create_state(task.init(key), tx, config.ema_decay > 0, names)

    abstract = jax.eval_shape(make, stream_key(config.seed, "init"))
    shardings: Any = state_shardings(abstract, task.param_shardings, mesh)
    reset = jax.jit(reset_metrics, donate_argnums=0, out_shardings=shardings)
    return Program(mesh, tx, make, abstract, shardings, compiled_train_step(task, tx, config, shardings), reset)
