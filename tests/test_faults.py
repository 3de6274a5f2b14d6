"""What can go wrong in a run, on one host: the task is a line, so that only the loop is tested."""

import json
import os
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import call
from line_task import LineTask, get_config
from test_training import assert_same, logged

from unifusion_jax.config import from_mapping
from unifusion_jax.parallel.mesh import make_mesh
from unifusion_jax.training import checkpoints as checkpoints_module
from unifusion_jax.training import metrics
from unifusion_jax.training.checkpoints import Checkpoints, SaveError, checkpoint_steps, on_mounted_bucket
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.health import NonFiniteError
from unifusion_jax.training.loop import fit
from unifusion_jax.training.preemption import Preempted
from unifusion_jax.training.state import TrainState


def parsed(**changes) -> TrainConfig:
    config = get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return from_mapping(TrainConfig, config)


def train(workdir, task=LineTask, **changes):
    config = parsed(**changes)
    mesh = make_mesh(config.mesh)
    state, writer = fit(task(config, mesh), config, workdir, mesh)
    writer.close()
    return state


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return train(workdir), workdir


class ToldAtStep(LineTask):
    """Gets SIGTERM while it works on the fifth step."""

    def static(self, bucket):
        self.asked = getattr(self, "asked", 0) + 1
        if self.asked == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_exits_with_its_own_status_and_resumes_bit_equal(straight, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as told:
        train(tmp_path, ToldAtStep)
    assert told.value.code == 75 and "saved step 5 in" in told.value.message and checkpoint_steps(tmp_path)[-1] == 5
    assert signal.getsignal(signal.SIGTERM) is before
    state, workdir = straight
    assert_same(train(tmp_path), state)
    assert logged(tmp_path) == logged(workdir)


@pytest.fixture(scope="module")
def bad_record():
    """Id of a record of the fourth batch."""
    config = parsed()
    with LineTask(config, make_mesh(config.mesh)).batches() as batches:
        return [next(batches) for _ in range(4)][-1].ids[2]


def test_a_batch_that_is_not_finite_stops_the_run_and_its_records_are_listed(bad_record, tmp_path, monkeypatch):
    monkeypatch.setenv("BAD_RECORD", bad_record)
    with pytest.raises(
        NonFiniteError, match=r"loss became nan somewhere within steps \[4, 4\], first at step 4.*on_nonfinite"
    ):
        train(tmp_path)
    assert checkpoint_steps(tmp_path)[-1] == 3
    listed = json.loads((tmp_path / "bad_batches/step_00000004_process_0.json").read_text())
    assert listed["step"] == 4 and listed["loss"] == "nan"
    assert bad_record in listed["records"] and len(listed["records"]) == 8


def test_skipping_goes_on_without_the_batch_and_counts_it(bad_record, straight, tmp_path, monkeypatch):
    monkeypatch.setenv("BAD_RECORD", bad_record)
    state = train(tmp_path, on_nonfinite="skip")
    assert int(state.step) == 8 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    lines = logged(tmp_path)
    assert [line.pop("skipped_steps") for line in lines] == [0, 1, 0, 0]
    clean = logged(straight[1])
    assert lines[0] == clean[0] and lines[1]["loss"] != clean[1]["loss"]
    # Three steps were seen by the interval of two: the skipped one is in no average.
    assert np.isfinite(lines[1]["loss"]) and len(list((tmp_path / "bad_batches").iterdir())) == 1


def test_ten_bad_batches_in_a_row_stop_a_run_that_skips(tmp_path):
    with pytest.raises(NonFiniteError, match=r"update_norm became inf .*10 in a row"):
        train(tmp_path, on_nonfinite="skip", total_steps=20, optimizer__learning_rate=1e30, optimizer__warmup_steps=0)


def small_state(value: float) -> TrainState:
    return TrainState(jnp.int32(1), {"kernel": jnp.full((256, 256), value)}, {}, (), {})


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small_state(1.0), {"next_step": 1})
    assert not checkpoints.due(1, force=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)  # what compresses well would fit
    full = TrainState(jnp.int32(2), {"kernel": jnp.asarray(rng.normal(size=(256, 256)), jnp.float32)}, {}, (), {})
    try:
        with pytest.raises(
            SaveError, match=r"failed, so the run stops: .*The checkpoint of step 1 is whole. Make room"
        ):
            checkpoints.due(2)  # waits for nothing; the save of step 1 may still be running
            checkpoints._manager.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as a full disk, writing fails half way
            checkpoints.save(2, full, {"next_step": 2})
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint_steps(tmp_path) == [1]
    restored, data = Checkpoints(tmp_path).restore(small_state(0.0))
    assert data == {"next_step": 1} and float(restored.params["kernel"][0, 0]) == 1.0


