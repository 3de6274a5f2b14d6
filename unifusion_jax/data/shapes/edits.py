"""Edit instructions: a source scene, an instruction, and the scene it asks for; from one picture or from several."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from unifusion_jax.data.shapes.language import PLACES, join_words, noun_phrase, with_article
from unifusion_jax.data.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    TEXTURES,
    Scene,
    SceneObject,
    check_split,
    in_split,
    pick,
    random_jitter,
    random_object,
    sample_scene,
)

_MAX_TRIES = 10_000
_TRIES_PER_SOURCE = 8
_ORDINALS = ("first", "second", "third")
_IMAGE_WORDS = ("image {number}", "picture {number}", "the {ordinal} image", "the {ordinal} picture")

_RECOLOUR = (
    "make {the} {value}",
    "change the color of {the} to {value}",
    "turn {the} {value}",
    "recolor {the} {value}",
)
_RETEXTURE = ("make {the} {value}", "change the texture of {the} to {value}", "turn {the} {value}")
_LARGER = ("make {the} larger", "enlarge {the}", "make {the} large", "make {the} bigger")
_SMALLER = ("make {the} smaller", "shrink {the}", "make {the} small")
_MOVE = ("move {the} {place}", "put {the} {place}", "place {the} {place} instead")
_ADD = ("add {a} {place}", "put {a} {place}", "insert {a} {place}")
_REMOVE = ("remove {the}", "delete {the}", "take away {the}", "erase {the}")
_SWAP = ("swap {the} and {other}", "swap the positions of {the} and {other}", "let {the} and {other} trade places")
_BACKGROUND = (
    "change the background to {value}",
    "make the background {value}",
    "put everything on a {value} background",
    "use a {value} background",
)


def referring_phrase(scene: Scene, item: SceneObject, rng: np.random.Generator) -> str:
    """A definite phrase that fits one object of a scene only, e.g. "the small circle" or "the circle on the left".

    Args:
        scene: the scene the phrase is read with.
        item: one of its objects.
        rng: chooses among the unambiguous phrases; short ones are preferred.

    Returns:
        The phrase; the shape is always named, the place only where it must be or now and then.
    """
    names = ("colour", "size", "texture")
    choices: list[set[str]] = [set(subset) for length in range(4) for subset in itertools.combinations(names, length)]
    unique = [subset for subset in choices if _matches(scene, item, subset) == 1]
    if not unique or rng.random() < 0.1:
        subset = {"colour"} if rng.random() < 0.7 else set()
        return f"the {noun_phrase(item, tuple(subset))} {PLACES[item.position]}"
    shortest = [subset for subset in unique if len(subset) <= len(unique[0]) + 1]
    with_colour = [subset for subset in shortest if "colour" in subset]
    subset = pick(rng, with_colour if with_colour and rng.random() < 0.6 else shortest)
    return f"the {noun_phrase(item, tuple(subset))}"


def _matches(scene: Scene, item: SceneObject, names: set[str]) -> int:
    """How many objects share an object's shape and the named attributes."""
    return sum(
        all(getattr(other, name) == getattr(item, name) for name in ("shape", *names)) for other in scene.objects
    )


def replace_object(scene: Scene, old: SceneObject | None, new: SceneObject | None, jitter: tuple[int, int]) -> Scene:
    """The scene with one object exchanged, added (`old` None) or removed (`new` None).

    Args:
        scene: the scene before.
        old: one of its objects.
        new: the object to hold instead.
        jitter: displacement of the new object; ignored when nothing is added.

    Returns:
        The scene after.
    """
    kept = [(item, shift) for item, shift in zip(scene.objects, scene.jitter, strict=True) if item != old]
    if new is not None:
        kept.append((new, jitter if new.size == "small" else (0, 0)))
    return Scene(tuple(item for item, _ in kept), scene.background, tuple(shift for _, shift in kept))


def _chosen(scene: Scene, rng: np.random.Generator) -> tuple[SceneObject, tuple[int, int], str]:
    """A random object, its jitter, and a phrase for it."""
    k = int(rng.integers(len(scene.objects)))
    return scene.objects[k], scene.jitter[k], referring_phrase(scene, scene.objects[k], rng)


