"""Many hosts: how the processes of a run find each other, and what the others do when one of them is lost.

Every process runs the same command. On TPU pod slices, under GKE and under Slurm they find each other by themselves; elsewhere
`--coordinator`, `--num_processes` and `--process_id` say who is who.
"""

import functools
import glob
import importlib.util
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

log = logging.getLogger(__name__)

# Exit statuses besides 0 (done), 1 (failed) and 2 (wrong command line). 75 is what sysexits.h calls "try again later".
EXIT_PREEMPTED = 75
EXIT_LOST_HOST = 76

# What is gathered at a time: every device holds it whole, and the stacked weights of a large model's blocks fill a chip.
_GATHERED_BYTES = 2**28

_NAMES, _BEATS = "unifusion_jax/names", "unifusion_jax/beats"
_DONE, _FAILED = "done", "failed: "


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: int = 100,
) -> bool:
    """Joins the other processes of the run; call it before anything runs on a device. Returns whether there are others to join.

    Args:
      coordinator: "host:port" of process 0, for clusters that do not tell.
      num_processes: processes of the run; 1 joins nothing, whatever the cluster says.
      process_id: number of this one.
      timeout_s: how long another process may be silent, or late at the start, before it counts as lost.

    Raises:
      ValueError: the three are not given together, or do not fit.
      ConnectionError: others did not come in time, or the cluster does not tell who they are.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    if num_processes == 1:
        return False
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(
            f"--coordinator, --num_processes and --process_id go together, or none of them where the cluster tells; "
            f"{' and '.join(missing)} missing."
        )
    if missing and not _in_cluster():
        return False
    if coordinator is not None and num_processes is not None and process_id is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator is HOST:PORT of process 0, got {coordinator!r}.")
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id counts from 0 to --num_processes - 1 = {num_processes - 1}, got {process_id}."
            )
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=max(timeout_s, 60),
            # JAX's own watch ends a process without a word on which host is gone, so it comes second.
            heartbeat_timeout_seconds=2 * timeout_s,
            shutdown_timeout_seconds=timeout_s,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"The processes of the run did not find each other: {error}. Start all of them within {max(timeout_s, 60)} s with "
            "the same --coordinator and --num_processes, or train on this host alone with --num_processes=1."
        ) from error
    return True


def _in_cluster() -> bool:
    """Whether this machine belongs to a TPU slice or a Slurm step of several tasks, from which JAX reads who is who."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        return True
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def agreed(value: int) -> int:
    """Returns process 0's value on every host: what a shared file system shows may differ between them for a while."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def to_host(tree: Any) -> Any:
    """Returns the arrays of a pytree as NumPy arrays, whole on every host.

    With many hosts all of them must call it where arrays may be split over them.
    """

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return _gathered(leaf)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def _gathered(leaf: jax.Array) -> np.ndarray:
    """Returns an array whole, in pieces along an axis that no device has a part of, if there is one."""
    held = leaf.sharding.shard_shape(leaf.shape)
    axis = next((axis for axis, size in enumerate(leaf.shape) if held[axis] == size), 0)
    rows = max(1, leaf.shape[axis] * _GATHERED_BYTES // max(1, leaf.nbytes))
    whole = np.empty(leaf.shape, leaf.dtype)
    for start in range(0, leaf.shape[axis], rows):
        piece = _piece(leaf, start, min(rows, leaf.shape[axis] - start), axis)
        place = (slice(None),) * axis + (slice(start, start + rows),)
        whole[place] = multihost_utils.process_allgather(piece, tiled=True)
    return whole


@functools.partial(jax.jit, static_argnums=(2, 3))
def _piece(leaf: jax.Array, start: int | jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis)


class HostWatch:
    """Notices that another process of the run is gone, and ends this one with an error that names it.

    A step that waits for a lost host waits for ever, or fails with words about sockets. So every process counts up a number
    that all can read, from a thread, and when one's number stands still for `timeout_s` the others say so and exit with
    EXIT_LOST_HOST. A process that fails hears the others first; where all are there it leaves its error, and they stop too.
    Process 0 keeps the numbers: when it is gone, JAX itself aborts the others at once (status 134). Does nothing in a run of
    one process.
    """

    def __init__(self, timeout_s: float, *, end: Callable[[str, int], None] | None = None):
        self._timeout_s = timeout_s
        self._every_s = min(5.0, timeout_s / 8)
        self._end = end or _end
        self._client = multihost.get_jax_distributed_client() if jax.process_count() > 1 else None
        self._me = jax.process_index()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hosts", daemon=True)
        self._names: dict[int, str] = {}

    def __enter__(self) -> "HostWatch":
        if self._client is not None:
            self._client.key_value_set(f"{_NAMES}/{self._me}", f"{socket.gethostname()}, pid {os.getpid()}")
            for process in range(jax.process_count()):
                name = self._client.blocking_key_value_get(f"{_NAMES}/{process}", int(self._timeout_s * 1000))
                self._names[process] = f"process {process} ({name})"
            log.info("%d processes: %s.", len(self._names), "; ".join(self._names.values()))
            if self._me:  # JAX ends this process the moment that process 0 is gone; no code of ours runs any more
                log.info(
                    "Should JAX abort this process for its distributed service's fatal errors, %s is lost.",
                    self._names[0],
                )
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._client is None:
            return
        failed = error is not None and not isinstance(error, SystemExit)
        if failed:
            self._hear_others(error)
        self._stopped.set()
        self._thread.join()
        self._tell(f"{_FAILED}{type(error).__name__}: {error}" if failed else _DONE)
        if failed:
            if self._me == 0:
                time.sleep(2 * self._every_s)  # the numbers go with this process; the others shall read them first
            # At a plain exit JAX would wait for the others, who cannot come, and then abort.
            expected = isinstance(error, ValueError | TypeError | OSError)
            log.log(logging.DEBUG if expected else logging.ERROR, "Failed.", exc_info=error)
            self._end(f"{type(error).__name__}: {error}", 1)

    def _hear_others(self, error: BaseException | None) -> None:
        """Waits for a sign of life from every other process: what failed here may follow from the loss of one.

        Errors of a broken connection come in many types (from JAX, Orbax, TensorStore), so none is trusted. A process that
        stays silent is lost; then the thread says so and ends this process.
        """
        log.warning(
            "%s: %s. Waiting up to %d s to hear whether every other process is there. If JAX ends this process before that, "
            "it is %s that is lost.",
            *(type(error).__name__, error, 2 * self._timeout_s, self._names[0]),
        )
        before = self._beats()
        silent = {process for process in self._names if process != self._me and before.get(process, "") != _DONE}
        deadline = time.monotonic() + 2 * self._timeout_s
        while silent and time.monotonic() < deadline:
            time.sleep(self._every_s / 4)
            now = before | self._beats()
            silent = {process for process in silent if now.get(process) == before.get(process)}

    def _tell(self, beat: str) -> None:
        assert self._client is not None
        self._client.key_value_set(f"{_BEATS}/{self._me}", beat, allow_overwrite=True)

    def _run(self) -> None:
        beats: dict[int, str] = {}
        heard = dict.fromkeys(self._names, time.monotonic())
        count, last = 0, time.monotonic()
        while not self._stopped.wait(self._every_s):
            count += 1
            now = time.monotonic()
            # This process itself stood still (suspended): it knows nothing of the others.
            if now - last > self._timeout_s / 2:
                heard = dict.fromkeys(heard, now)
            last = now
            found = self._beats(str(count))
            for process in self._names:
                if found.get(process, "") != beats.get(process, ""):
                    heard[process] = now
            beats |= found
            self._judge(beats, {process: now - since for process, since in heard.items()})

    def _beats(self, mine: str | None = None) -> dict[int, str]:
        """Leaves this process's number, where one is given, and returns what all have left; nothing without process 0."""
        assert self._client is not None
        try:
            if mine is not None:
                self._tell(mine)
            return {int(key.rpartition("/")[2]): beat for key, beat in self._client.key_value_dir_get(_BEATS)}
        except jax.errors.JaxRuntimeError as error:
            # Process 0 keeps the numbers: without it, it is the one that is not heard.
            log.warning("Process 0 does not answer: %s", error)
            return {}

    def _judge(self, beats: dict[int, str], silent_s: dict[int, float]) -> None:
        for process, name in self._names.items():
            beat = beats.get(process, "")
            if process == self._me or beat == _DONE:
                continue
            if beat.startswith(_FAILED):
                self._end(f"{name} failed, so this process stops: {beat.removeprefix(_FAILED)}", EXIT_LOST_HOST)
            elif silent_s[process] > self._timeout_s:
                self._end(
                    f"Lost {name}: not heard of for {silent_s[process]:.0f} s. It was killed or preempted, or its network is "
                    "gone. This process stops. Start all of them again with the same command: the run goes on from its "
                    "newest checkpoint, on any number of hosts.",
                    EXIT_LOST_HOST,
                )


def _end(message: str, status: int) -> None:
    """Ends the process from any thread: the main one may wait in a collective that never returns."""
    log.critical("%s", message)
    logging.shutdown()
    os._exit(status)