KILLED = """
import os, signal, sys
from pathlib import Path
import test_faults
from unifusion_jax.training.checkpoints import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(1, test_faults.small_state(1.0), {"next_step": 1})
checkpoints._manager.wait_until_finished()
# The last thing a save does is to give its folder the name of a checkpoint.
rename = os.rename
def killed(source, target, *rest, **options):
    if os.path.basename(target) == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target, *rest, **options)
os.rename = os.replace = killed
checkpoints.save(2, test_faults.small_state(2.0), {"next_step": 2})
checkpoints.close()
"""


def test_a_process_killed_while_it_saves_leaves_the_last_checkpoint(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    done = call(str(tmp_path / "killed.py"), str(tmp_path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # the second is half made
    assert checkpoint_steps(tmp_path) == [1]
    checkpoints = Checkpoints(tmp_path)
    restored, _ = checkpoints.restore(small_state(0.0))
    assert float(restored.params["kernel"][0, 0]) == 1.0
    checkpoints.save(2, small_state(3.0), {"next_step": 2})
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("mounts", "bucket"),
    [
        ("root / ext4 rw\nb {} fuse.gcsfuse rw\n", True),
        ("b {} fuse.gcsfuse rw\nc {} nfs4 rw\n", False),
        ("b /elsewhere fuse rw\nroot / ext4 rw\n", False),
    ],
)
def test_a_mounted_bucket_is_found_in_the_table_of_mounts(monkeypatch, tmp_path, mounts, bucket):
    (tmp_path / "mounts").write_text(mounts.replace("{}", str(tmp_path / "gcs")))
    monkeypatch.setattr(checkpoints_module, "_MOUNTS", tmp_path / "mounts")
    assert on_mounted_bucket(tmp_path / "gcs" / "run") == bucket
    assert not on_mounted_bucket(tmp_path / "gcs2")


def test_on_a_mounted_bucket_no_folder_is_renamed_and_what_is_half_saved_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints_module, "on_mounted_bucket", lambda folder: True)

    def refused(source, target, rename=os.rename):
        if os.path.isdir(source):
            raise OSError("Too many open files")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    monkeypatch.setattr(os, "replace", refused)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, small_state(step), {"next_step": step})
    checkpoints.close()
    assert checkpoint_steps(tmp_path) == [1, 2]
    (tmp_path / "checkpoints" / "2" / "commit_success.txt").unlink()  # the last that a save writes
    assert checkpoint_steps(tmp_path) == [1]
    checkpoints = Checkpoints(tmp_path)
    restored, data = checkpoints.restore(small_state(0.0))
    assert data == {"next_step": 1} and float(restored.params["kernel"][0, 0]) == 1.0
    checkpoints.save(2, small_state(3.0), {"next_step": 2})
    checkpoints.close()
    assert checkpoint_steps(tmp_path) == [1, 2]
    with Checkpoints(tmp_path, read_only=True) as readable:
        assert readable.latest_step() == 2


def test_the_lines_up_to_a_checkpoint_are_on_the_disk_before_it(monkeypatch, tmp_path):
    synced = []

    def fsync(number):
        synced.append([line["step"] for line in logged(tmp_path)])

    monkeypatch.setattr(metrics.os, "fsync", fsync)
    train(tmp_path, total_steps=6)
    assert [2] in synced and synced[-1] == [2, 4, 6]


def test_steps_are_traced_on_demand(tmp_path):
    train(tmp_path, total_steps=5, profile__first_step=3, profile__steps=2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match=r"profile.first_step must be at least 1"):
        parsed(profile__first_step=0)
