"""The built-in world's benchmarks: held-out requests, read back from the generated pictures by the detector."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import PIL.Image

from unifusion_jax import modes
from unifusion_jax.data.shapes.detector import Detection, detect
from unifusion_jax.data.shapes.language import describe, facts
from unifusion_jax.data.shapes.render import render
from unifusion_jax.data.shapes.scene import Scene
from unifusion_jax.data.shapes.scoring import EditScore, score, score_edit
from unifusion_jax.data.shapes.source import (
    EvaluationEdit,
    evaluation_compositions,
    evaluation_edits,
    evaluation_prompts,
)
from unifusion_jax.flow import SamplingConfig
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.prompt import DEFAULT_GUIDANCE, Prompt

# How the text that conditions comes about: as the model was trained, decoded by the encoder (VERIFI), the user's own words,
# or the true description.
Text = Literal["trained", "verifi", "words", "truth"]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How pictures are drawn for a benchmark.

    Attributes:
      steps: solver steps.
      guidance: guidance scale.
      text: what conditions: "trained", as the model was trained; "verifi", the description that the encoder decodes;
        "words", the user's own; "truth", the description of the scene that is asked for, which shows what the DiT alone
        makes of a perfect one.
      mode: of `modes.MODES`, or "auto".
      tiles: most tiles of a reference picture.
      batch_size: pictures at a time.
      seed: of requests and noise.
    """

    steps: int = 30
    guidance: float = DEFAULT_GUIDANCE
    text: Text = "trained"
    mode: str = modes.AUTO
    tiles: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")

    def run(self, model: UniFusion, prompts: Sequence[Prompt], about: str) -> Iterator[tuple[Detection, str]]:
        """Draws each prompt; yields what is in the picture, and the text that conditioned it."""
        found = model.draw(
            prompts,
            seed=self.seed,
            sampling=SamplingConfig(self.steps, guidance=self.guidance),
            batch_size=self.batch_size,
            about=about,
            mode=self.mode,
            rewrite=None if self.text == "trained" else self.text == "verifi",
            tiles=self.tiles,
        )
        for drawn in found:
            yield detect(np.asarray(drawn.image)), drawn.text


def evaluate_prompts(
    model: UniFusion,
    drawing: Drawing,
    *,
    count: int,
    num_objects: Sequence[int] = (1, 2),
    pairs: Sequence[str] = ("seen", "held_out"),
) -> dict[str, float]:
    """Scores `count` held-out prompts of each kind.

    Args:
      model: what to score.
      drawing: how.
      count: prompts for each entry of `pairs`.
      num_objects: numbers of objects in the scenes.
      pairs: "seen": unseen scenes of shape-colour pairs that training has; "held_out": with a pair it never has.

    Returns:
      For each kind: `<kind>/all_correct`, the share of pictures that bear out everything their prompt states, and the mean
      share of correct facts by category.
    """
    scores = {}
    for kind in pairs:
        chosen = evaluation_prompts(count, num_objects=tuple(num_objects), seed=drawing.seed, pairs=kind)
        prompts = [Prompt(prompt, target=_truth(drawing, scene)) for prompt, _, scene in chosen]
        correct: list[bool] = []
        categories = collections.defaultdict(list)
        found = drawing.run(model, prompts, f"held-out prompts, {kind} pairs")
        for (detection, _), (_, stated, _) in zip(found, chosen, strict=True):
            result = score(stated, detection)
            correct.append(result.all_correct)
            for category, share in result.by_category.items():
                categories[category].append(share)
        scores[f"{kind}/all_correct"] = float(np.mean(correct))
        scores |= {f"{kind}/{category}": float(np.mean(shares)) for category, shares in sorted(categories.items())}
    return scores


