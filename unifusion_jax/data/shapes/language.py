"""Words for scenes: short user prompts, the long target description, and the facts that either of them states.

Two registers, as in the paper's rewriting (VERIFI): users write briefly, in many ways, and leave things out; the target
description says everything in one fixed form, which `parse_description` reads back.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from unifusion_jax.data.shapes.scene import Scene, SceneObject, pick

FACT_CATEGORIES = ("entity", "attribute", "relation", "count", "global")
PLACES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = ("left of", "right of", "above", "below")

_PLURALS = {"cross": "crosses"}
_OTHER_PLACES = {
    "top left": ("in the top left corner", "in the upper left"),
    "top": ("at the top center", "in the upper middle"),
    "top right": ("in the top right corner", "in the upper right"),
    "left": ("at the left", "on the left side"),
    "center": ("in the middle", "at the center"),
    "right": ("at the right", "on the right side"),
    "bottom left": ("in the bottom left corner", "in the lower left"),
    "bottom": ("at the bottom center", "in the lower middle"),
    "bottom right": ("in the bottom right corner", "in the lower right"),
}
_RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
_OPENINGS = 4 * ("",) + (
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "draw ",
    "show me ",
    "please draw ",
    "paint ",
)
DETAILS = ("brief", "mixed", "full")
_COUNT_OPENINGS = ("{count} {noun}: ", "a picture with {count} {noun}: ", "draw {count} {noun}: ")
_BACKGROUND_WORDS = (" on a {} background", " on {}", ", {} background", " against a {} background")

_SENTENCE = re.compile(
    r"(?P<place>[A-Z][a-z ]+), a (?P<size>\w+) (?P<colour>\w+) (?P<texture>\w+) (?P<shape>\w+)",
)
_OPENING_SENTENCE = re.compile(r"A picture of (?P<count>\w+) objects? on a (?P<background>\w+) background")


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing that a text states about a picture.

    Attributes:
        category: one of `FACT_CATEGORIES`.
        name: "shape" (entity), "colour", "size" or "texture" (attribute), "position" or "placement" (relation: where in
            the picture, or where with respect to another entity), "count", or "background" (global).
        value: the word stated; for a placement one of `RELATIONS`; for the count a number in digits.
        entity: index of the entity it is about, in the order the text names them; None for count and global facts.
        other: for a placement, the entity it is relative to.
    """

    category: str
    name: str
    value: str
    entity: int | None = None
    other: int | None = None


def with_article(noun: str) -> str:
    """`noun` after "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    """The plural of a shape's name."""
    return _PLURALS.get(noun, noun + "s")


