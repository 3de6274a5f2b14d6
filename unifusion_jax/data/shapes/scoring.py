"""Scoring a picture: which stated facts it bears out, and whether an edit did what it should and nothing else."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from unifusion_jax.data.shapes.detector import Detection
from unifusion_jax.data.shapes.language import FACT_CATEGORIES, Fact, relations_between
from unifusion_jax.data.shapes.scene import Scene, SceneObject

MAX_ENTITIES = 5
"""Entities are matched with detected objects by trying all assignments, which more of them would make slow."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How much of what a prompt states is in a picture.

    Attributes:
        correct: one entry for each fact, in their order.
        by_category: share of correct facts of each category of `FACT_CATEGORIES` that the prompt states.
        all_correct: every fact holds.
    """

    correct: tuple[bool, ...]
    by_category: Mapping[str, float]
    all_correct: bool


@dataclasses.dataclass(frozen=True)
class EditScore:
    """How well a picture carries out an edit.

    Attributes:
        success: everything that the edit changes is as the target says.
        preservation: share of what the edit does not name (other objects, background, nothing new) left as it was.
        all_correct: the picture is the target scene.
    """

    success: bool
    preservation: float
    all_correct: bool


def score(facts: Sequence[Fact], detection: Detection) -> Score:
    """Check the facts that a prompt states against what was read from a picture.

    The entities of the prompt are matched one to one with detected objects, in the way that makes most facts true. An
    entity without an object fails all its facts. Cells that hold something unknown count as objects.

    Args:
        facts: from `user_prompt`, `evaluation_prompts` or `facts`.
        detection: from `detect`.

    Returns:
        The score.

    Raises:
        ValueError: no facts, an unknown category, or more than `MAX_ENTITIES` entities.
    """
    if not facts:
        raise ValueError("there is nothing to score: the list of facts is empty")
    unknown = {fact.category for fact in facts} - set(FACT_CATEGORIES)
    if unknown:
        raise ValueError(f"unknown categories of facts {sorted(unknown)}; expected {', '.join(FACT_CATEGORIES)}")
    entities = 1 + max((fact.entity for fact in facts if fact.entity is not None), default=-1)
    if entities > MAX_ENTITIES:
        raise ValueError(f"the facts are about {entities} entities, but at most {MAX_ENTITIES} can be scored")
    found: list[SceneObject | None] = list(detection.scene.objects)
    found += [None] * max(entities - len(found), 0)
    verdicts = (
        tuple(_holds(fact, chosen, detection) for fact in facts) for chosen in itertools.permutations(found, entities)
    )
    correct = max(verdicts, key=sum)
    by_category = {}
    for category in FACT_CATEGORIES:
        results = [good for fact, good in zip(facts, correct, strict=True) if fact.category == category]
        if results:
            by_category[category] = sum(results) / len(results)
    return Score(correct, by_category, all(correct))


def _holds(fact: Fact, chosen: Sequence[SceneObject | None], detection: Detection) -> bool:
    """Whether a fact is true of a picture, given which object each entity is."""
    if fact.category == "count":
        return int(fact.value) == len(detection.scene.objects) + len(detection.unknown)
    if fact.category == "global":
        return detection.background_known and detection.scene.background == fact.value
    item = None if fact.entity is None else chosen[fact.entity]
    if item is None:
        return False
    if fact.name == "placement":
        other = None if fact.other is None else chosen[fact.other]
        return other is not None and fact.value in relations_between(item, other)
    return getattr(item, fact.name) == fact.value


def score_edit(source: Scene, target: Scene, detection: Detection) -> EditScore:
    """Check an edited picture: the change is there, and nothing else changed.

    Args:
        source: the scene before the edit.
        target: the scene that the instruction asks for; must differ from `source`.
        detection: what was read from the edited picture.

    Returns:
        The score. Something unknown, or an object in neither scene, counts against preservation; in a cell that the
        edit changes, it fails the edit instead.

    Raises:
        ValueError: source and target are equal.
    """
    if source == target:
        raise ValueError("source and target are the same scene; an edit changes something")
    before, after, found = set(source.objects), set(target.objects), set(detection.scene.objects)
    background = detection.scene.background if detection.background_known else None
    same_background = source.background == target.background
    success = (after - before) <= found and not (before - after) & found
    vacated = {item.position for item in before - after} - {item.position for item in after}
    success = success and not vacated & (set(detection.unknown) | {item.position for item in found})
    success = success and (same_background or background == target.background)
    kept = [item in found for item in before & after]
    if same_background:
        kept.append(background == source.background)
    changed = {item.position for item in before ^ after}
    touched = {item.position for item in found - before - after} | set(detection.unknown)
    kept.append(not touched - changed - {item.position for item in before & after})
    exact = detection.is_clean and detection.scene == target
    return EditScore(success, sum(kept) / len(kept), exact)
