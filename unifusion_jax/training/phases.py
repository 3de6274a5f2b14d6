"""Continuing from another encoder: a run whose encoder and conditioning are swapped while the DiT goes on training.

The paper trains 100k steps with T5 and 150k more with InternVL (appendix A.1.3). Here that is one run: `config.first` says how
it begins, the rest of the config how it goes on.
"""

import dataclasses
from typing import Any

import jax

from unifusion_jax.training.checkpoints import Checkpoints
from unifusion_jax.training.config import FirstPhase, TrainConfig
from unifusion_jax.training.program import Program
from unifusion_jax.training.rng import stream_key
from unifusion_jax.training.state import Params, TrainState, create_state, state_shardings

# The part of the parameters that belongs to an encoder.
_SWAPPED = "conditioner"


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps of a run with one encoder and one conditioning.

    Attributes:
      config: the run's config, with the encoder and conditioning of this phase.
      start: steps that earlier phases do.
      until: its last step.
    """

    config: TrainConfig
    start: int
    until: int


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of a phase's parameters and their shardings, as trees of one structure."""

    params: Params
    shardings: Params


def phases(config: TrainConfig) -> tuple[Phase, ...]:
    """Returns the phases that a run of this config goes through, one or two."""
    swap = config.first.steps
    first = dataclasses.replace(
        config, encoder=config.first.encoder, conditioning=config.first.conditioning, first=FirstPhase()
    )
    found = [Phase(first, 0, min(swap, config.total_steps))] if swap else []
    if config.total_steps > swap:
        found.append(Phase(config, swap, config.total_steps))
    return tuple(found)


def config_at(config: TrainConfig, step: int) -> TrainConfig:
    """Returns the config whose parameters the checkpoint of `step` holds."""
    return next((phase.config for phase in phases(config) if step <= phase.until), config)


def carry_on(
    checkpoints: Checkpoints, before: Shapes, program: Program, *, seed: int
) -> tuple[TrainState, dict[str, Any]]:
    """Starts a phase from the last checkpoint of the one before.

    Parameters, averages and optimizer moments of the DiT and the null token go on, and so do the step and the data; what belongs
    to the encoder is new.

    Args:
      checkpoints: of the run; the newest is the last of the phase before.
      before: parameters of that phase.
      program: of this phase.
      seed: of the new parameters.

    Returns:
      The state, and the data's position.
    """
    abstract = program.abstract
    old = jax.eval_shape(
        lambda params: create_state(params, program.tx, bool(abstract.ema), list(abstract.metrics)), before.params
    )
    placed = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        old,
        state_shardings(old, before.shardings, program.mesh),
    )
    state, position = checkpoints.restore(placed)
    kept = {path: leaf for path, leaf in _by_path(state).items() if f"'{_SWAPPED}'" not in path}
    wanted = _by_path(abstract)
    new = [path for path, leaf in wanted.items() if path not in kept or kept[path].shape != leaf.shape]
    at = _by_path(program.shardings)

    def make(key: jax.Array) -> dict[str, jax.Array]:
        made = _by_path(program.make(key))
        return {path: made[path] for path in new}

    # Another stream than a fresh run's: the first phase's conditioner was drawn from that.
    key = stream_key(seed, "init", int(state.step))
    kept |= jax.jit(make, out_shardings={path: at[path] for path in new})(key)
    structure = jax.tree.structure(abstract)
    return jax.tree.unflatten(structure, [kept[path] for path in wanted]), position


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
