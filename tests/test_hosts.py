"""Several processes on this machine, joined over 127.0.0.1 (Gloo collectives), one fake device each."""

import contextlib
import random
import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from commands import Process
from line_task import LineTask
from test_faults import parsed, train
from test_training import assert_same, logged

from unifusion_jax.parallel import hosts
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh
from unifusion_jax.parallel.sharding import host_rows
from unifusion_jax.training.checkpoints import checkpoint_steps
from unifusion_jax.training.loop import fit

SCRIPT = "tests/line_task.py"
SLURM_PORTS = range(61440, 65536)


def output_of(workdir, number):
    return workdir.parent / f"{workdir.name}.{number}.txt"


def start(count, workdir, *arguments, slurm=False, **environment):
    """Starts the processes of a run, who learn by flags or as from Slurm who is who; their output goes beside the workdir."""
    port = free_port()
    told_by_flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
    # JAX derives the coordinator's port from the number of the job.
    told_by_slurm = {"SLURM_JOB_ID": str(port - SLURM_PORTS[0]), "SLURM_STEP_NODELIST": "127.0.0.1,other"}
    processes = []
    for number in range(count):
        flags = [] if slurm else [*told_by_flags, f"--process_id={number}"]
        ranks = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), str(number)) | {"SLURM_NTASKS": str(count)}
        variables = environment | (told_by_slurm | ranks if slurm else {})
        given = [f"--config={SCRIPT}", f"--workdir={workdir}", *flags, *arguments]
        processes.append(Process(SCRIPT, *given, outputs=[output_of(workdir, number)], **variables))
    return processes


def free_port():
    """A port that is free now, of those that JAX takes under Slurm."""
    for port in random.sample(SLURM_PORTS, len(SLURM_PORTS)):
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def finish(processes, workdir):
    """Waits for all; returns their exit statuses and what they said."""
    try:
        statuses = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    return statuses, [output_of(workdir, number).read_text() for number in range(len(processes))]


def wait_for_steps(processes, workdir, lines=2):
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= lines):
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)


