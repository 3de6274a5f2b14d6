"""The built-in world as a random-access source of records: an endless data set that needs no disk."""

import dataclasses
import itertools
import operator
from collections.abc import Sequence

from unifusion_jax.data.records import RECONSTRUCTION_PROMPT, TASKS, Record
from unifusion_jax.data.shapes.edits import EDIT_KINDS, sample_edit, sample_multi_reference
from unifusion_jax.data.shapes.language import Fact, check_detail, describe, facts, user_prompt
from unifusion_jax.data.shapes.render import render
from unifusion_jax.data.shapes.scene import REFERENCE_SIZE_PX, Scene, check_split, generator, sample_scene

# The task streams come before these.
_EVALUATION_STREAM, _EDITS_STREAM, _COMPOSITIONS_STREAM = range(len(TASKS), len(TASKS) + 3)


class ShapesSource(Sequence):
    """Examples of one task; item k is a function of (seed, task, split, k) alone.

    Attributes:
        task: "text_to_image" (a short prompt), "reconstruction" (the picture itself), "joint" (prompt and picture),
            "edit" (a picture and an instruction) or "multi_reference" (two or three pictures and an instruction).
        split: "train" or "held_out".

    Args:
        task: see above.
        split: see above.
        seed: not negative; another seed gives another data set of the same split.
        length: number of examples.
        size_px: side of the pictures, or (width, height).
        num_objects: counts of objects in the pictures of the first three tasks.
        pairs: shape-colour pairs of a held-out split, as in `sample_scene`; default "seen".
        detail: how much the prompts of text_to_image and joint say, as in `user_prompt`; default random.

    Raises:
        ValueError: an unknown task, split, pairs or detail, or a length that is not positive.
    """

    def __init__(
        self,
        task: str = "text_to_image",
        *,
        split: str = "train",
        seed: int = 0,
        length: int = 1_000_000,
        size_px: int | Sequence[int] = REFERENCE_SIZE_PX,
        num_objects: int | Sequence[int] = (1, 2, 3),
        pairs: str | None = None,
        detail: str | None = None,
    ):
        if task not in TASKS:
            raise ValueError(f"task is {task!r}, but must be one of {', '.join(TASKS)}")
        check_split(split, pairs or "seen")
        check_detail(detail)
        if length < 1:
            raise ValueError(f"length is {length}, but a source needs at least one example")
        if seed < 0:
            raise ValueError(f"seed is {seed}, but must not be negative")
        self.task, self.split, self.seed, self.pairs = task, split, seed, pairs
        # Configurations hold lists where Python has tuples.
        self.size_px = size_px if isinstance(size_px, int) else (int(size_px[0]), int(size_px[1]))
        self.num_objects, self.detail, self._length = num_objects, detail, length

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"ShapesSource({self.task!r}, split={self.split!r}, seed={self.seed}, length={self._length})"

    def __getitem__(self, index: int) -> Record:
        """The example at an index; negative ones count from the end.

        Raises:
            IndexError: outside the source.
        """
        index = operator.index(index)
        if not -self._length <= index < self._length:
            raise IndexError(f"index {index} is outside a source of {self._length} examples")
        index %= self._length
        sources, prompt, scene, extra = self._scenes(index)
        return Record(
            id=f"shapes/{self.split}/{self.task}/{self.seed}/{index}",
            task=self.task,
            prompt=prompt,
            target="" if self.task == "reconstruction" else describe(scene),
            image=render(scene, self.size_px),
            images=tuple(render(source, self.size_px) for source in sources),
            facts={"scene": describe(scene), "sources": [describe(source) for source in sources], **extra},
        )

    def scene(self, index: int) -> Scene:
        """The scene of the picture that example `index` asks for, with its jitter."""
        return self._scenes(index)[2]

    def _scenes(self, index: int) -> tuple[tuple[Scene, ...], str, Scene, dict]:
        """(reference scenes, prompt, target scene, further facts) of an example."""
        held_out = int(self.split == "held_out")
        rng = generator(self.seed, TASKS.index(self.task), held_out, index)
        if self.task == "edit":
            source, prompt, scene, kind = sample_edit(rng, self.split, pairs=self.pairs)
            return (source,), prompt, scene, {"edit": kind, "stated": _plain(facts(scene))}
        if self.task == "multi_reference":
            sources, prompt, scene = sample_multi_reference(rng, self.split, pairs=self.pairs)
            return sources, prompt, scene, {"stated": _plain(facts(scene))}
        scene = sample_scene(rng, num_objects=self.num_objects, split=self.split, pairs=self.pairs)
        if self.task == "reconstruction":
            return (scene,), RECONSTRUCTION_PROMPT, scene, {"stated": _plain(facts(scene))}
        prompt, stated = user_prompt(scene, rng, detail=self.detail)
        return (scene,) if self.task == "joint" else (), prompt, scene, {"stated": _plain(stated)}


