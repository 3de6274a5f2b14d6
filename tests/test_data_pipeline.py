"""Batches: the same global order whatever the hosts, resumable anywhere, exact epochs, loud failures."""

import collections
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unifusion_jax.data import (
    TASKS,
    Buckets,
    Budget,
    DataError,
    Record,
    images,
    make_batches,
    make_mixture,
    pipeline,
    write_records,
)
from unifusion_jax.data import sources as data_sources

BUCKETS = Buckets({task: Budget(32, 4, 16) for task in TASKS}, area_px=16 * 16, multiple_of_px=8, max_aspect=1.0)


def build_row(record, bucket):
    assert record.image.shape == (bucket.height_px, bucket.width_px, 3)
    return {"image": record.image, "task": record.task}


def collate(rows, bucket):
    return {"image": np.stack([row["image"] for row in rows]), "tasks": [row["task"] for row in rows]}


def record(number, task="text_to_image", **changes):
    image = np.full((16, 16, 3), number % 256, np.uint8)
    fields = {"id": f"{task}-{number}", "task": task, "prompt": "p", "target": None, "image": image}
    return Record(**{**fields, "images": (image,) if task == "edit" else (), **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    items = [record(i) for i in range(23)] + [record(i, "edit") for i in range(9)]
    write_records(items, folder / "set", shards=2)
    return str(folder / "set")


@pytest.fixture(scope="module")
def mixture(folder):
    return make_mixture([{"name": "records", "path": folder, "derive": {"joint": 0.2}}], BUCKETS)


def batches(mixture, **options):
    fixed = {"batch_size": 8, "seed": 3, "build_row": build_row, "collate": collate, "read_threads": 2}
    return make_batches(mixture, **{**fixed, **options})


def share(host, hosts):
    """The rows of a batch of 8 that a host loads where hosts lie in order in the mesh."""
    return range(host * 8 // hosts, (host + 1) * 8 // hosts)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def names(items):
    return [(batch.step, batch.stream, batch.ids) for batch in items]


def test_batches_hold_what_they_say(mixture):
    with batches(mixture) as iterator:
        for step, batch in enumerate(take(iterator, 12)):
            assert batch.step == step
            assert batch.data["image"].shape == (8, 16, 16, 3)
            assert batch.data["image"].dtype == np.uint8
            assert set(batch.data["tasks"]) == {batch.bucket.task}
            assert batch.is_real.all()
            for identifier, image in zip(batch.ids, batch.data["image"], strict=True):
                assert (image == int(identifier.split("-")[1])).all()
    assert iterator.mixture is mixture
    assert iterator.total_steps is None


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_global_order(mixture, hosts):
    with batches(mixture) as iterator:
        alone = take(iterator, 10)
    shares = []
    for host in range(hosts):
        with batches(mixture, rows=share(host, hosts)) as iterator:
            shares.append(take(iterator, 10))
    for whole, *parts in zip(alone, *shares, strict=True):
        assert {part.stream for part in parts} == {whole.stream}
        assert sum((part.ids for part in parts), ()) == whole.ids
        np.testing.assert_array_equal(np.concatenate([part.data["image"] for part in parts]), whole.data["image"])


@settings(max_examples=8, deadline=None)
@given(stop=st.integers(0, 12), hosts=st.sampled_from([1, 2, 4]))
def test_resume_anywhere_on_any_hosts(mixture, stop, hosts):
    with batches(mixture) as iterator:
        uninterrupted = take(iterator, 15)
    with batches(mixture) as iterator:
        take(iterator, stop)
        state = json.loads(json.dumps(iterator.get_state()))
    with batches(mixture, rows=share(hosts - 1, hosts)) as iterator:
        iterator.set_state(state)
        resumed = take(iterator, 15 - stop)
    rows = 8 // hosts
    expected = [(b.step, b.stream, b.ids[8 - rows :]) for b in uninterrupted[stop:]]
    assert names(resumed) == expected


def test_state_can_be_set_in_the_middle_and_counts_taken_batches_only(mixture):
    with batches(mixture, prefetch_batches=4) as iterator:
        first = take(iterator, 3)
        state = iterator.get_state()
        assert state["next_step"] == 3  # not what was read ahead
        take(iterator, 4)
        iterator.set_state(state)
        assert names(take(iterator, 2)) == names_of(mixture, 3, 2)
        iterator.set_state({**state, "next_step": 0})
        assert names(take(iterator, 3)) == names(first)


def names_of(mixture, start, count):
    with batches(mixture, start_step=start) as iterator:
        return names(take(iterator, count))


def test_far_steps_need_no_replay(mixture):
    start = time.monotonic()
    assert names_of(mixture, 10**9, 2)[0][0] == 10**9
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(("batch_size", "repeat"), [(8, 1), (5, 1), (8, 3), (64, 1), (64, 2)])
def test_finite_passes_show_every_record_exactly(folder, batch_size, repeat):
    mixture = make_mixture([{"name": "records", "path": folder}], BUCKETS)
    seen = collections.Counter()
    with batches(mixture, batch_size=batch_size, repeat=repeat) as iterator:
        steps = iterator.total_steps
        for batch in iterator:
            assert batch.data["image"].shape[0] == batch_size  # shapes stay static
            seen.update(np.array(batch.ids)[batch.is_real].tolist())
        assert iterator.get_state()["next_step"] == steps
        with pytest.raises(StopIteration):
            next(iterator)
    assert set(seen.values()) == {repeat}
    assert len(seen) == 32
    assert steps == -(-23 * repeat // batch_size) + -(-9 * repeat // batch_size)


def test_finite_pass_over_hosts(folder):
    mixture = make_mixture([{"name": "records", "path": folder}], BUCKETS)
    seen = collections.Counter()
    for host in range(4):
        with batches(mixture, repeat=1, rows=share(host, 4)) as iterator:
            for batch in iterator:
                seen.update(np.array(batch.ids)[batch.is_real].tolist())
    assert set(seen.values()) == {1}
    assert len(seen) == 32


def test_endless_batches_go_through_whole_epochs(folder):
    mixture = make_mixture([{"name": "records", "path": folder, "task": "edit"}], BUCKETS)
    with batches(mixture, batch_size=3) as iterator:
        epochs = [sum((batch.ids for batch in take(iterator, 3)), ()) for _ in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 9 for epoch in epochs)
    assert len(set(epochs)) == 4  # each in its own order


def test_seed_changes_the_order(mixture):
    with batches(mixture, seed=4) as iterator:
        assert names(take(iterator, 5)) != names_of(mixture, 0, 5)


def test_mixture_ratio_of_batches(mixture):
    with batches(mixture) as iterator:
        schedule = iterator._loader.schedule
    counts = collections.Counter(mixture.streams[schedule[step][0]].bucket.task for step in range(4096))
    expected = collections.Counter()
    for stream in mixture.streams:
        expected[stream.bucket.task] += stream.weight
    for task, weight in expected.items():
        assert counts[task] / 4096 == pytest.approx(weight, abs=2 / 4096)


def test_worker_processes_change_nothing(mixture):
    with batches(mixture, num_workers=2) as iterator:
        there = take(iterator, 5)
        state = iterator.get_state()
    assert names(there) == names_of(mixture, 0, 5)
    assert type(there[0].data["image"]) is np.ndarray  # owned, not a view of a worker's shared memory
    with batches(mixture) as iterator:  # and a run may go on without them
        iterator.set_state(state)
        assert names(take(iterator, 3)) == names_of(mixture, 5, 3)


def broken_mixture(monkeypatch, bad):
    items = [record(i) for i in range(12)]
    items[7] = dataclasses.replace(items[7], image=bad)
    monkeypatch.setitem(data_sources.SOURCES, "listed", lambda tasks: data_sources.parts_of(items))
    return make_mixture([{"name": "listed"}], BUCKETS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"no image", "record 'text_to_image-7' of 0:listed/.* cannot be used: ImageError: not an image"),
        (images.encode_png(np.zeros((99, 99, 3), np.uint8))[:60], "record 'text_to_image-7' .*truncated or corrupt"),
    ],
)
def test_a_broken_record_stops_the_run_by_name(monkeypatch, bad, message):
    with batches(broken_mixture(monkeypatch, bad), repeat=1, batch_size=4) as iterator:
        with pytest.raises(DataError, match=message):
            list(iterator)
        with pytest.raises(ValueError, match="this batch iterator is closed"):
            next(iterator)


def test_errors_of_build_row_name_the_record(mixture):
    def refuse(record, bucket):
        raise ValueError("prompt has 99 tokens, the budget is 32")

    with batches(mixture, build_row=refuse) as iterator, pytest.raises(DataError, match=r"record '.*-.*99 tokens"):
        next(iterator)


CRASH = """
    import sys, numpy as np
    from unifusion_jax.data import TASKS, Buckets, Budget, make_batches, make_mixture

    def build_row(record, bucket):
        if record.id.endswith("-5"):
            {fault}
        return record.image

    def collate(rows, bucket):
        return np.stack(rows)

    if __name__ == "__main__":
        buckets = Buckets({{task: Budget(8, 1, 8) for task in TASKS}}, area_px=256, multiple_of_px=8)
        mixture = make_mixture([{{"name": "records", "path": sys.argv[1]}}], buckets)
        batches = make_batches(
            mixture, batch_size=4, seed=0, build_row=build_row, collate=collate, num_workers={workers}
        )
        for batch in batches:  # never closed: the failure itself must end everything
            if batch.step == 200:
                raise SystemExit(0)
"""


def run(script, folder):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), folder]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("workers", "fault", "message"),
    [
        (0, "raise RuntimeError('fell over')", "fell over"),
        (1, "raise RuntimeError('fell over')", "fell over"),
        (1, "import os; os._exit(9)", "terminated unexpectedly with exit code 9"),
    ],
)
def test_a_crash_ends_the_program(tmp_path, folder, workers, fault, message):
    script = tmp_path / "crash.py"
    script.write_text(textwrap.dedent(CRASH).format(workers=workers, fault=fault))
    done = run(script, folder)
    assert done.returncode == 1, done.stderr
    assert message in done.stderr