def join_words(parts: Sequence[str]) -> str:
    """Parts as a list in a sentence: "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def noun_phrase(item: SceneObject, attributes: Sequence[str]) -> str:
    """The object without an article, with some of its attributes, e.g. "small red striped circle"."""
    words = [getattr(item, name) for name in ("size", "colour", "texture") if name in attributes]
    return " ".join([*words, item.shape])


def place_phrase(position: str, rng: np.random.Generator) -> str:
    """One of the ways to name a position, most often the canonical one."""
    return PLACES[position] if rng.random() < 0.5 else pick(rng, _OTHER_PLACES[position])


def describe(scene: Scene) -> str:
    """The long description: all of the scene, in one fixed form, objects in row-major order of their cells.

    Args:
        scene: any scene.

    Returns:
        For example "A picture of two objects on a white background. At the top left, a large red striped circle. At the
        bottom right, a small blue solid square."
    """
    count = len(scene.objects)
    sentences = [f"A picture of {COUNT_WORDS[count]} {_objects(count)} on a {scene.background} background"]
    for item in scene.objects:
        place = PLACES[item.position]
        sentences.append(f"{place[0].upper()}{place[1:]}, a {noun_phrase(item, ('size', 'colour', 'texture'))}")
    return ". ".join(sentences) + "."


def parse_description(text: str) -> Scene:
    """The scene that a description describes: the inverse of `describe`.

    Args:
        text: a description in the form of `describe`; white space at the ends is ignored.

    Returns:
        The scene, without jitter.

    Raises:
        ValueError: the text is not of that form, uses a word outside the vocabulary, names a cell twice, or announces
            another number of objects than it lists. The message quotes the sentence at fault.
    """
    text = text.strip()
    if not text.endswith("."):
        raise ValueError(f"a description ends with a full stop, got {text[-40:]!r}")
    opening_text, *sentences = text[:-1].split(". ")
    opening = _OPENING_SENTENCE.fullmatch(opening_text)
    if opening is None:
        raise ValueError(f"expected 'A picture of <count> objects on a <background> background', got {opening_text!r}")
    places = {place.lower(): position for position, place in PLACES.items()}
    objects = []
    for sentence in sentences:
        match = _SENTENCE.fullmatch(sentence)
        if match is None or match["place"].lower() not in places:
            raise ValueError(f"expected '<Place>, a <size> <colour> <texture> <shape>', got {sentence!r}")
        words = [match[name] for name in ("shape", "colour", "size", "texture")]
        try:
            objects.append(SceneObject(*words, position=places[match["place"].lower()]))
        except ValueError as error:
            raise ValueError(f"in {sentence!r}: {error}") from error
    if opening["count"] != COUNT_WORDS[min(len(objects), 9)]:
        raise ValueError(f"the description announces {opening['count']} objects but lists {len(objects)}")
    return Scene(tuple(objects), opening["background"])


def relations_between(item: SceneObject, other: SceneObject) -> tuple[str, ...]:
    """The placements of `RELATIONS` that hold between two objects: a side counts when the columns or rows differ."""
    holds = (
        item.column < other.column,
        item.column > other.column,
        item.row < other.row,
        item.row > other.row,
    )
    return tuple(name for name, held in zip(RELATIONS, holds, strict=True) if held)


def facts(scene: Scene) -> tuple[Fact, ...]:
    """Everything there is to say about a scene; entity k is `scene.objects[k]`."""
    stated = [Fact("count", "count", str(len(scene.objects))), Fact("global", "background", scene.background)]
    for k, item in enumerate(scene.objects):
        stated += _object_facts(item, k, ("size", "colour", "texture", "position"))
        for j, other in enumerate(scene.objects):
            stated += [Fact("relation", "placement", name, k, j) for name in relations_between(item, other)]
    return tuple(stated)


def user_prompt(scene: Scene, rng: np.random.Generator, *, detail: str | None = None) -> tuple[str, tuple[Fact, ...]]:
    """A short prompt for a scene, as a user might write it.

    All objects are named, so their count is always a fact; which of their attributes, their places and the background
    are mentioned is random, and some prompts place two objects relative to each other.

    Args:
        scene: a scene with at least one object.
        rng: decides the phrasing.
        detail: how much it says of the objects, one of `DETAILS`: "brief", "mixed", or "full" for every attribute and the
            background; random by default.

    Returns:
        (prompt, facts): entities are numbered in the order the prompt names them.

    Raises:
        ValueError: the scene is empty, or an unknown detail.
    """
    if not scene.objects:
        raise ValueError("a prompt needs at least one object, got an empty scene")
    check_detail(detail)
    items = [scene.objects[k] for k in rng.permutation(len(scene.objects))]
    drawn = ("brief", "mixed", "mixed", "mixed", "full")[int(rng.integers(5))]
    detail = detail or drawn
    mentioned = [_mentioned(detail, rng) for _ in items]
    stated: list[Fact] = []
    if len(items) > 1 and rng.random() < 0.35:
        body, items, mentioned, stated = _relational(items, mentioned, rng)
    elif detail == "brief" and len({(item.shape, item.colour) for item in items}) == 1 < len(items):
        body = f"{COUNT_WORDS[len(items)]} {items[0].colour} {plural(items[0].shape)}"
    else:
        body = join_words([_mention(item, names, rng) for item, names in zip(items, mentioned, strict=True)])
        if len(items) > 1 and rng.random() < 0.1:
            body = body.replace(" and ", ", ")
    stated += [Fact("count", "count", str(len(items)))]
    for k, (item, names) in enumerate(zip(items, mentioned, strict=True)):
        stated += _object_facts(item, k, names)
    if rng.random() < {"brief": 0.15, "mixed": 0.55, "full": 1.0}[detail]:
        body += pick(rng, _BACKGROUND_WORDS).format(scene.background)
        stated.append(Fact("global", "background", scene.background))
    return _open(body, len(items), rng), tuple(stated)


def check_detail(detail: str | None) -> None:
    """Raises ValueError for a level of detail that prompts do not have."""
    if detail is not None and detail not in DETAILS:
        raise ValueError(f"detail is {detail!r}, but must be one of {', '.join(DETAILS)}, or None for a random one")


def _open(body: str, count: int, rng: np.random.Generator) -> str:
    """The prompt with an opening, sometimes one that announces the number of objects."""
    if rng.random() < 0.12:
        noun = "object" if rng.random() < 0.5 else "shape"
        opening = pick(rng, _COUNT_OPENINGS).format(count=COUNT_WORDS[count], noun=noun if count == 1 else noun + "s")
    else:
        opening = pick(rng, _OPENINGS)
    text = opening + body
    return text[0].upper() + text[1:] + "." if rng.random() < 0.3 else text


def _mentioned(detail: str, rng: np.random.Generator) -> tuple[str, ...]:
    """Which of an object's attributes a prompt mentions."""
    shares = {"brief": (0.0, 1.0, 0.0, 0.0), "mixed": (0.45, 0.94, 0.45, 0.5), "full": (1.0, 1.0, 1.0, 1.0)}[detail]
    names = ("size", "colour", "texture", "position")
    return tuple(name for name, share in zip(names, shares, strict=True) if rng.random() < share)


