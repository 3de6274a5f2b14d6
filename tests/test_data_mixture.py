"""Buckets, schedule and mixture: which batch holds what."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unifusion_jax.data import TASKS, Bucket, Buckets, Budget, Record, make_mixture, register, sources, write_records
from unifusion_jax.data.schedule import BLOCK_STEPS, EpochSchedule, Schedule, fold, shares, shuffled

BUDGETS = {task: Budget(max_tokens=32, max_tiles=4, max_kept_tokens=16) for task in TASKS}
SQUARE = Buckets(BUDGETS, area_px=16 * 16, multiple_of_px=8, max_aspect=1.0)


def test_orders_never_change():
    # Literal values: a resumed run of any later version must see the same order.
    assert fold(0, "a", 1) == 1208860661
    assert [shuffled(i, 7, 3) for i in range(14)] == [3, 5, 4, 1, 6, 0, 2, 2, 4, 0, 6, 3, 5, 1]
    schedule = Schedule([0.7, 0.3], seed=5, block_steps=10)
    streams = [schedule[step][0] for step in range(12)]
    assert streams == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 1]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_every_epoch_holds_every_index_once(count, seed, epoch):
    order = [shuffled(position, count, seed) for position in range(epoch * count, (epoch + 1) * count)]
    assert sorted(order) == list(range(count))


def test_epochs_are_ordered_differently():
    orders = {tuple(shuffled(epoch * 20 + i, 20, 0) for i in range(20)) for epoch in range(10)}
    assert len(orders) == 10


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30), st.integers(30, 500))
def test_shares_add_up_and_leave_nobody_out(weights, total):
    counts = shares(weights, total)
    assert counts.sum() == total
    assert counts.min() >= 1
    exact = np.array(weights) / np.sum(weights) * total
    assert np.abs(counts - exact).max() <= len(weights)  # within 1, but for what the minimum of 1 takes away


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights must be positive numbers"):
        shares(weights, 100)
    with pytest.raises(ValueError, match="5 streams do not fit into a schedule block of 4 steps"):
        shares([1] * 5, 4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 99))
def test_schedule_counts_match_a_replay(weights, seed):
    schedule = Schedule(weights, seed, block_steps=32)
    seen = collections.Counter()
    for step in range(100):
        stream, occurrence = schedule[step]
        assert occurrence == seen[stream]
        seen[stream] += 1
    fresh = Schedule(weights, seed, block_steps=32)
    assert fresh[77] == schedule[77]  # no state, any order


def test_schedule_keeps_the_ratios_in_every_block_and_far_away():
    weights = [0.9, 0.07, 0.03]
    schedule = Schedule(weights, seed=0)
    for start in (0, BLOCK_STEPS, 10**9 * BLOCK_STEPS):
        counts = np.bincount([schedule[start + i][0] for i in range(BLOCK_STEPS)])
        np.testing.assert_allclose(counts / BLOCK_STEPS, weights, atol=1 / BLOCK_STEPS)
    head = np.bincount([schedule[step][0] for step in range(400)], minlength=3) / 400
    np.testing.assert_allclose(head, weights, atol=0.05)  # short runs are close as well


def test_epoch_schedule_is_exact():
    schedule = EpochSchedule([3, 1, 2], seed=1)
    assert sorted(schedule[step] for step in range(len(schedule))) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 40), st.sampled_from([8, 16, 64]), st.floats(1, 4))
def test_bucket_sizes(cells, unit, max_aspect):
    buckets = Buckets(BUDGETS, area_px=cells * unit * unit, multiple_of_px=unit, max_aspect=max_aspect)
    for height_px, width_px in buckets.sizes_px:
        assert height_px % unit == width_px % unit == 0
        assert height_px * width_px <= cells * unit * unit
        assert max(height_px / width_px, width_px / height_px) <= max_aspect
        assert (width_px, height_px) in buckets.sizes_px
        bucket = buckets.assign("edit", height_px * 3, width_px * 3)
        assert (bucket.height_px, bucket.width_px) == (height_px, width_px)


def test_known_bucket_sizes():
    demo = Buckets(BUDGETS, area_px=96 * 96, multiple_of_px=16)
    assert demo.sizes_px == ((112, 80), (96, 96), (80, 112))
    assert demo.assign("joint", 1, 1000) == Bucket("joint", 80, 112, 32, 4, 16)
    final = Buckets(BUDGETS, area_px=1024 * 1024, multiple_of_px=64)
    assert (1024, 1024) in final.sizes_px
    assert len(final.sizes_px) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"area_px": 15}, "area_px=15 holds no image whose sides are multiples of 8 px; expected at least 64"),
        ({"max_aspect": 0.5}, "at least 1; got 0.5"),
        ({"budgets": {"draw": BUDGETS["edit"]}}, r"budgets name the tasks \['draw'\]"),
        ({"budgets": {}}, "expected some of text_to_image"),
    ],
)
def test_bad_buckets(changes, message):
    with pytest.raises(ValueError, match=message):
        Buckets(**{"budgets": BUDGETS, "area_px": 256, "multiple_of_px": 8, **changes})


@pytest.mark.parametrize("values", [(0, 1, 1), (8, -1, 1), (8, 0, 9), (8, 0, 0)])
def test_bad_budgets(values):
    with pytest.raises(ValueError, match="a budget needs"):
        Budget(*values)


def test_task_without_budget():
    buckets = Buckets({"edit": BUDGETS["edit"]}, area_px=256)
    with pytest.raises(ValueError, match="no token budget for the task 'joint'; got budgets for edit"):
        buckets.assign("joint", 8, 8)


def record(number, task="text_to_image", size=(16, 16)):
    image = np.full((*size, 3), number % 256, np.uint8)
    references = {"text_to_image": 0, "edit": 1, "multi_reference": 2}[task]
    return Record(f"{task}{number}", task, "p", None, image, (image,) * references)


@pytest.fixture
def mixed(tmp_path):
    items = [record(i) for i in range(30)] + [record(i, "edit") for i in range(10)]
    items += [record(i, "text_to_image", (16, 32)) for i in range(10)] + [record(0, "text_to_image", (64, 16))]
    write_records(items, tmp_path / "mixed", shards=2)
    return str(tmp_path / "mixed")


def weights(mixture):
    result = collections.Counter()
    for stream in mixture.streams:
        result[stream.bucket.task] += stream.weight
    return result


def test_tasks_weigh_by_their_records_unless_told(mixed):
    plain = make_mixture([{"name": "records", "path": mixed}], SQUARE)
    assert weights(plain) == pytest.approx({"text_to_image": 41 / 51, "edit": 10 / 51})
    told = make_mixture([{"name": "records", "path": mixed, "tasks": {"edit": 3, "text_to_image": 1}}], SQUARE)
    assert weights(told) == pytest.approx({"edit": 0.75, "text_to_image": 0.25})
    one = make_mixture([{"name": "records", "path": mixed, "task": "edit"}], SQUARE)
    assert weights(one) == pytest.approx({"edit": 1})


def test_derived_tasks_take_their_share_and_keep_the_records(mixed):
    entry = {"name": "records", "path": mixed, "derive": {"reconstruction": 0.03, "joint": 0.02}}
    mixture = make_mixture([entry], SQUARE)
    assert weights(mixture) == pytest.approx(
        {"text_to_image": 0.95 * 41 / 51, "edit": 0.95 * 10 / 51, "reconstruction": 0.03, "joint": 0.02}
    )
    assert sum(len(stream.indices) for stream in mixture.streams if stream.bucket.task == "joint") == 41
    only_derived_from = make_mixture([{**entry, "tasks": {"edit": 1}}], SQUARE)
    assert weights(only_derived_from) == pytest.approx({"edit": 0.95, "reconstruction": 0.03, "joint": 0.02})


def test_sources_share_by_weight(mixed):
    entries = [{"name": "records", "path": mixed, "weight": 3}, {"name": "shapes", "task": "edit", "length": 5}]
    mixture = make_mixture(entries, SQUARE)
    assert sum(s.weight for s in mixture.streams if s.name.startswith("0:records")) == pytest.approx(0.75)
    assert sum(s.weight for s in mixture.streams if s.name.startswith("1:shapes")) == pytest.approx(0.25)
    assert "1:shapes/edit/16x16" in mixture.table()
    assert "25.00%" in mixture.table()


def test_buckets_of_records_and_the_joining_of_small_ones(mixed):
    buckets = Buckets(BUDGETS, area_px=512, multiple_of_px=8, max_aspect=2.0)
    entry = {"name": "records", "path": mixed, "task": "text_to_image"}

    def sizes(**options):
        mixture = make_mixture([entry], buckets, **options)
        assert sum(s.weight for s in mixture.streams) == pytest.approx(1)
        return {(s.bucket.height_px, s.bucket.width_px): len(s.indices) for s in mixture.streams}

    assert sizes() == {(16, 16): 30, (16, 32): 10, (32, 16): 1}
    assert sizes(min_records=5) == {(16, 16): 31, (16, 32): 10}
    assert sizes(min_records=20) == {(16, 16): 41}
    assert sizes(min_records=999) == {(16, 16): 41}  # nothing is large enough: one bucket


def test_fingerprint_tells_mixtures_apart(mixed):
    entry = {"name": "records", "path": mixed}
    base = make_mixture([entry], SQUARE).fingerprint
    assert make_mixture([entry], SQUARE).fingerprint == base
    for other in ({"tasks": {"edit": 1}}, {"tasks": {"edit": 1, "text_to_image": 9}}, {"derive": {"joint": 0.1}}):
        assert make_mixture([{**entry, **other}], SQUARE).fingerprint != base
    assert make_mixture([entry], Buckets(BUDGETS, area_px=32 * 32, max_aspect=1.0)).fingerprint != base


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "x"}, "a data source needs a name"),
        ({"name": "record"}, "there is no data source 'record'.*did you mean 'records'"),
        ({"name": "shapes", "weight": 0}, "weight must be a positive number, got 0"),
        ({"name": "shapes", "weight": "1"}, "weight must be a positive number, got '1'"),
        ({"name": "shapes", "tasks": {"paint": 1}}, r"tasks names \['paint'\], expected some of text_to_image"),
        ({"name": "shapes", "task": "edit", "tasks": {"edit": 1}}, "give either task or tasks"),
        ({"name": "shapes", "derive": {"edit": 0.1}}, r"derive names \['edit'\]"),
        ({"name": "shapes", "derive": {"joint": 1.5}}, "derive takes 1.5"),
        ({"name": "shapes", "tasks": {"joint": 1}, "derive": {"joint": 0.5}}, "both read and derived"),
        ({"name": "shapes", "sise": 3}, "does not take the options.*unexpected keyword argument 'sise'"),
        ({"name": "records"}, "does not take the options.*'path'"),
        ({"name": "records", "path": "/nowhere"}, "is not a prepared data set"),
    ],
)
def test_bad_source_entries(entry, message):
    with pytest.raises(ValueError, match=message):
        make_mixture([entry], SQUARE)


def test_missing_tasks_are_named(mixed):
    with pytest.raises(ValueError, match=r"has no records of \['multi_reference'\]; it has edit"):
        make_mixture([{"name": "records", "path": mixed, "tasks": {"edit": 1, "multi_reference": 1}}], SQUARE)
    with pytest.raises(ValueError, match=r"data.sources is empty"):
        make_mixture([], SQUARE)


def test_own_sources_can_be_registered(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", dict(sources.SOURCES))

    @register("mine")
    def open_mine(tasks, *, count):
        return sources.parts_of([record(i) for i in range(count)])

    mixture = make_mixture([{"name": "mine", "count": 7}], SQUARE)
    assert [(s.name, len(s.indices)) for s in mixture.streams] == [("0:mine/text_to_image/16x16", 7)]
    with pytest.raises(ValueError, match="'mine' is already registered"):
        register("mine")(open_mine)
    monkeypatch.setitem(sources.SOURCES, "twice", lambda tasks: open_mine(tasks, count=2) + open_mine(tasks, count=3))
    with pytest.raises(ValueError, match="must come from one source object"):
        make_mixture([{"name": "twice"}], SQUARE)
    with pytest.raises(ValueError, match="holds no records"):
        make_mixture([{"name": "mine", "count": 0}], SQUARE)
