"""The micro-study: its arms, its resuming, its scores and the directions that its report names."""

import json

import numpy as np
import PIL.Image
import pytest
from test_analysis import Painter, checkpoint

from unifusion_jax import UniFusion, encoders
from unifusion_jax.analysis import findings, study
from unifusion_jax.analysis.findings import CLAIMS, Claim, compare, interval, verdict
from unifusion_jax.data.shapes.source import ShapesSource
from unifusion_jax.frozen import model_config_of
from unifusion_jax.pipeline import Drawn
from unifusion_jax.training.phases import phases
from unifusion_jax.verifi import SYSTEM_PROMPTS

TINY = study.Scoring(prompts=2, loss_batches=1, pictures=1, steps=1)


@pytest.mark.parametrize("name", study.ARMS)
def test_every_arm_has_a_model_that_fits(name, tmp_path):
    config = study.config_of(name, 1, 100, tmp_path)
    assert config.seed == 1 and config.total_steps == (50 if name == "edits" else 100)
    for phase in phases(config):
        model_config_of(phase.config, encoders.read_config(phase.config.encoder.path))


def test_arms_differ_where_they_should(tmp_path):
    def of(name):
        return study.config_of(name, 0, 100, tmp_path)

    assert [phase.until for phase in phases(of("continued"))] == [40, 100]
    assert of("lap").encoder.verifi and not of("lap_words").encoder.verifi and not of("t5_style").encoder.verifi
    assert of("edits").init_from == str(tmp_path / "pictures/seed_0/export")
    assert set(of("edits").data.budgets) == {"text_to_image", "edit"}  # two references are never trained on
    assert of("lap_refiner").conditioning.refines and not of("lap").conditioning.refines
    # One budget: nothing but the encoder's reading, the conditioning and the tasks differs.
    assert of("lap").optimizer == of("kv_fusion").optimizer and of("lap").dit == of("t5_style").dit


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    done = []

    def train(config, workdir):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append((workdir.parent.name, config.seed))
        (workdir / "checkpoints").mkdir(parents=True)

    def scores(config, model, scoring):
        values = dict.fromkeys(findings._MEASURES, 0.5 + 0.01 * config.seed)
        return values | {"held_out_loss": 0.1 if config.conditioning.strategy == "lap" else 0.2 + 0.001 * config.seed}

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "scores_of", scores)
    monkeypatch.setattr(UniFusion, "load", lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path / "runs", tmp_path / "docs", seeds=2, steps=10)
    assert len(done) == 5 and not (tmp_path / "docs").exists()
    done.append(None)  # past the interruption
    report = study.run(tmp_path / "runs", tmp_path / "docs", seeds=2, steps=10)
    trained = [entry for entry in done if entry]
    assert sorted(trained) == sorted((name, seed) for name in study.ARMS for seed in (0, 1))  # each once
    assert not list((tmp_path / "runs").glob("*/*/checkpoints"))
    text = report.read_text()
    assert (
        "| LAP over the last layer | LAP ahead (figure 4) | held-out loss | 0.1 | 0.2005 | +0.1 ± 0.0064 | agrees |"
        in text
    )
    assert "--seeds=2 --study_steps=10" in text and (tmp_path / "docs/findings.png").exists()
    again = study.run(tmp_path / "runs", tmp_path / "docs", seeds=2, steps=10)
    assert again.read_text() == text and len([entry for entry in done if entry]) == len(trained)


def test_one_seed_has_no_error_bars(tmp_path):
    with pytest.raises(ValueError, match="at least 2 seeds for its error bars, got 1"):
        study.run(tmp_path, tmp_path, seeds=1, steps=10)


def test_intervals_are_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5)


@pytest.mark.parametrize(
    ("mean", "half", "equal", "said"),
    [
        (0.3, 0.1, False, "agrees"),
        (-0.3, 0.1, False, "opposite"),
        (0.3, 0.4, False, "not resolved"),
        (0.3, 0.4, True, "no difference resolved, as in the paper"),
        (-0.3, 0.1, True, "differs: behind"),
    ],
)
def test_verdicts(mean, half, equal, said):
    assert verdict(Claim("", "", ("a", "facts"), ("b", "facts"), equal), mean, half) == said


def test_a_lower_loss_is_better_and_more_facts_are():
    scores = {"a": [{"held_out_loss": 1.0, "facts": 0.2}] * 3, "b": [{"held_out_loss": 1.5, "facts": 0.1}] * 3}
    for measure, gain in (("held_out_loss", 0.5), ("facts", 0.1)):
        line = compare(Claim("", "", ("a", measure), ("b", measure)), scores)
        assert line["better_by"] == pytest.approx(gain) and line["direction"] == "agrees"


def test_every_claim_is_about_scores_that_its_arms_have(tmp_path):
    for claim in CLAIMS:
        for arm, measure in (claim.ahead, claim.behind):
            assert arm in study.ARMS and measure in findings._MEASURES
            budgets = study.config_of(arm, 0, 10, tmp_path).data.budgets
            assert "psnr" not in measure or "reconstruction" in budgets
            assert "two_references" not in measure or "edit" in budgets


# Scores


@pytest.fixture(scope="module")
def model(frozen):
    return checkpoint(frozen)


def test_scores_of_a_checkpoint(model):
    scores = study.scores_of(model.config, model, TINY)
    assert set(scores) == set(findings._MEASURES) - {f"psnr_db_{tiles}_tiles" for tiles in (1, 5, 10)}
    assert all(np.isfinite(value) for value in scores.values()) and 0 <= scores["facts"] <= 1
    assert scores["held_out_loss"] == study.held_out_loss(model.config, model, 1)  # same times, same noises
    json.dumps(scores)


def test_the_held_out_loss_of_no_prediction_is_what_is_to_be_predicted(frozen):
    model = checkpoint(frozen)
    dit = model.params["dit"]
    dit["patch_out"]["kernel"], dit["patch_out"]["bias"] = (0 * dit["patch_out"][name] for name in ("kernel", "bias"))
    # v = noise - data with unit noise and independent data: the loss is 1 + E[data^2], so above 1.
    assert study.held_out_loss(model.config, model, 1) > 0.9
    assert study.held_out_loss(model.config, checkpoint(frozen), 1) != study.held_out_loss(model.config, model, 1)


def test_facts_of_perfect_and_of_blank_pictures(model):
    source = ShapesSource("text_to_image", split="held_out", num_objects=(1, 2))
    records = [source[index] for index in range(3)]

    class Drawer(Painter):
        def draw(self, prompts, **options):
            by_prompt = {record.prompt: np.asarray(record.image) for record in records}
            for prompt in prompts:
                pixels = by_prompt[prompt.instruction] if self.draws else np.full((96, 96, 3), 255, np.uint8)
                yield Drawn(PIL.Image.fromarray(pixels), prompt.instruction)

    prompts = [study.prompt_of(record, SYSTEM_PROMPTS[model.config.encoder.system_prompts]) for record in records]
    assert study.facts_correct(Drawer(model, draws=True), prompts, records, TINY) == 1
    assert study.facts_correct(Drawer(model, draws=False), prompts, records, TINY) < 0.5
