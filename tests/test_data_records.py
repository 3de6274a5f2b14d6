"""Records and shards: what is written comes back, and what is malformed says so."""

import json

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unifusion_jax.data import RecordSource, images, records, shards, write_records
from unifusion_jax.data.records import Record


def pixels(seed=0, height_px=6, width_px=8):
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), np.uint8)


def record(number=0, task="text_to_image", references=0, **changes):
    fields = {"id": f"r{number}", "task": task, "prompt": f"prompt {number}", "target": None, "image": pixels(number)}
    return Record(**{**fields, "images": tuple(pixels(100 + i) for i in range(references)), **changes})


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    identifier=st.text(min_size=1),
    task=st.sampled_from(records.TASKS),
    prompt=st.text(),
    target=st.none() | st.text(),
    blob=st.binary(),
    facts=st.dictionaries(st.text(), json_like, max_size=3),
    count=st.integers(2, 4),
)
def test_record_survives_serialisation(identifier, task, prompt, target, blob, facts, count):
    references = () if task == "text_to_image" else tuple(blob + bytes([i]) for i in range(count))
    before = Record(identifier, task, prompt, target, blob, references, facts)
    after = records.from_bytes(records.to_bytes(before))
    for name in ("id", "task", "prompt", "target", "image", "images", "facts"):
        assert getattr(after, name) == getattr(before, name), name


def test_pixel_arrays_are_stored_without_loss():
    before = record(task="edit", references=2)
    after = records.from_bytes(records.to_bytes(before))
    np.testing.assert_array_equal(images.decode(after.image), before.image)
    for stored, original in zip(after.images, before.images, strict=True):
        np.testing.assert_array_equal(images.decode(stored), original)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "id must not be empty"),
        ({"task": "inpaint"}, "unknown task 'inpaint'; expected one of text_to_image"),
        ({"image": "a.png"}, "must be a uint8 array or encoded bytes, got str"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, r"must be uint8 \[h, w, 3\], got float32"),
        ({"image": np.zeros((4, 4), np.uint8)}, r"got uint8 \[4, 4\]"),
        ({"images": (b"x",)}, "takes exactly 0 reference images, got 1"),
        ({"task": "edit"}, "edit takes 1 or more reference images, got 0"),
        ({"task": "multi_reference", "images": (b"x",)}, "takes 2 or more reference images, got 1"),
    ],
)
def test_malformed_records_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        record(**changes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xc1garbage", "is not a serialised record"),
        (b"", "is not a serialised record"),
        (msgpack.packb([1, 2]), "expected a map with a version, got list"),
        (msgpack.packb({"version": 99}), "has schema version 99, this program reads 1"),
        (msgpack.packb({"version": 1, "id": "a"}), "has the keys .*'id', 'version'.*expected"),
    ],
)
def test_bytes_that_are_no_record_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        records.from_bytes(data)


@pytest.mark.parametrize(
    ("name", "value"), [("prompt", None), ("target", 3), ("images", {}), ("image", "x"), ("facts", 1)]
)
def test_fields_of_the_wrong_type_are_refused(name, value):
    fields = {**msgpack.unpackb(records.to_bytes(record())), name: value}
    with pytest.raises(ValueError, match=f"here: {name} is of type {type(value).__name__}, expected"):
        records.from_bytes(msgpack.packb(fields), where="here")


def test_truncated_record_names_its_place():
    with pytest.raises(ValueError, match="shard 3: record 7 is not a serialised record"):
        records.from_bytes(records.to_bytes(record())[:-4], where="shard 3: record 7")


def test_facts_that_cannot_be_stored_name_the_record():
    with pytest.raises(ValueError, match=r"record 'r0' cannot be serialised.*JSON-like"):
        records.to_bytes(record(facts={"when": object()}))


def test_derived_tasks():
    base = record(target="long description")
    again = records.derive(base, "reconstruction")
    assert (again.task, again.target, again.prompt) == ("reconstruction", "", records.RECONSTRUCTION_PROMPT)
    assert again.images[0] is base.image
    joint = records.derive(base, "joint")
    assert (joint.prompt, joint.target, len(joint.images)) == (base.prompt, "long description", 1)
    assert records.derive(base, "text_to_image") is base
    with pytest.raises(ValueError, match="only text_to_image records can be derived from, got 'edit'"):
        records.derive(record(task="edit", references=1), "joint")
    with pytest.raises(ValueError, match="cannot derive 'edit'"):
        records.derive(base, "edit")


