"""The benchmarks of inference at toy sizes: both sides compute the same, or are of one size."""

import sys

import pytest

sys.path.insert(0, "benchmarks")

import decode
import sampling
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