def compare_verifi(
    model: UniFusion, drawing: Drawing, *, count: int, pairs: Sequence[str] = ("seen", "held_out")
) -> dict[str, float]:
    """Scores the same prompts, from the same noise, with VERIFI, with the user's own words, and with true descriptions."""
    scores: dict[str, float] = {}
    texts: tuple[Text, ...] = ("verifi", "words", "truth")
    for text in texts:
        one = evaluate_prompts(model, dataclasses.replace(drawing, text=text), count=count, pairs=pairs)
        scores |= {f"{text}/{name}": value for name, value in one.items()}
    for kind in pairs:
        scores[f"gain/{kind}/all_correct"] = scores[f"verifi/{kind}/all_correct"] - scores[f"words/{kind}/all_correct"]
    return scores


def evaluate_edits(
    model: UniFusion, drawing: Drawing, *, count: int, pairs: Sequence[str] = ("seen", "held_out")
) -> dict[str, float]:
    """Scores `count` held-out edits of one picture, all kinds in turn.

    Returns:
      For each entry of `pairs`: `edit_success_rate`, the share of pictures in which all is as the instruction says;
      `preservation_rate`, the mean share of what the instruction does not name (other objects, background, empty places)
      that is as it was; `all_correct`, the share of pictures of exactly the scene that is asked for; the same two rates by
      kind of edit; and `description_correct`, the share of texts that describe that scene.
    """
    scores = {}
    for kind in pairs:
        edits = evaluation_edits(count, seed=drawing.seed, pairs=kind)
        results: dict[str, list[EditScore]] = collections.defaultdict(list)
        described = []
        found = drawing.run(model, [_request(drawing, edit) for edit in edits], f"held-out edits, {kind} pairs")
        for (detection, text), edit in zip(found, edits, strict=True):
            result = score_edit(edit.sources[0], edit.target, detection)
            results[""].append(result)
            results[f"{edit.kind}/"].append(result)
            described.append(text.strip() == describe(edit.target))
        for name, group in sorted(results.items()):
            scores[f"{kind}/{name}edit_success_rate"] = float(np.mean([result.success for result in group]))
            scores[f"{kind}/{name}preservation_rate"] = float(np.mean([result.preservation for result in group]))
        scores[f"{kind}/all_correct"] = float(np.mean([result.all_correct for result in results[""]]))
        scores[f"{kind}/description_correct"] = float(np.mean(described))
    return scores


def evaluate_compositions(
    model: UniFusion,
    drawing: Drawing,
    *,
    count: int,
    references: int = 2,
    pairs: Sequence[str] = ("seen", "held_out"),
) -> dict[str, float]:
    """Scores instructions that bring objects of several pictures together in one.

    Returns:
      For each entry of `pairs`: `all_correct`, the share of pictures of exactly the scene that is asked for; `objects`, the
      mean share of its objects found as they should be; the mean share of correct facts by category; and
      `description_correct`, as in `evaluate_edits`.
    """
    scores = {}
    for kind in pairs:
        edits = evaluation_compositions(count, references=references, seed=drawing.seed, pairs=kind)
        categories = collections.defaultdict(list)
        found = drawing.run(model, [_request(drawing, edit) for edit in edits], f"compositions, {kind} pairs")
        for (detection, text), edit in zip(found, edits, strict=True):
            categories["all_correct"].append(detection.is_clean and detection.scene == edit.target)
            wanted = set(edit.target.objects)
            categories["objects"].append(len(wanted & set(detection.scene.objects)) / len(wanted))
            categories["description_correct"].append(text.strip() == describe(edit.target))
            for category, share in score(facts(edit.target), detection).by_category.items():
                categories[category].append(share)
        scores |= {f"{kind}/{name}": float(np.mean(shares)) for name, shares in sorted(categories.items())}
    return scores


def _truth(drawing: Drawing, scene: Scene) -> str | None:
    return describe(scene) if drawing.text == "truth" else None


def _request(drawing: Drawing, edit: EvaluationEdit) -> Prompt:
    """Returns the prompt of an edit. A mode that switches to words alone needs words that describe the whole picture."""
    pictures = [PIL.Image.fromarray(render(source)) for source in edit.sources]
    switches = drawing.mode in modes.MODES and modes.MODES[drawing.mode].switches
    words = describe(edit.target) if switches else edit.instruction
    return Prompt(words, pictures, target=_truth(drawing, edit.target))
