"""The micro-study: every conditioning strategy trained at demo size with one budget and several seeds, then scored.

A run is a training of its own workdir, so an interrupted study goes on where it stopped; what is scored is kept.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from unifusion_jax.analysis import findings
from unifusion_jax.analysis.figure import Options
from unifusion_jax.analysis.tile_scaling import tile_scaling
from unifusion_jax.config import from_mapping
from unifusion_jax.data.records import Record
from unifusion_jax.data.shapes.detector import detect
from unifusion_jax.data.shapes.language import Fact
from unifusion_jax.data.shapes.scoring import score
from unifusion_jax.data.shapes.source import ShapesSource
from unifusion_jax.flow import SamplingConfig
from unifusion_jax.parallel.mesh import make_mesh
from unifusion_jax.parallel.sharding import global_batch
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.prompt import DEFAULT_GUIDANCE, Prompt
from unifusion_jax.train import run as train
from unifusion_jax.training import ablations
from unifusion_jax.training.config import EncoderRef, FirstPhase, TrainConfig
from unifusion_jax.training.presets import SHAPES_BUDGETS
from unifusion_jax.training.rng import stream_key
from unifusion_jax.training.tasks import make_task
from unifusion_jax.verifi import SYSTEM_PROMPTS, prompt_of

STEPS = 240
SCORES_FILE = "scores.json"
_FIRST_SHARE = 0.4  # of the steps with the first encoder, as in the paper's figure 23
_BATCH = 48


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting of the study.

    Attributes:
      changes: what differs from the ablations' base, see `ablations.BARS`.
      tasks: shares of the tasks it trains; text to image alone when empty.
      after: arm whose model it goes on from.
      length: its steps over those of the others.
    """

    changes: Mapping[str, Any]
    tasks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    after: str = ""
    length: float = 1.0


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How runs are scored.

    Attributes:
      prompts: held-out prompts, of text to image and of two references each.
      loss_batches: held-out batches for the loss.
      pictures: pictures that are reconstructed.
      steps: solver steps.
      guidance: guidance scale.
    """

    prompts: int = 96
    loss_batches: int = 16
    pictures: int = 16
    steps: int = 12
    guidance: float = DEFAULT_GUIDANCE


_VERIFI = {"encoder.verifi": True}
_THIRD = _VERIFI | {"conditioning.layer_stride": 3}
_PICTURES = {"text_to_image": 0.7, "reconstruction": 0.2, "joint": 0.1}
ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "lap": Arm(_THIRD),
        "last_layer": Arm(_VERIFI | {"conditioning.strategy": "last_layer"}),
        "kv_fusion": Arm(_VERIFI | {"conditioning.strategy": "kv_fusion"}),
        "hidden_state_injection": Arm(_VERIFI | {"conditioning.strategy": "hidden_state_injection"}),
        "lap_injection": Arm(_THIRD | {"conditioning.strategy": "lap_injection"}),
        "lap_all_layers": Arm(_VERIFI),
        "lap_refiner": Arm(_THIRD | {"conditioning.refiner_blocks": 2}),
        "penultimate_refiner": Arm(
            _VERIFI
            | {"conditioning.strategy": "last_layer", "conditioning.layer": -2, "conditioning.refiner_blocks": 2}
        ),
        "lap_words": Arm({"conditioning.layer_stride": 3}),
        "t5_style": Arm({"conditioning.strategy": "last_layer"}),
        "continued": Arm(_THIRD | {"first_steps": 100_000}),
        "pictures": Arm(_THIRD, tasks=_PICTURES),
        "edits": Arm(_THIRD, tasks={"text_to_image": 0.4, "edit": 0.6}, after="pictures", length=0.5),
    }
)


def _prompt(record: Record, asked: EncoderRef) -> Prompt:
    return prompt_of(record, SYSTEM_PROMPTS[asked.system_prompts], verifi=asked.verifi)


def config_of(name: str, seed: int, steps: int, folder: Path) -> TrainConfig:
    """Returns the training config of an arm's run."""
    arm = ARMS[name]
    config = ablations.changed(ablations.base("demo"), arm.changes, "demo")
    config.seed = seed
    config.total_steps = max(1, round(steps * arm.length))
    if config.first.steps:
        config.first.steps = max(1, round(_FIRST_SHARE * steps))
    if arm.tasks:
        config.data.sources = ({**config.data.sources[0], "tasks": dict(arm.tasks)},)
        config.data.budgets = {task: SHAPES_BUDGETS[task] for task in arm.tasks}
    if arm.after:
        config.init_from = str(folder / arm.after / f"seed_{seed}" / "export")
        config.optimizer.learning_rate /= 2
    config.evaluation.prompts = 0
    config.preview.every_steps = 0
    config.checkpoint.every_steps = 50
    config.checkpoint.keep = 1
    config.log_every_steps = min(20, config.total_steps)
    return from_mapping(TrainConfig, config)