def _change(attribute: str, values: Sequence[str], templates: Sequence[str]) -> Callable:
    def edit(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
        item, jitter, phrase = _chosen(scene, rng)
        value = pick(rng, [v for v in values if v != getattr(item, attribute)])
        target = replace_object(scene, item, dataclasses.replace(item, **{attribute: value}), jitter)
        return pick(rng, templates).format(the=phrase, value=value), target

    return edit


def _resize(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    item, _, phrase = _chosen(scene, rng)
    size = "large" if item.size == "small" else "small"
    target = replace_object(scene, item, dataclasses.replace(item, size=size), (0, 0))
    return pick(rng, _LARGER if size == "large" else _SMALLER).format(the=phrase), target


def _move(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    item, jitter, phrase = _chosen(scene, rng)
    position = pick(rng, scene.free_positions)
    target = replace_object(scene, item, dataclasses.replace(item, position=position), jitter)
    template = pick(rng, _MOVE)
    place = f"to the {position}" if template.startswith("move") else PLACES[position]
    return template.format(the=phrase, place=place), target


def _add(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    item = random_object(rng, pick(rng, scene.free_positions))
    target = replace_object(scene, None, item, random_jitter(rng, item.size))
    words = with_article(noun_phrase(item, ("size", "colour", "texture")))
    return pick(rng, _ADD).format(a=words, place=PLACES[item.position]), target


def _remove(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    item, _, phrase = _chosen(scene, rng)
    return pick(rng, _REMOVE).format(the=phrase), replace_object(scene, item, None, (0, 0))


def _swap(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    one, two = (int(k) for k in rng.permutation(len(scene.objects))[:2])
    first, second = scene.objects[one], scene.objects[two]
    phrases = [referring_phrase(scene, item, rng) for item in (first, second)]
    target = replace_object(scene, first, None, (0, 0))
    target = replace_object(target, second, dataclasses.replace(second, position=first.position), scene.jitter[two])
    target = replace_object(target, None, dataclasses.replace(first, position=second.position), scene.jitter[one])
    return pick(rng, _SWAP).format(the=phrases[0], other=phrases[1]), target


def _change_background(scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
    background = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
    return pick(rng, _BACKGROUND).format(value=background), dataclasses.replace(scene, background=background)


_EDITS = {
    "recolour": _change("colour", COLOURS, _RECOLOUR),
    "retexture": _change("texture", TEXTURES, _RETEXTURE),
    "resize": _resize,
    "move": _move,
    "add": _add,
    "remove": _remove,
    "swap": _swap,
    "background": _change_background,
}
EDIT_KINDS = tuple(_EDITS)
# How many objects the source of an edit may have; a picture is never left empty and never grows beyond three objects.
_SOURCE_COUNTS = {"add": (1, 2), "remove": (2, 3), "swap": (2, 3)}


def _sentence(text: str, rng: np.random.Generator) -> str:
    return text[0].upper() + text[1:] + "." if rng.random() < 0.7 else text


def sample_edit(
    rng: np.random.Generator, split: str = "train", *, kind: str | None = None, pairs: str | None = None
) -> tuple[Scene, str, Scene, str]:
    """A random edit; source and target are both scenes of the split.

    Args:
        rng: see `scene.generator`.
        split: "train" or "held_out".
        kind: one of `EDIT_KINDS`; None draws one uniformly.
        pairs: as in `sample_scene`, for source and target alike; default "seen".

    Returns:
        (source, instruction, target, kind). The instruction names the object unambiguously; what it does not name
        stays.

    Raises:
        ValueError: unknown split, pairs or kind.
    """
    pairs = pairs or "seen"
    check_split(split, pairs)
    if kind is not None and kind not in _EDITS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(EDIT_KINDS)}")
    kind = kind or pick(rng, EDIT_KINDS)
    for _ in range(_MAX_TRIES):
        source = sample_scene(rng, num_objects=_SOURCE_COUNTS.get(kind, (1, 2, 3)), split=split, pairs=pairs)
        for _ in range(_TRIES_PER_SOURCE):
            instruction, target = _EDITS[kind](source, rng)
            if target != source and in_split(target, split, pairs):
                return source, _sentence(instruction, rng), target, kind
    raise RuntimeError(f"no {split} {kind} edit with {pairs} pairs in {_MAX_TRIES} tries")


def sample_multi_reference(
    rng: np.random.Generator, split: str = "train", *, pairs: str | None = None
) -> tuple[tuple[Scene, ...], str, Scene]:
    """Objects of two or three pictures, brought together in one.

    Args:
        rng: see `scene.generator`.
        split: "train" or "held_out"; of all sources and the target.
        pairs: as in `sample_scene`; default "seen".

    Returns:
        (sources, instruction, target): one object of each source, at the place the instruction says. The instruction
        states the background or takes that of one of the pictures.

    Raises:
        ValueError: unknown split or pairs.
    """
    pairs = pairs or "seen"
    check_split(split, pairs)
    for _ in range(_MAX_TRIES):
        count = int(rng.integers(2, 4))
        sources = tuple(sample_scene(rng, num_objects=(1, 2), split=split, pairs=pairs) for _ in range(count))
        for _ in range(_TRIES_PER_SOURCE):
            instruction, target = _combine(sources, rng)
            if in_split(target, split, pairs):
                return sources, _sentence(instruction, rng), target
    raise RuntimeError(f"no {split} multi-reference example with {pairs} pairs in {_MAX_TRIES} tries")


def _combine(sources: Sequence[Scene], rng: np.random.Generator) -> tuple[str, Scene]:
    image_words = pick(rng, _IMAGE_WORDS)
    images = [image_words.format(number=k + 1, ordinal=_ORDINALS[k]) for k in range(len(sources))]
    positions = [tuple(PLACES)[k] for k in rng.permutation(len(PLACES))[: len(sources)]]
    objects, jitters, parts = [], [], []
    for source, image, position in zip(sources, images, positions, strict=True):
        item, jitter, phrase = _chosen(source, rng)
        objects.append(dataclasses.replace(item, position=position))
        jitters.append(jitter)
        parts.append(f"{phrase} from {image} {PLACES[position]}")
    verb = pick(rng, ("put", "place", "combine: ", "draw")).rstrip()
    text = f"{verb} {join_words(parts)}"
    if rng.random() < 0.5:
        background = pick(rng, BACKGROUNDS)
        text += f", on a {background} background"
    else:
        k = int(rng.integers(len(sources)))
        background = sources[k].background
        text += f", on the background of {images[k]}"
    return text, Scene(tuple(objects), background, tuple(jitters))
