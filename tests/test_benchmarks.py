"""The benchmarks at toy sizes: both sides compute the same, or are of one size."""

import sys

import pytest

sys.path.insert(0, "benchmarks")

import checkpointing
import decode
import input_pipeline
import sampling
import training
import verifi


def test_both_sides_decode_the_same_tokens(tmp_path):
    case = {"rows": 3, "words": 5}
    decode.make_model(str(tmp_path), 64, 2, 500, **case)
    settings = {"folder": str(tmp_path), **case, "new_tokens": 6, "dtype": "float32", "device": "cpu", "repeats": 1}
    ours, theirs = decode.ours(**settings), decode.theirs(**settings)
    assert ours["token_ids"] == theirs["token_ids"] and [len(ids) for ids in ours["token_ids"]] == [6] * 3
    assert min(ours["time_s"], theirs["time_s"]) > 0


def test_single_pass_and_encoding_again_give_the_same_states(tmp_path):
    size = {"width": 128, "layers": 2, "tile_px": 28, "vocabulary": 500}
    found = {}
    for mode in ("single", "again"):
        states = str(tmp_path / f"{mode}.npz")
        found[mode] = verifi.run(mode, size, rows=2, new_tokens=4, tiles=2, repeats=1, states=states)
    assert found["single"]["tokens"] == found["again"]["tokens"] > 8
    assert verifi.error(*(str(tmp_path / f"{mode}.npz") for mode in found))["error"] < 1e-4


def test_both_transformers_are_of_one_size():
    size = {"width": 128, "layers": 2}
    case = {"side": 3, "condition_tokens": 5, "batch": 2, "steps": 2, "repeats": 1}
    theirs = sampling.theirs(**size, **case)
    ours = sampling.ours(**size, **case, parameters=sampling.count(**size)["parameters"])
    assert ours["parameters"] == pytest.approx(theirs["parameters"], rel=0.02)
    assert min(ours["time_s"], ours["chunked_s"], theirs["time_s"]) > 0


def test_both_training_steps_are_of_one_size():
    size = {"width": 64, "layers": 2}
    case = {"side": 3, "condition_tokens": 5, "batch": 2, "steps": 1, "repeats": 1}
    theirs = training.theirs(**size, **case, device="cpu", compiled=False)
    ours = training.ours(**size, **case, **training.count(**size), dtype="float32", remat="none")
    assert ours["parameters"] == pytest.approx(theirs["parameters"], rel=0.05)
    assert min(ours["time_s"], ours["host_s"], theirs["time_s"]) > 0 and ours["mfu"] is None


def test_the_input_is_read_once_by_both_sides(tmp_path):
    case = {"folder": str(tmp_path), "images": 6, "size_px": 64}
    assert input_pipeline.make(**case)["bytes"] > 6_000
    ours = input_pipeline.rows(**case, batch=4, repeats=1)
    theirs = input_pipeline.pil(**case, repeats=1)
    assert min(ours["images_per_s"], theirs["images_per_s"]) > 0


def test_a_state_is_saved_and_restored_beside_a_plain_copy(tmp_path):
    case = {"folder": str(tmp_path), "gb": 0.002, "repeats": 1}
    ours, plain = checkpointing.ours(**case), checkpointing.plain(**case)
    assert ours["bytes"] == pytest.approx(plain["bytes"], rel=0.05)
    assert 0 < ours["stall_s"] <= ours["save_s"] and min(ours["restore_s"], plain["save_s"]) > 0
    assert not list(tmp_path.iterdir())