def run(folder: Path, output: Path, *, seeds: int, steps: int, scoring: Scoring | None = None) -> Path:
    """Trains and scores what is not yet done, and writes the report; returns its path.

    Args:
      folder: of the runs, one subfolder an arm and seed.
      output: where findings.md and its figure go.
      seeds: runs of each arm.
      steps: optimizer steps of a run.
      scoring: how runs are scored.

    Raises:
      ValueError: `folder` holds runs of another number of steps.
    """
    if seeds < 2:
        raise ValueError(f"A study needs at least 2 seeds for its error bars, got {seeds}.")
    for seed in range(seeds):  # outside, so that a study stopped early has every arm
        for name in ARMS:
            workdir = folder / name / f"seed_{seed}"
            if (workdir / SCORES_FILE).exists():
                continue
            config = config_of(name, seed, steps, folder)
            train(config, workdir)
            scores = scores_of(config, UniFusion.load(workdir / "export"), scoring or Scoring())
            temporary = workdir / f"{SCORES_FILE}.tmp"
            temporary.write_text(json.dumps(scores, indent=2) + "\n")
            temporary.replace(workdir / SCORES_FILE)
            shutil.rmtree(workdir / "checkpoints")  # the exported model stays
            jax.clear_caches()
    return findings.write(
        read_scores(folder, seeds), output, steps=steps, command=_command(folder, output, seeds, steps)
    )


def _command(folder: Path, output: Path, seeds: int, steps: int) -> str:
    flags = f"--study={folder} --output={output} --seeds={seeds}" + (
        "" if steps == STEPS else f" --study_steps={steps}"
    )
    return f"python -m unifusion_jax.analyze {flags}"


def read_scores(folder: Path, seeds: int) -> dict[str, list[dict[str, float]]]:
    """Returns the scores of every arm, by seed."""
    return {
        name: [json.loads((folder / name / f"seed_{seed}" / SCORES_FILE).read_text()) for seed in range(seeds)]
        for name in ARMS
    }


def scores_of(config: TrainConfig, model: UniFusion, scoring: Scoring) -> dict[str, float]:
    """Returns a run's scores: held-out loss, correct facts, and where pictures are trained on, what is made of them."""
    count = scoring.prompts
    records = _held_out("text_to_image", count, num_objects=(1, 2))
    own = [Prompt(record.prompt) for record in records]
    described = [_prompt(record, config.encoder) for record in records]
    scores = {
        "held_out_loss": held_out_loss(config, model, scoring.loss_batches),
        "facts": facts_correct(model, own, records, scoring),
        "facts_described": facts_correct(model, described, records, scoring),
    }
    if "reconstruction" in config.data.budgets:
        options = Options(count=scoring.pictures, steps=scoring.steps, guidance=scoring.guidance)
        rows = tile_scaling(model, options).rows
        for tiles in sorted({row["tiles"] for row in rows}):
            scores[f"psnr_db_{tiles}_tiles"] = float(np.mean([row["psnr_db"] for row in rows if row["tiles"] == tiles]))
    if "edit" in config.data.budgets:
        pairs = _held_out("multi_reference", count)
        told = [_prompt(record, config.encoder) for record in pairs]
        scores["facts_two_references"] = facts_correct(model, told, pairs, scoring)
        # The same pictures against the facts of other records: what chance alone gives.
        scores["facts_two_references_chance"] = facts_correct(model, told, pairs[1:] + pairs[:1], scoring)
    return scores


def held_out_loss(config: TrainConfig, model: UniFusion, batches: int) -> float:
    """Returns the mean velocity error on held-out text-to-image records; times and noises are the same for all runs."""
    source = {"name": "shapes", "split": "held_out", "num_objects": (1, 2), "tasks": {"text_to_image": 1.0}}
    data = dataclasses.replace(
        config.data, sources=(source,), budgets={"text_to_image": config.data.budgets["text_to_image"]}
    )
    flow = dataclasses.replace(config.flow, condition_dropout=0.0)
    fixed = dataclasses.replace(config, data=data, flow=flow, seed=0, init_from="", first=FirstPhase())
    mesh = make_mesh(config.mesh)
    task: Any = make_task(fixed, mesh)
    loss = jax.jit(task.loss, static_argnums=4)
    found = []
    with task.batches() as stream:
        for step in range(batches):
            batch = next(stream)
            key = stream_key(0, "study", step)
            value, _ = loss(model.params, task.frozen, global_batch(batch.data, mesh), key, task.static(batch.bucket))
            found.append(float(value))
    return float(np.mean(found))


def facts_correct(model: UniFusion, prompts: Sequence[Prompt], records: Sequence[Record], scoring: Scoring) -> float:
    """Returns the share of stated facts that hold in the pictures drawn, over all records together."""
    sampling = SamplingConfig(scoring.steps, guidance=scoring.guidance)
    correct: list[bool] = []
    for drawn, record in zip(model.draw(prompts, sampling=sampling, batch_size=_BATCH), records, strict=True):
        stated = [Fact(**fact) for fact in record.facts["stated"]]
        correct += score(stated, detect(np.asarray(drawn.image))).correct
    return float(np.mean(correct))


def _held_out(task: str, count: int, **options: Any) -> list[Record]:
    source = ShapesSource(task, split="held_out", **options)
    return [source[index] for index in range(count)]
