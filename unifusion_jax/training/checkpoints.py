"""Saving and restoring a run as one unit: {parameters, EMA, optimizer, step, metric sums, data position, config}."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from unifusion_jax.config import from_mapping, to_json
from unifusion_jax.parallel.hosts import agreed
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.health import NonFiniteError
from unifusion_jax.training.state import TrainState

CONFIG_FILE = "config.json"
_FOLDER = "checkpoints"
_MOUNTS = Path("/proc/mounts")


class SaveError(OSError):
    """A checkpoint could not be written."""


class Checkpoints:
    """The checkpoints of one workdir, written in the background.

    A save that fails raises SaveError at the next call, so training never runs on believing it is safe. What a killed process
    has left half written is never taken for a checkpoint.

    Args:
      workdir: of the run.
      every_steps: when saves are due.
      keep: number of newest checkpoints that are kept.
      read_only: for who only reads, maybe while a training writes.
    """

    def __init__(self, workdir: Path, *, every_steps: int = 1, keep: int = 3, read_only: bool = False):
        atomicity = _atomicity(workdir)
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, atomicity_options=atomicity)
        else:
            options = ocp.CheckpointManagerOptions(
                save_interval_steps=every_steps,
                max_to_keep=keep,
                enable_async_checkpointing=True,
                create=True,
                cleanup_tmp_directories=True,
                atomicity_options=atomicity,
            )
        self._manager = ocp.CheckpointManager(
            (workdir / _FOLDER).absolute(),
            options=options,
            # Given here, so that a fresh process can read a checkpoint's shapes before it restores anything.
            item_handlers={"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()},
        )
        self._workdir = workdir
        self._closed = False

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None when there is none."""
        return self._manager.latest_step()

    def due(self, step: int, *, force: bool = False) -> bool:
        """Whether to save after this step: the interval says so, or `force`, and it is not saved already."""
        if step == self._manager.latest_step():
            return False
        with self._telling(step):
            self._manager.check_for_errors()
        return force or self._manager.should_save(step)

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Starts saving; returns when the state may change again."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(as_tree(state)), data=ocp.args.JsonSave(data))
        with self._telling(step):
            self._manager.save(step, args=args, force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the newest checkpoint onto the shardings of `abstract` (any mesh, any number of hosts).

        Raises:
          ValueError: the checkpoint is of another architecture; names the first differing parameter and both shapes.
        """
        step = self._manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"No checkpoint in {self._workdir / _FOLDER}.")
        wanted = as_tree(abstract)
        self._check_same(step, wanted)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted), data=ocp.args.JsonRestore())
        )
        return from_tree(restored["state"], abstract), restored["data"]

    def restore_inference(self, abstract_params: dict[str, Any]) -> dict[str, Any]:
        """Restores only the parameters for inference: the average where there is one."""
        step = self._manager.latest_step()
        if step is None:
            raise FileNotFoundError(
                f"No complete checkpoint in {self._workdir / _FOLDER}. Let the training save one first."
            )
        saved = self._saved_shapes(step)
        item = "ema" if any(name.startswith("ema.") for name in saved) else "params"
        wanted = {item: abstract_params}
        _compare(saved, wanted, f"{self._workdir} (step {step})", prefix=f"{item}.")
        checkpointer = ocp.PyTreeCheckpointer()
        path = self._workdir.absolute() / _FOLDER / str(step) / "state"
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        return checkpointer.restore(
            path, args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        )[item]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # A save in flight is finished, also where the run fails; but other hosts, which it needs, may not get here.
        if error is None or jax.process_count() == 1 or isinstance(error, SystemExit | NonFiniteError):
            self.close()

    def close(self) -> None:
        """Waits for saves in flight; raises SaveError when one failed. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        with self._telling(None):
            self._manager.wait_until_finished()
        self._manager.close()

    @contextlib.contextmanager
    def _telling(self, step: int | None) -> Iterator[None]:
        """Turns what goes wrong while saving into an error that says what is still there."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            kept = checkpoint_steps(self._workdir)
            at = "The last save" if step is None else f"A save (noticed at step {step})"
            raise SaveError(
                f"{at} in {self._workdir / _FOLDER} failed, so the run stops: {error}. "
                f"{f'The checkpoint of step {kept[-1]} is whole' if kept else 'There is no earlier checkpoint'}. Make room or "
                "mend the disk, and start again with the same command."
            ) from error

    def _saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        metadata = self._manager.item_metadata(step)["state"]
        tree = getattr(metadata, "tree", metadata)
        flat: dict[str, Any] = dict(traverse_util.flatten_dict(tree, sep="."))
        return {name: tuple(getattr(leaf, "shape", ()) or ()) for name, leaf in flat.items()}

    def _check_same(self, step: int, wanted: dict[str, Any]) -> None:
        _compare(self._saved_shapes(step), wanted, f"{self._workdir} (step {step})", prefix="")


def _compare(saved: dict[str, tuple[int, ...]], wanted: dict[str, Any], where: str, *, prefix: str) -> None:
    """Raises ValueError naming the first parameter that the checkpoint and the config disagree on."""
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(wanted, sep="."))
    expected = {name: tuple(leaf.shape) for name, leaf in flat.items()}
    got = {name: shape for name, shape in saved.items() if name.startswith(prefix)}
    for name in sorted(set(expected) | set(got)):
        if expected.get(name) != got.get(name):
            raise ValueError(
                f"The checkpoint in {where} is of another architecture. First difference: {name}: the checkpoint has "
                f"{_shape(got.get(name))}, the config makes {_shape(expected.get(name))}. Use the config the run was started "
                "with, or another --workdir."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such parameter" if shape is None else f"shape {shape}"


def as_tree(state: TrainState) -> dict[str, Any]:
    """Returns the state as nested dicts with string keys only, which is how it lies on disk.

    Optimizer states are nested tuples; their leaves are numbered in order, so the file format does not depend on optax's
    class names.
    """
    leaves = jax.tree.leaves(state.opt_state)
    return {
        "step": state.step,
        "params": state.params,
        "ema": state.ema,
        "opt_state": {f"{index:05d}": leaf for index, leaf in enumerate(leaves)},
        "metrics": state.metrics,
    }


def from_tree(tree: dict[str, Any], abstract: TrainState) -> TrainState:
    """Inverse of `as_tree`; `abstract` gives the optimizer state's structure."""
    numbered = tree["opt_state"]
    opt_state = jax.tree.unflatten(jax.tree.structure(abstract.opt_state), [numbered[key] for key in sorted(numbered)])
    return TrainState(tree["step"], tree["params"], tree.get("ema", {}) or {}, opt_state, tree["metrics"])


def checkpoint_steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a workdir, in order. Makes no folder."""
    folder = workdir / _FOLDER
    steps = sorted(ocp.utils.checkpoint_steps(folder.absolute())) if folder.is_dir() else []
    if on_mounted_bucket(workdir):
        steps = [step for step in steps if (folder / str(step) / ocp.path.atomicity.COMMIT_SUCCESS_FILE).exists()]
    return steps


def _atomicity(workdir: Path) -> ocp.options.AtomicityOptions:
    """Chooses what makes a checkpoint whole: the name that its folder gets last, or, on a mounted bucket, a file in it."""
    mode = ocp.options.AtomicityMode
    return ocp.options.AtomicityOptions(mode.COMMIT_FILE if on_mounted_bucket(workdir) else mode.ATOMIC_RENAME)


def on_mounted_bucket(folder: Path) -> bool:
    """Whether a folder lies on a bucket that is mounted by FUSE (gcsfuse, s3fs, rclone).

    To rename a folder there is to copy and delete one object after another: it takes as long as the save, a kill leaves half
    of it under the final name, and gcsfuse refuses it by default. Orbax knows that of gs:// only.
    """
    if not _MOUNTS.exists():
        return False
    place, depth, kind = folder.absolute().resolve(), 0, ""
    for line in _MOUNTS.read_text().splitlines():
        name, found = line.split()[1:3]
        point = Path(name.replace("\\040", " "))
        # The deepest mount holds the folder; of two on one point, the later.
        if place.is_relative_to(point) and len(point.parts) >= depth:
            depth, kind = len(point.parts), found
    return kind.startswith("fuse")


def latest_step(workdir: Path) -> int:
    """Returns the step of the newest checkpoint of a workdir; 0 where there is none. The same on every host."""
    return agreed(max(checkpoint_steps(workdir), default=0))


def check_config(workdir: Path, config_json: str) -> None:
    """Checks that a workdir is new or holds a run of this config.

    Raises:
      ValueError: the workdir holds the run of another config; lists the keys that differ.
    """
    file = workdir / CONFIG_FILE
    if not file.exists():
        return
    # A key that came after the run was recorded stood at its default.
    recorded = to_json(from_mapping(TrainConfig, json.loads(file.read_text()), f"{file}"))
    differing = _differences(json.loads(recorded), json.loads(config_json))
    # A run may be continued for longer, saved or drawn more often; what it computes may not change.
    serious = [line for line in differing if not line.startswith(_HARMLESS)]
    if serious:
        shown = "\n  ".join(serious[:20])
        raise ValueError(
            f"{workdir} holds a run of another config. Use another --workdir, or delete this one to start over. "
            f"Differences (recorded -> given):\n  {shown}"
        )


def write_config(workdir: Path, config_json: str) -> None:
    """Records the run's config in its workdir; the first process does."""
    if jax.process_index() > 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / f"{CONFIG_FILE}.tmp"
    temporary.write_text(config_json + "\n")
    temporary.replace(workdir / CONFIG_FILE)


_HARMLESS = tuple(
    "total_steps: checkpoint. preview. profile. evaluation. mesh. data.num_workers: on_nonfinite:".split()
)


def _differences(recorded: Any, given: Any, name: str = "") -> list[str]:
    if isinstance(recorded, dict) and isinstance(given, dict):
        lines = []
        for key in sorted(set(recorded) | set(given)):
            lines += _differences(recorded.get(key), given.get(key), f"{name}.{key}" if name else key)
        return lines
    return [] if recorded == given else [f"{name}: {recorded!r} -> {given!r}"]