def _plain(stated: Sequence[Fact]) -> list[dict]:
    """Facts as plain dictionaries, which a record can carry to disk; `Fact(**entry)` restores each."""
    return [dataclasses.asdict(fact) for fact in stated]


def evaluation_prompts(
    count: int, *, num_objects: int | Sequence[int] = (1, 2), seed: int = 0, pairs: str = "seen"
) -> list[tuple[str, tuple[Fact, ...], Scene]]:
    """Prompts for scenes that training never shows, each with what it states.

    Args:
        count: how many.
        num_objects: counts of objects to choose from.
        seed: not negative; the list of a seed starts the same whatever `count` is.
        pairs: "seen": unseen scenes of seen shape-colour pairs; "held_out": with a pair that is never trained on.

    Returns:
        (prompt, facts, scene) each; score a generated picture with `score(facts, detect(picture))`.
    """
    prompts = []
    for index in range(count):
        rng = generator(seed, _EVALUATION_STREAM, int(pairs == "held_out"), index)
        scene = sample_scene(rng, num_objects=num_objects, split="held_out", pairs=pairs)
        prompt, stated = user_prompt(scene, rng)
        prompts.append((prompt, stated, scene))
    return prompts


@dataclasses.dataclass(frozen=True)
class EvaluationEdit:
    """A held-out request with reference pictures.

    Attributes:
        sources: scenes of the pictures.
        instruction: what to do with them.
        target: the scene it asks for.
        kind: one of `EDIT_KINDS`, or "compose".
    """

    sources: tuple[Scene, ...]
    instruction: str
    target: Scene
    kind: str


def evaluation_edits(count: int, *, seed: int = 0, pairs: str = "seen") -> list[EvaluationEdit]:
    """Edits of held-out scenes to held-out scenes, all kinds in turn; the list of a seed starts the same for any `count`."""
    edits = []
    for index in range(count):
        rng = generator(seed, _EDITS_STREAM, int(pairs == "held_out"), index)
        kind = EDIT_KINDS[index % len(EDIT_KINDS)]
        source, instruction, target, kind = sample_edit(rng, "held_out", kind=kind, pairs=pairs)
        edits.append(EvaluationEdit((source,), instruction, target, kind))
    return edits


def evaluation_compositions(
    count: int, *, references: int = 2, seed: int = 0, pairs: str = "seen"
) -> list[EvaluationEdit]:
    """Instructions that bring objects of several held-out pictures together in one; `references` is 2 or 3."""
    if references not in (2, 3):
        raise ValueError(f"compositions have 2 or 3 reference pictures, got {references}")
    found: list[EvaluationEdit] = []
    for index in itertools.count():
        if len(found) == count:
            return found
        rng = generator(seed, _COMPOSITIONS_STREAM, int(pairs == "held_out"), index)
        sources, instruction, target = sample_multi_reference(rng, "held_out", pairs=pairs)
        if len(sources) == references:
            found.append(EvaluationEdit(sources, instruction, target, "compose"))
    raise AssertionError("unreachable")