def _mention(item: SceneObject, names: Sequence[str], rng: np.random.Generator) -> str:
    """The object with its article, the named attributes and, when named, its place."""
    suffix = ""
    if "texture" in names and item.texture != "solid" and rng.random() < 0.25:
        suffix = {"striped": " with stripes", "dotted": " with dots"}[item.texture]
        names = [name for name in names if name != "texture"]
    text = with_article(noun_phrase(item, names)) + suffix
    return f"{text} {place_phrase(item.position, rng)}" if "position" in names else text


def _relational(
    items: list[SceneObject], mentioned: list[tuple[str, ...]], rng: np.random.Generator
) -> tuple[str, list[SceneObject], list[tuple[str, ...]], list[Fact]]:
    """Place the first two objects relative to each other."""
    first, second = items[:2]
    relation = _main_relation(first, second)
    pair = [tuple(name for name in names if name != "position") for names in mentioned[:2]]
    words = pick(rng, _RELATION_WORDS[relation])
    parts = [f"{_mention(first, pair[0], rng)} {words} {_mention(second, pair[1], rng)}"]
    parts += [_mention(item, names, rng) for item, names in zip(items[2:], mentioned[2:], strict=True)]
    return join_words(parts), items, pair + mentioned[2:], [Fact("relation", "placement", relation, 0, 1)]


def _main_relation(item: SceneObject, other: SceneObject) -> str:
    """The placement along the axis on which two objects are further apart."""
    down, right = other.row - item.row, other.column - item.column
    if abs(right) >= abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def _object_facts(item: SceneObject, entity: int, names: Sequence[str]) -> Iterator[Fact]:
    yield Fact("entity", "shape", item.shape, entity)
    for name in names:
        yield Fact("relation" if name == "position" else "attribute", name, getattr(item, name), entity)


def _objects(count: int) -> str:
    return "object" if count == 1 else "objects"
