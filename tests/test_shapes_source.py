"""The built-in world as a source of records, and its evaluation prompts."""

import numpy as np
import pytest

from unifusion_jax.data import records
from unifusion_jax.data.shapes import edits, language, scene
from unifusion_jax.data.shapes.render import render
from unifusion_jax.data.shapes.scene import split_of
from unifusion_jax.data.shapes.source import ShapesSource, evaluation_prompts


@pytest.mark.parametrize("task", records.TASKS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_records_are_a_function_of_seed_and_index(task, split):
    source, again = (ShapesSource(task, split=split, seed=3, length=100) for _ in range(2))
    other = ShapesSource(task, split=split, seed=4, length=100)
    assert len(source) == 100
    for index in (99, 7):
        record = source[index]
        assert isinstance(record, records.Record)
        assert records.to_bytes(record) == records.to_bytes(again[index])
        assert record.id == f"shapes/{split}/{task}/3/{index}"
        assert records.to_bytes(source[index - 100]) == records.to_bytes(record)
    assert any(source.scene(k) != other.scene(k) for k in range(3))
    with pytest.raises(IndexError, match="outside a source of 100 examples"):
        source[100]


@pytest.mark.parametrize("task", records.TASKS)
def test_records_hold_together(task):
    source = ShapesSource(task, split="held_out", seed=1)
    for index in range(10):
        record, wanted = source[index], source.scene(index)
        assert split_of(wanted) == "held_out"
        np.testing.assert_array_equal(record.image, render(wanted))
        assert record.facts["scene"] == language.describe(wanted)
        assert [language.Fact(**entry) for entry in record.facts["stated"]]
        references = [language.parse_description(text) for text in record.facts["sources"]]
        assert len(references) == len(record.images)
        if task == "reconstruction":
            assert (record.prompt, record.target) == ("Reproduce this image.", "")
        else:
            assert language.parse_description(record.target) == wanted
        if task in ("reconstruction", "joint"):
            np.testing.assert_array_equal(record.images[0], record.image)
        if task == "edit":
            assert references[0] != wanted and record.facts["edit"] in edits.EDIT_KINDS
        restored = records.from_bytes(records.to_bytes(record))
        assert restored.facts == dict(record.facts)


def test_a_source_draws_the_size_and_counts_asked_for():
    source = ShapesSource("joint", size_px=[48, 64], num_objects=[1])
    record = source[0]
    assert record.image.shape == record.images[0].shape == (64, 48, 3)
    assert {len(source.scene(k).objects) for k in range(20)} == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "video"}, "task is 'video', but must be one of text_to_image"),
        ({"split": "test"}, "split is 'test'"),
        ({"length": 0}, "at least one example"),
        ({"seed": -1}, "must not be negative"),
        ({"pairs": "held_out"}, "the train split has no held-out pairs"),
    ],
)
def test_wrong_sources_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShapesSource(**options)


@pytest.mark.parametrize("pairs", ["seen", "held_out"])
def test_evaluation_prompts_are_unseen_and_stable(pairs):
    prompts = evaluation_prompts(40, num_objects=(1, 2), seed=5, pairs=pairs)
    assert prompts[:10] == evaluation_prompts(10, num_objects=(1, 2), seed=5, pairs=pairs)
    for prompt, facts, item in prompts:
        assert prompt and facts and len(item.objects) in (1, 2)
        assert split_of(item) == "held_out"
        assert scene.has_held_out_pair(item) == (pairs == "held_out")