def test_leaving_without_close_does_not_hang(tmp_path, folder):
    script = tmp_path / "leave.py"
    script.write_text(textwrap.dedent(CRASH).format(workers=0, fault="pass"))
    done = run(script, folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": [7, 8]}, r"rows lie in the global batch, .0, 8., got .7, 8."),
        ({"batch_size": 0}, "expected batch_size >= 1"),
        ({"repeat": 0}, "repeat must be at least 1 pass, or None"),
        ({"num_workers": -1}, "expected num_workers >= 0"),
        ({"prefetch_batches": 0}, "prefetch_batches >= 1"),
        ({"start_step": -1}, "a data step lies in .0, .*got -1"),
        ({"start_step": 99, "repeat": 1}, "a data step lies in .0, 8., got 99"),
    ],
)
def test_bad_arguments(mixture, options, message):
    with pytest.raises(ValueError, match=message):
        batches(mixture, **options)


def test_state_of_other_data_is_refused(mixture, folder):
    other = make_mixture([{"name": "records", "path": folder}], BUCKETS)
    with batches(mixture) as iterator:
        state = iterator.get_state()
        with pytest.raises(ValueError, match=r"batch_size was 16, is 8.*or start a new workdir"):
            iterator.set_state({**state, "batch_size": 16})
        with pytest.raises(ValueError, match=r"has the keys .*got {'step': 3}"):
            iterator.set_state({"step": 3})
        with pytest.raises(ValueError, match="a data step lies in"):
            iterator.set_state({**state, "next_step": True})
    with batches(other) as iterator, pytest.raises(ValueError, match=r"mixture was .*, is .*"):
        iterator.set_state(state)


def test_references_of_the_same_size_show_the_same_cut():
    bucket = BUCKETS.assign("edit", 16, 16)
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    small = np.full((5, 7, 3), 9, np.uint8)
    fitted = pipeline.fit_record(record(0, "edit", image=wide, images=(wide, images.encode_png(wide), small)), bucket)
    assert (fitted.image == 200).all()
    assert (fitted.images[0] == 200).all()
    assert (fitted.images[1] == 200).all()
    assert fitted.images[2].shape == (5, 7, 3)


def test_shapes_are_a_source():
    entry = {"name": "shapes", "tasks": {"text_to_image": 0.9, "edit": 0.1}, "derive": {"joint": 0.1}, "size_px": 96}
    buckets = Buckets({task: Budget(32, 4, 16) for task in TASKS}, area_px=96 * 96)
    mixture = make_mixture([entry], buckets)
    assert [stream.bucket.task for stream in mixture.streams] == ["edit", "text_to_image", "joint"]
    with batches(mixture, batch_size=2) as iterator:
        batch = next(iterator)
    assert batch.data["image"].shape == (2, 96, 96, 3)
    assert batch.ids[0].startswith("shapes/train/")