def assert_close(left, right):
    """Sums over devices run in another order in another mesh; float32 agrees to 1e-5 after a few steps."""
    assert [line["step"] for line in left] == [line["step"] for line in right]
    for ours, theirs in zip(left, right, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes that split the parameters between them."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    processes = start(2, workdir, "--config.mesh.data=1", "--config.mesh.fsdp=2")
    statuses, said = finish(processes, workdir)
    assert statuses == [0, 0], said
    return workdir


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process to step 12."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(workdir, total_steps=12)
    return logged(workdir)


def training_lines(workdir):
    return [line for line in logged(workdir) if "loss" in line]


def test_two_processes_train_what_one_does(pair, alone):
    assert_close(training_lines(pair), alone[:4])
    assert checkpoint_steps(pair) == [3, 6, 8]


def test_what_two_processes_saved_goes_on_in_four_and_on_one_device(pair, alone, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(pair, workdir)
    arguments = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.total_steps=12")
    processes = start(4, workdir, *arguments, GATHERED_BYTES="64")  # a row of the kernel at a time
    statuses, said = finish(processes, workdir)
    assert statuses == [0] * 4, said
    assert "Resumed from step 8" in said[0] and "4 processes: process 0 (" in said[3]
    assert_close(training_lines(workdir), alone)
    config = parsed(total_steps=12)
    restored = []
    for mesh in (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(data=4, fsdp=2))):
        state, writer = fit(LineTask(config, mesh), config, workdir, mesh)  # nothing is left to train
        writer.close()
        restored.append(state)
    assert_same(*restored)
    assert int(restored[0].step) == 12
    with np.load(workdir / "export" / "params.npz") as exported:
        assert_same(dict(exported), restored[0].inference_params)


@pytest.mark.parametrize(
    ("shape", "spec"), [((5, 16), (None, "fsdp")), ((16, 3), ("fsdp",)), ((16, 8), ("data", "fsdp"))]
)
def test_arrays_are_gathered_in_pieces(monkeypatch, shape, spec):
    monkeypatch.setattr(hosts, "_GATHERED_BYTES", 100)
    pieces, gather = [], hosts.multihost_utils.process_allgather
    monkeypatch.setattr(
        hosts.multihost_utils, "process_allgather", lambda x, tiled: pieces.append(x.nbytes) or gather(x, tiled)
    )
    expected = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    split = jax.sharding.NamedSharding(make_mesh(MeshConfig(data=2, fsdp=4)), jax.sharding.PartitionSpec(*spec))
    np.testing.assert_array_equal(hosts._gathered(jax.device_put(expected, split)), expected)
    assert len(pieces) > 1 and max(pieces) <= 100


SLOW = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.total_steps=100000", "--lost_host_after_s=6")


def test_sigterm_to_one_process_makes_all_save_and_exit_alike(alone, tmp_path):
    workdir = tmp_path / "run"
    processes = start(2, workdir, *SLOW, slurm=True, ROW_S="0.02")
    wait_for_steps(processes, workdir)
    processes[1].send_signal(signal.SIGTERM)
    statuses, said = finish(processes, workdir)
    assert statuses == [hosts.EXIT_PREEMPTED] * 2, said
    saved = checkpoint_steps(workdir)[-1]
    assert all(f"Told to end: saved step {saved}" in words for words in said)
    assert_close(training_lines(workdir)[:2], alone[:2])


def lose(number, workdir):
    """Kills one of two processes; returns its name, and what both ended with and said within a minute."""
    processes = start(2, workdir, *SLOW, ROW_S="0.02")
    wait_for_steps(processes, workdir)
    since = time.monotonic()
    processes[number].kill()
    statuses, said = finish(processes, workdir)
    assert time.monotonic() - since < 60
    return f"process {number} ({socket.gethostname()}, pid {processes[number].pid})", statuses, said


def test_a_lost_process_stops_the_other_which_names_it(tmp_path):
    lost, statuses, said = lose(1, tmp_path / "run")
    assert statuses == [hosts.EXIT_LOST_HOST, -signal.SIGKILL], said
    assert f"Lost {lost}: not heard of for" in said[0]


def test_without_process_0_the_other_stops_too_and_has_named_it(tmp_path):
    lost, statuses, said = lose(0, tmp_path / "run")
    assert statuses in ([-signal.SIGKILL, -signal.SIGABRT], [-signal.SIGKILL, hosts.EXIT_LOST_HOST]), said
    assert f"{lost} is lost" in said[1]


class Board:
    """The numbers that processes leave for each other; a living process 1 counts on."""

    def __init__(self, living=False):
        self.living = living
        self.values = {"unifusion_jax/names/1": "b, pid 2", "unifusion_jax/beats/1": "1"}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.values[key] = value

    def blocking_key_value_get(self, key, timeout_ms):
        return self.values[key]

    def key_value_dir_get(self, folder):
        if self.living:
            self.values["unifusion_jax/beats/1"] += "1"
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.mark.parametrize(
    ("beat", "message"),
    [
        ("1", r"Lost process 1 \(b, pid 2\): not heard of for .*Start all of them again with the same command"),
        (
            "failed: DataError: no such file",
            r"process 1 \(b, pid 2\) failed, so this process stops: DataError: no such",
        ),
        ("done", None),
    ],
)
def test_what_is_said_of_a_process_that_is_silent_failed_or_done(monkeypatch, beat, message):
    board, said = Board(), []
    board.values["unifusion_jax/beats/1"] = beat
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost, "get_jax_distributed_client", lambda: board)
    with hosts.HostWatch(0.5, end=lambda message, status: said.append(message)):
        time.sleep(1.2)
    assert board.values["unifusion_jax/beats/0"] == "done"
    assert re.match(message, said[0]) if message else not said


@pytest.mark.parametrize(
    ("living", "message", "status"),
    [(True, "OSError: no space left", 1), (False, "Lost process 1 (b, pid 2): not heard of", hosts.EXIT_LOST_HOST)],
)
def test_a_process_that_fails_blames_itself_only_where_the_others_are_there(monkeypatch, living, message, status):
    board, said = Board(living), []
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost, "get_jax_distributed_client", lambda: board)
    with pytest.raises(OSError), hosts.HostWatch(0.5, end=lambda *what: said.append(what)):
        raise OSError("no space left")
    assert said[0][0].startswith(message) and said[0][1] == status
    assert board.values["unifusion_jax/beats/0"] == "failed: OSError: no space left"
    assert said == [("OSError: no space left", 1)] or not living


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, r"go together, .* --num_processes and --process_id missing"),
        (
            {"coordinator": "a", "num_processes": 2, "process_id": 0},
            r"--coordinator is HOST:PORT of process 0, got 'a'",
        ),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            r"counts from 0 to --num_processes - 1 = 1, got 2",
        ),
    ],
)
def test_flags_that_do_not_fit_say_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.connect(**arguments)
    assert not hosts.connect(num_processes=1)


def test_rows_of_a_host_are_those_its_devices_work_on():
    assert host_rows(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), 8) == list(range(8))
    with pytest.raises(
        ValueError, match=r"batch_size=6 .* cannot be shared equally by 4 devices .*use a multiple of 4"
    ):
        host_rows(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), 6)