def test_as_record_takes_look_alikes_and_names_what_lacks():
    class Like:
        id, task, prompt, target, image = "x", "text_to_image", "p", None, pixels()

    assert isinstance(records.as_record(Like()), Record)
    with pytest.raises(ValueError, match="yielded dict without id, task"):
        records.as_record({})


@pytest.mark.parametrize("count", [1, 3, 10])
def test_shards_hold_every_record_once(tmp_path, count):
    written = [record(i, *(("edit", 1) if i % 2 else ("text_to_image", 0))) for i in range(count)]
    info = write_records(written, tmp_path / "set", shards=3)
    source = RecordSource(tmp_path / "set")
    assert len(source) == count == info["records"]
    assert sorted(source[i].id for i in range(count)) == sorted(r.id for r in written)
    for i in range(count):
        assert records.TASKS[source.tasks[i]] == source[i].task
        assert (source.heights_px[i], source.widths_px[i]) == (6, 8)
    assert info["aspect_ratios"] == {"1.33": count}
    assert sum(info["tasks"].values()) == count
    assert not list((tmp_path / "set").glob("*.tmp"))


def test_shard_sizes_come_from_upright_images(tmp_path):
    tall = images.encode_png(pixels(height_px=12, width_px=5))
    write_records([record(image=tall)], tmp_path)
    source = RecordSource(tmp_path)
    assert (source.heights_px[0], source.widths_px[0]) == (12, 5)
    assert source[0].image == tall  # kept byte for byte


def test_failed_writing_leaves_no_data_set(tmp_path):
    def items():
        yield record()
        raise RuntimeError("the producer failed")

    with pytest.raises(RuntimeError, match="the producer failed"):
        write_records(items(), tmp_path / "set", shards=2)
    assert not list((tmp_path / "set").iterdir())
    with pytest.raises(ValueError, match=r"is not a prepared data set: it has no dataset.json.*unifusion_jax.prepare"):
        RecordSource(tmp_path / "set")


def test_existing_data_set_is_not_overwritten(tmp_path):
    write_records([record()], tmp_path)
    with pytest.raises(ValueError, match="already holds a data set"):
        write_records([record()], tmp_path)


def edit_info(folder, **changes):
    path = folder / shards.DATASET_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_data_sets_are_refused(tmp_path):
    write_records([record(i) for i in range(4)], tmp_path, shards=2)
    shard, other = sorted(tmp_path.glob("*.arrayrecord"))
    original = shard.read_bytes()

    shard.write_bytes(original[: len(original) // 2])
    with pytest.raises(ValueError, match="has 65536 bytes, expected 131072: truncated"):
        RecordSource(tmp_path)
    shard.write_bytes(original)

    index = other.with_suffix(".index.npz")
    index.write_bytes(b"not an index")
    with pytest.raises(ValueError, match=r"index.npz is missing or damaged"):
        RecordSource(tmp_path)

    other.unlink()
    with pytest.raises(ValueError, match=r"shard records-00001-of-00002.arrayrecord is missing"):
        RecordSource(tmp_path)


def test_unfinished_and_foreign_data_sets_are_refused(tmp_path):
    write_records([record()], tmp_path)
    edit_info(tmp_path, complete=False)
    with pytest.raises(ValueError, match=r"is unfinished \(1 records written.*run the same prepare command again"):
        RecordSource(tmp_path)
    assert len(RecordSource(tmp_path, allow_incomplete=True)) == 1
    edit_info(tmp_path, schema_version=2)
    with pytest.raises(ValueError, match="has schema version 2, this program reads 1"):
        RecordSource(tmp_path)
    (tmp_path / shards.DATASET_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"dataset.json is damaged"):
        RecordSource(tmp_path)


def test_empty_data_set_is_refused(tmp_path):
    write_records([], tmp_path)
    with pytest.raises(ValueError, match="holds no records"):
        RecordSource(tmp_path)
