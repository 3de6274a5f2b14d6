"""The built-in world: edits of one picture, and pictures combined of several."""

import dataclasses
import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from unifusion_jax.data.shapes import edits, language, scene
from unifusion_jax.data.shapes.scene import Scene, SceneObject, generator, split_of

# The type checks that run in tests look at random entries of sequences, also while hypothesis builds examples.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


@st.composite
def scenes(draw, min_objects=0, max_objects=9):
    cells = draw(st.sets(st.sampled_from(scene.POSITIONS), min_size=min_objects, max_size=max_objects))
    words = [st.sampled_from(values) for values in (scene.SHAPES, scene.COLOURS, scene.SIZES, scene.TEXTURES)]
    objects = tuple(SceneObject(*(draw(word) for word in words), position=cell) for cell in sorted(cells))
    return Scene(objects, draw(st.sampled_from(scene.BACKGROUNDS)))


seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("kind", edits.EDIT_KINDS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_edits_change_exactly_what_they_say(kind, split):
    for k in range(15):
        source, instruction, target, got = edits.sample_edit(generator(1, k), split, kind=kind)
        assert got == kind
        assert split_of(source) == split_of(target) == split
        assert 1 <= len(target.objects) <= 3
        before, after = set(source.objects), set(target.objects)
        gone, new = before - after, after - before
        assert (source.background != target.background) == (kind == "background")
        expected = {"add": (0, 1), "remove": (1, 0), "swap": (2, 2), "background": (0, 0)}.get(kind, (1, 1))
        assert (len(gone), len(new)) == expected
        _check_change(kind, gone, new, target, instruction.lower())
        shifts = dict(zip(source.objects, source.jitter, strict=True))
        for item, shift in zip(target.objects, target.jitter, strict=True):
            assert shifts.get(item, shift) == shift


def _check_change(kind, gone, new, target, instruction):
    attribute = {"recolour": "colour", "retexture": "texture", "resize": "size", "move": "position"}.get(kind)
    if attribute:
        (old,), (changed,) = gone, new
        names = {f.name for f in dataclasses.fields(old) if getattr(old, f.name) != getattr(changed, f.name)}
        assert names == {attribute}
        assert old.shape in instruction
        if kind != "resize":
            assert getattr(changed, attribute) in instruction
    elif kind == "add":
        (added,) = new
        assert all(word in instruction for word in (added.shape, added.colour, added.size, added.texture))
        assert added.position in instruction
    elif kind == "swap":
        strip = [sorted((o.shape, o.colour, o.size, o.texture) for o in objects) for objects in (gone, new)]
        assert strip[0] == strip[1]
        assert {o.position for o in gone} == {o.position for o in new}
    elif kind == "background":
        assert target.background in instruction


@hypothesis.settings(max_examples=300)
@hypothesis.given(scenes(1, 9), seeds)
def test_phrases_refer_to_one_object_only(item, seed):
    rng = generator(seed)
    for wanted in item.objects:
        phrase = edits.referring_phrase(item, wanted, rng)
        places = [position for position, place in language.PLACES.items() if phrase.endswith(" " + place)]
        words = set(phrase.split(" at the ")[0].split(" on the ")[0].split(" in the ")[0].split()) - {"the"}
        matching = [
            other
            for other in item.objects
            if words <= {other.shape, other.colour, other.size, other.texture}
            and (not places or other.position in places)
        ]
        assert matching == [wanted]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_several_pictures_combine_into_one(split):
    counts = set()
    for k in range(25):
        sources, instruction, target = edits.sample_multi_reference(generator(2, k), split)
        counts.add(len(sources))
        assert len(target.objects) == len(sources)
        assert {split_of(item) for item in (*sources, target)} == {split}
        looks = [{(o.shape, o.colour, o.size, o.texture) for o in item.objects} for item in sources]
        assert any(
            all((o.shape, o.colour, o.size, o.texture) in look for o, look in zip(order, looks, strict=True))
            for order in itertools.permutations(target.objects)
        )
        for item in target.objects:
            assert language.PLACES[item.position] in instruction
        stated = f"on a {target.background} background" in instruction
        assert stated or target.background in {item.background for item in sources}
    assert counts == {2, 3}


def test_unknown_edits_are_refused():
    with pytest.raises(ValueError, match="kind is 'paint', but must be one of recolour"):
        edits.sample_edit(generator(0), kind="paint")
    with pytest.raises(ValueError, match="split is 'test'"):
        edits.sample_multi_reference(generator(0), "test")
