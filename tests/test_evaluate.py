"""The benchmarks of the built-in world: what painters of known skill score, and the command on a tiny model."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
from pipeline_support import shaken_model

from unifusion_jax import UniFusion, evaluate, exported
from unifusion_jax.data.shapes import (
    EDIT_KINDS,
    describe,
    detect,
    evaluation_compositions,
    evaluation_edits,
    parse_description,
    render,
    split_of,
)
from unifusion_jax.evaluation.shapes import (
    Drawing,
    compare_verifi,
    evaluate_compositions,
    evaluate_edits,
    evaluate_prompts,
)
from unifusion_jax.pipeline import Drawn

COUNT = 16
TRUTH = Drawing(text="truth", batch_size=8)


class Painter(UniFusion):
    """Paints each prompt with a function instead of a network."""

    def __init__(self, paint):
        self.paint = paint

    def draw(self, prompts, **options):
        for prompt in prompts:
            text = prompt.instruction if prompt.target is None else prompt.target
            yield Drawn(PIL.Image.fromarray(np.asarray(self.paint(prompt))), text)


# Reads the true description.
perfect = Painter(lambda prompt: render(parse_description(prompt.target)))
# Gives the first reference back.
copier = Painter(lambda prompt: prompt.images[0])
blank = Painter(lambda prompt: np.full((96, 96, 3), 255, np.uint8))


def test_a_perfect_painter_scores_one_everywhere():
    for benchmark in (evaluate_prompts, evaluate_edits, evaluate_compositions):
        scores = benchmark(perfect, TRUTH, count=COUNT)
        assert {name.split("/")[0] for name in scores} == {"seen", "held_out"}
        assert set(scores.values()) == {1.0}, benchmark


def test_who_changes_nothing_preserves_all_and_edits_nothing():
    scores = evaluate_edits(copier, TRUTH, count=COUNT, pairs=["seen"])
    assert scores["seen/edit_success_rate"] == 0.0 and scores["seen/all_correct"] == 0.0
    assert scores["seen/preservation_rate"] == 1.0 and scores["seen/description_correct"] == 1.0


def test_who_paints_nothing_preserves_little():
    scores = evaluate_edits(blank, TRUTH, count=4 * len(EDIT_KINDS), pairs=["seen"])
    assert scores["seen/preservation_rate"] < 0.6
    assert scores["seen/recolour/edit_success_rate"] == 0.0
    assert {name.split("/")[1] for name in scores} >= set(EDIT_KINDS)
    compositions = evaluate_compositions(blank, TRUTH, count=COUNT, pairs=["seen"])
    assert compositions["seen/objects"] == compositions["seen/all_correct"] == 0.0


def test_verifi_is_compared_on_the_same_prompts():
    def paint(prompt):
        # Decodes nothing: with the true description perfect, without it blank.
        return (
            np.full((96, 96, 3), 255, np.uint8) if prompt.target is None else render(parse_description(prompt.target))
        )

    scores = compare_verifi(Painter(paint), Drawing(batch_size=8), count=8, pairs=["seen"])
    assert scores["truth/seen/all_correct"] == 1.0
    assert (
        scores["verifi/seen/all_correct"] == scores["words/seen/all_correct"] == 0.0 == scores["gain/seen/all_correct"]
    )


def test_held_out_requests_are_held_out_and_stay_the_same():
    edits, more = evaluation_edits(8), evaluation_edits(12)
    assert more[:8] == edits and [edit.kind for edit in edits] == list(EDIT_KINDS)[:8]
    for edit in edits + evaluation_compositions(4):
        assert split_of(edit.target) == "held_out"
        assert detect(np.asarray(render(edit.target))).scene == edit.target
    assert {len(edit.sources) for edit in evaluation_compositions(6)} == {2}
    assert {len(edit.sources) for edit in evaluation_compositions(3, references=3)} == {3}
    with pytest.raises(ValueError, match="2 or 3 reference pictures, got 1"):
        evaluation_compositions(1, references=1)


def test_zero_shot_edits_are_asked_for_by_the_whole_scene():
    asked = []
    painter = Painter(lambda prompt: asked.append(prompt) or prompt.images[0])
    edits = evaluation_edits(4)
    evaluate_edits(painter, Drawing(mode="zero_shot_edit"), count=4, pairs=["seen"])
    assert [prompt.instruction for prompt in asked] == [describe(edit.target) for edit in edits]
    asked.clear()
    evaluate_edits(painter, Drawing(), count=4, pairs=["seen"])
    assert [prompt.instruction for prompt in asked] == [edit.instruction for edit in edits]


@pytest.fixture(scope="module")
def checkpoint(frozen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model = shaken_model(frozen)
    exported.write(folder, dataclasses.replace(model.config), model.model_config, model.params)
    return folder


@pytest.mark.parametrize("benchmark", ["shapes", "shapes_edits", "shapes_compose"])
def test_the_command(checkpoint, tmp_path, capsys, benchmark):
    output = tmp_path / "deep/scores.json"
    arguments = [f"--benchmark={benchmark}", f"--checkpoint={checkpoint}", "--count=2", "--steps=1", "--text=words"]
    assert evaluate.main([*arguments, "--pairs=seen", f"--output={output}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(output.read_text())
    assert printed["scores"]["seen/all_correct"] == 0.0 and printed["text"] == "words" and printed["steps"] == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--count=0", "--count must be at least 1, got 0"),
        ("--steps=0", "steps must be at least 1, got 0"),
        ("--mode=edits", "no mode 'edits'"),
        ("--mode=edit", "takes exactly 1 reference pictures, got 0"),
        ("--pairs=unseen", "unseen"),
        ("--batch_size=0", "batch_size must be at least 1, got 0"),
        ("--checkpoint=/no/such", "No folder '/no/such'"),
    ],
)
def test_mistakes(checkpoint, capsys, option, message):
    assert evaluate.main(["--benchmark=shapes", f"--checkpoint={checkpoint}", "--count=2", option]) == 1
    assert message in capsys.readouterr().err
