"""Scenes of the built-in world: what can be in a picture, and how scenes are drawn at random.

A scene is a background and objects in the cells of a 3x3 grid. Which split a scene belongs to is a function of the
scene itself (`split_of`), so the training and the held-out scenes cannot overlap whatever sampled them.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted")
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = ("white", "gray", "black", "beige", "navy")
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES, "position": POSITIONS}

GRID_CELLS = 3
"""Cells along each side of the picture."""

REFERENCE_SIZE_PX = 96
"""Picture side in which jitter and object sizes are stated."""

MAX_JITTER_PX = 2
"""Largest displacement of a small object from the centre of its cell along each axis, in a 96 px picture."""

HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "green"),
        ("triangle", "pink"),
        ("star", "blue"),
        ("cross", "yellow"),
        ("ring", "orange"),
    }
)
"""Shape-colour pairs that no scene of the training split contains."""

HELD_OUT_SHARE = 16
"""One in this many of the scenes made of seen pairs only is held out."""

Split = Literal["train", "held_out"]
_T = TypeVar("_T")

_ALL_PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
_SEEN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT_PAIRS)
_HELD_OUT_PAIRS = tuple(sorted(HELD_OUT_PAIRS))
_TWIN_SHARE = 0.12  # share of further objects that repeat the first one's shape and colour, so that plurals occur
_MAX_TRIES = 10_000  # the chance that none of these is accepted is below 1e-200


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object. Every field is a word of the vocabulary above.

    Raises:
        ValueError: a word is not in the vocabulary of its field.
    """

    shape: str
    colour: str
    size: str
    texture: str
    position: str

    def __post_init__(self) -> None:
        for name, allowed in ATTRIBUTES.items():
            if getattr(self, name) not in allowed:
                _check(name, getattr(self, name), allowed)

    @property
    def cell(self) -> int:
        """Index of the cell, row-major, 0 to 8."""
        return POSITIONS.index(self.position)

    @property
    def row(self) -> int:
        """Row of the cell, 0 at the top."""
        return self.cell // GRID_CELLS

    @property
    def column(self) -> int:
        """Column of the cell, 0 at the left."""
        return self.cell % GRID_CELLS

    @property
    def is_held_out_pair(self) -> bool:
        """Whether the training split never shows this shape in this colour."""
        return (self.shape, self.colour) in HELD_OUT_PAIRS


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects on a background; at most one object a cell.

    Objects are kept in row-major order of their cells. Two scenes are equal when objects and background are; the jitter
    is a nuisance of drawing that no words describe, and takes no part in the comparison.

    Attributes:
        objects: the objects, 0 to 9.
        background: a word of `BACKGROUNDS`.
        jitter: for each object (right, down), in pixels of a 96 px picture; left out, nothing is displaced.

    Raises:
        ValueError: an unknown background, two objects in a cell, or a jitter that does not fit the objects.
    """

    objects: tuple[SceneObject, ...]
    background: str
    jitter: tuple[tuple[int, int], ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        cells = [item.cell for item in self.objects]
        if len(set(cells)) != len(cells):
            raise ValueError(
                f"a scene holds at most one object a cell, got positions {[item.position for item in self.objects]}"
            )
        jitter = self.jitter or ((0, 0),) * len(cells)
        if len(jitter) != len(cells):
            raise ValueError(
                f"jitter has {len(jitter)} entries, but each of {len(cells)} objects needs one (right, down)"
            )
        for item, shift in zip(self.objects, jitter, strict=True):
            limit = MAX_JITTER_PX if item.size == "small" else 0
            if max(abs(shift[0]), abs(shift[1])) > limit:
                raise ValueError(f"jitter of the {item.size} {item.shape} is {shift}, but must stay within {limit} px")
        order = sorted(range(len(cells)), key=cells.__getitem__)
        object.__setattr__(self, "objects", tuple(self.objects[k] for k in order))
        object.__setattr__(self, "jitter", tuple(tuple(jitter[k]) for k in order))

    @property
    def free_positions(self) -> tuple[str, ...]:
        """Positions without an object, row-major."""
        taken = {item.position for item in self.objects}
        return tuple(position for position in POSITIONS if position not in taken)

    @property
    def canonical(self) -> str:
        """A text that two scenes share exactly when they are equal."""
        words = [" ".join((o.position, o.size, o.colour, o.texture, o.shape)) for o in self.objects]
        return "; ".join([self.background, *words])


def generator(*path: int) -> np.random.Generator:
    """The random stream of a path of non-negative integers, e.g. (seed, stream, index), independent of all others.

    Args:
        path: what the stream is for; the same path always gives the same numbers.

    Returns:
        A fresh counter-based generator.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(path)))


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """One of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


def has_held_out_pair(scene: Scene) -> bool:
    """Whether any object has a shape-colour pair that is never trained on."""
    return any((item.shape, item.colour) in HELD_OUT_PAIRS for item in scene.objects)


def split_of(scene: Scene) -> Split:
    """The split a scene belongs to, decided by the scene alone.

    Scenes with a held-out pair are held out, and one in `HELD_OUT_SHARE` of the others, by a hash of the text.
    """
    if has_held_out_pair(scene):
        return "held_out"
    digest = hashlib.blake2b(scene.canonical.encode(), digest_size=4).digest()
    return "held_out" if int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0 else "train"


def in_split(scene: Scene, split: str, pairs: str = "any") -> bool:
    """Whether a scene belongs to a split, and its shape-colour pairs are of the wanted kind.

    Args:
        scene: any scene.
        split: "train" or "held_out".
        pairs: "seen": only pairs that training shows; "held_out": at least one it never shows; "any": no condition.
    """
    check_split(split, pairs)
    return _belongs(scene, split, pairs)


def _belongs(scene: Scene, split: str, pairs: str) -> bool:
    if pairs != "any" and has_held_out_pair(scene) != (pairs == "held_out"):
        return False
    return split_of(scene) == split


def check_split(split: str, pairs: str = "any") -> None:
    """Refuse unknown split names, and held-out pairs in the training split.

    Raises:
        ValueError: see above.
    """
    _check("split", split, ("train", "held_out"))
    _check("pairs", pairs, ("seen", "held_out", "any"))
    if split == "train" and pairs == "held_out":
        raise ValueError("the train split has no held-out pairs; use split='held_out' with pairs='held_out'")


def random_jitter(rng: np.random.Generator, size: str) -> tuple[int, int]:
    """A displacement for an object of a size: up to `MAX_JITTER_PX` along each axis for small ones, none for large."""
    if size != "small":
        return (0, 0)
    right, down = rng.integers(-MAX_JITTER_PX, MAX_JITTER_PX + 1, size=2)
    return (int(right), int(down))


def random_object(
    rng: np.random.Generator, position: str, pairs: Sequence[tuple[str, str]] = _SEEN_PAIRS
) -> SceneObject:
    """An object with uniform attributes at a position; its shape and colour are one of `pairs`."""
    shape, colour = pick(rng, pairs)
    return SceneObject(shape, colour, pick(rng, SIZES), pick(rng, TEXTURES), position)


def _draw(rng: np.random.Generator, num_objects: int, pairs: str) -> Scene:
    allowed = _SEEN_PAIRS if pairs == "seen" else _ALL_PAIRS
    cells = rng.permutation(len(POSITIONS))[:num_objects]
    objects = [random_object(rng, POSITIONS[cell], allowed) for cell in cells]
    if pairs == "held_out":
        shape, colour = pick(rng, _HELD_OUT_PAIRS)
        objects[0] = dataclasses.replace(objects[0], shape=shape, colour=colour)
    for k in range(1, num_objects):
        if rng.random() < _TWIN_SHARE:
            objects[k] = dataclasses.replace(objects[k], shape=objects[0].shape, colour=objects[0].colour)
    jitter = tuple(random_jitter(rng, item.size) for item in objects)
    return Scene(tuple(objects), pick(rng, BACKGROUNDS), jitter)


def sample_scene(
    rng: np.random.Generator,
    *,
    num_objects: int | Sequence[int] = (1, 2, 3),
    split: str = "train",
    pairs: str | None = None,
) -> Scene:
    """A random scene of a split.

    Args:
        rng: see `generator`; the scene is a function of its state.
        num_objects: how many objects, or the counts to choose from uniformly; 1 to 9.
        split: "train" or "held_out" (see `split_of`).
        pairs: "seen" (default): only shape-colour pairs that training shows; "held_out": at least one it never shows;
            "any": uniform over all pairs.

    Returns:
        The scene.

    Raises:
        ValueError: unknown split or pairs, held-out pairs asked of the training split, or a count outside 1 to 9.
    """
    pairs = pairs or "seen"
    check_split(split, pairs)
    counts = (num_objects,) if isinstance(num_objects, int) else tuple(num_objects)
    if not counts or not all(1 <= count <= len(POSITIONS) for count in counts):
        raise ValueError(f"num_objects is {num_objects}, but must be counts from 1 to {len(POSITIONS)}")
    count = pick(rng, counts)
    for _ in range(_MAX_TRIES):
        scene = _draw(rng, count, pairs)
        if _belongs(scene, split, pairs):
            return scene
    raise RuntimeError(f"no {split} scene of {count} objects with {pairs} pairs in {_MAX_TRIES} tries")
