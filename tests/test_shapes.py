"""The built-in world: scenes, pictures and words."""

import dataclasses
import itertools
import re
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from unifusion_jax.data.shapes import language, scene
from unifusion_jax.data.shapes.render import BACKGROUND_RGB, COLOUR_RGB, OBJECT_SIZE_PX, SECOND_TONE_RGB, render
from unifusion_jax.data.shapes.scene import Scene, SceneObject, generator, sample_scene, split_of

# The type checks that run in tests look at random entries of sequences, also while hypothesis builds examples.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


@st.composite
def scenes(draw, min_objects=0, max_objects=9):
    cells = draw(st.sets(st.sampled_from(scene.POSITIONS), min_size=min_objects, max_size=max_objects))
    words = [st.sampled_from(values) for values in (scene.SHAPES, scene.COLOURS, scene.SIZES, scene.TEXTURES)]
    objects = tuple(SceneObject(*(draw(word) for word in words), position=cell) for cell in sorted(cells))
    return Scene(objects, draw(st.sampled_from(scene.BACKGROUNDS)))


seeds = st.integers(0, 2**32 - 1)


# Scenes and splits


def test_vocabulary_has_the_stated_sizes():
    assert [len(words) for words in scene.ATTRIBUTES.values()] == [6, 8, 2, 3, 9]
    assert len(scene.BACKGROUNDS) == 5
    shapes, colours = zip(*scene.HELD_OUT_PAIRS, strict=True)
    assert sorted(shapes) == sorted(scene.SHAPES) and len(set(colours)) == 6


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_scenes_are_a_function_of_seed_and_index(split):
    def draw(seed):
        return [sample_scene(generator(seed, k), split=split) for k in range(50)]

    first, again = draw(3), draw(3)
    assert first == again
    assert [item.jitter for item in first] == [item.jitter for item in again]
    assert first != draw(4)
    assert sample_scene(generator(3, 17), split=split) == first[17]


def test_train_and_held_out_scenes_are_disjoint_and_pairs_stay_held_out():
    train = [sample_scene(generator(0, k), num_objects=(1, 2)) for k in range(1500)]
    seen = [sample_scene(generator(0, k), num_objects=(1, 2), split="held_out") for k in range(300)]
    unseen = [sample_scene(generator(0, k), split="held_out", pairs="held_out") for k in range(150)]
    assert not {item.canonical for item in train} & {item.canonical for item in seen + unseen}
    assert not any(scene.has_held_out_pair(item) for item in train + seen)
    assert all(scene.has_held_out_pair(item) for item in unseen)
    assert {(o.shape, o.colour) for item in unseen for o in item.objects if o.is_held_out_pair} == scene.HELD_OUT_PAIRS
    assert {(o.shape, o.colour) for item in train for o in item.objects} == (
        set(itertools.product(scene.SHAPES, scene.COLOURS)) - scene.HELD_OUT_PAIRS
    )


@hypothesis.given(scenes())
def test_split_is_decided_by_the_scene_and_not_its_jitter(item):
    jitter = tuple((2, -1) if o.size == "small" else (0, 0) for o in item.objects)
    assert split_of(dataclasses.replace(item, jitter=jitter)) == split_of(item)
    assert scene.in_split(item, "train") != scene.in_split(item, "held_out")
    if scene.has_held_out_pair(item):
        assert split_of(item) == "held_out"


def test_one_sixteenth_of_seen_pair_scenes_is_held_out():
    rng = generator(1)
    drawn = [scene._draw(rng, 2, "seen") for _ in range(4000)]
    share = np.mean([split_of(item) == "held_out" for item in drawn])
    assert abs(share - 1 / scene.HELD_OUT_SHARE) < 0.015


def test_all_words_and_counts_occur_in_training():
    drawn = [sample_scene(generator(5, k)) for k in range(1000)]
    for name, words in scene.ATTRIBUTES.items():
        assert {getattr(o, name) for item in drawn for o in item.objects} == set(words)
    assert {item.background for item in drawn} == set(scene.BACKGROUNDS)
    assert {len(item.objects) for item in drawn} == {1, 2, 3}


def test_objects_are_kept_in_reading_order_with_their_jitter():
    late = SceneObject("ring", "red", "small", "solid", "bottom")
    early = SceneObject("star", "blue", "large", "solid", "top right")
    item = Scene((late, early), "white", ((1, 2), (0, 0)))
    assert item.objects == (early, late) and item.jitter == ((0, 0), (1, 2))
    assert item == Scene((early, late), "white")


_RING = SceneObject("ring", "red", "large", "solid", "top")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SceneObject("hexagon", "red", "small", "solid", "top"),
            "shape is 'hexagon', but must be one of circle",
        ),
        (lambda: Scene((), "mauve"), "background is 'mauve', but must be one of white"),
        (lambda: Scene((_RING, _RING), "white"), "at most one object a cell"),
        (lambda: Scene((_RING,), "white", ((1, 0),)), "must stay within 0 px"),
        (lambda: Scene((_RING,), "white", ((0, 0), (0, 0))), "jitter has 2 entries"),
        (lambda: sample_scene(generator(0), split="test"), "split is 'test'"),
        (lambda: sample_scene(generator(0), pairs="held_out"), "the train split has no held-out pairs"),
        (lambda: sample_scene(generator(0), num_objects=(0, 1)), "must be counts from 1 to 9"),
    ],
)
def test_wrong_scenes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Pictures


def test_background_and_object_colours_are_where_they_belong():
    item = Scene((SceneObject("square", "red", "large", "solid", "bottom left"),), "navy")
    picture = render(item)
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
    assert tuple(picture[80, 16]) == COLOUR_RGB["red"]
    assert (picture[:64] == BACKGROUND_RGB["navy"]).all()


@pytest.mark.parametrize("size", scene.SIZES)
def test_objects_have_the_stated_diameter(size):
    picture = render(Scene((SceneObject("circle", "red", size, "solid", "center"),), "white"))
    rows, columns = np.nonzero((picture != 255).any(2))
    expected_px = OBJECT_SIZE_PX[size]
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == expected_px
    assert rows.min() + rows.max() == columns.min() + columns.max() == 95


@pytest.mark.parametrize(("width_px", "height_px"), [(12, 12), (96, 64), (64, 96), (200, 120), (512, 512)])
def test_any_size_is_drawn_with_its_aspect_ratio(width_px, height_px):
    objects = tuple(
        SceneObject(shape, "green", "large", "solid", position)
        for shape, position in zip(itertools.cycle(scene.SHAPES), scene.POSITIONS, strict=False)
    )
    picture = render(Scene(objects, "white"), (width_px, height_px))
    assert picture.shape == (height_px, width_px, 3)
    covered = (picture != 255).any(2)
    for cell in range(9):
        row, column = divmod(cell, 3)
        rows = slice(row * height_px // 3, (row + 1) * height_px // 3)
        columns = slice(column * width_px // 3, (column + 1) * width_px // 3)
        assert covered[rows, columns].any()
    alone = render(Scene((objects[4],), "white"), (width_px, height_px))
    rows, columns = np.nonzero((alone != 255).any(2))
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1


def test_jitter_moves_the_object_and_scales_with_the_picture():
    small = SceneObject("circle", "red", "small", "solid", "center")
    for size_px, factor in ((96, 1), (192, 2)):
        still = render(Scene((small,), "white"), size_px)
        moved = render(Scene((small,), "white", ((2, -1),)), size_px)
        np.testing.assert_array_equal(np.roll(still, (-factor, 2 * factor), (0, 1)), moved)


def test_every_shape_texture_and_size_looks_different():
    masks = {}
    for shape, texture, size in itertools.product(scene.SHAPES, scene.TEXTURES, scene.SIZES):
        picture = render(Scene((SceneObject(shape, "yellow", size, texture, "center"),), "black"))
        masks[shape, texture, size] = picture.astype(float)
    for (_, one), (_, other) in itertools.combinations(masks.items(), 2):
        different_px = (np.abs(one - other).max(2) > 60).sum()
        assert different_px >= 30


def test_both_tones_stand_out_on_every_background_and_from_each_other():
    for name in scene.COLOURS:
        first, second = np.array(COLOUR_RGB[name]), np.array(SECOND_TONE_RGB[name])
        assert np.linalg.norm(first - second) >= 100
        for background in BACKGROUND_RGB.values():
            assert np.linalg.norm(first - background) >= 85
            assert np.linalg.norm(second - background) >= 60
    for one, other in itertools.combinations(COLOUR_RGB.values(), 2):
        assert np.linalg.norm(np.subtract(one, other)) >= 75


def test_drawing_is_fast_enough_to_train_from():
    drawn = [sample_scene(generator(2, k)) for k in range(300)]
    for item in drawn:
        render(item)
    start_s = time.perf_counter()
    for item in drawn:
        render(item)
    assert (time.perf_counter() - start_s) / len(drawn) < 2e-3


def test_too_small_a_picture_is_refused():
    with pytest.raises(ValueError, match="needs sides of at least 12 px"):
        render(Scene((), "white"), 11)


# Words


def test_the_description_has_its_fixed_form():
    item = Scene(
        (
            SceneObject("square", "blue", "small", "solid", "bottom right"),
            SceneObject("circle", "red", "large", "striped", "top left"),
        ),
        "white",
    )
    assert language.describe(item) == (
        "A picture of two objects on a white background. At the top left, a large red striped circle. "
        "At the bottom right, a small blue solid square."
    )
    one = Scene((SceneObject("cross", "pink", "small", "dotted", "center"),), "navy")
    assert language.describe(one) == (
        "A picture of one object on a navy background. In the center, a small pink dotted cross."
    )


@hypothesis.settings(max_examples=300)
@hypothesis.given(scenes())
def test_descriptions_read_back(item):
    assert language.parse_description(language.describe(item)) == item


def test_thousands_of_sampled_descriptions_read_back():
    for k in range(2000):
        item = sample_scene(generator(11, k))
        assert language.parse_description(language.describe(item)) == item


_OPENING = "A picture of one object on a white background"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends with a full stop"),
        ("A picture of one object on a white background", "ends with a full stop"),
        ("Two objects on a white background.", "expected 'A picture of"),
        (f"{_OPENING}. At the top, a red circle.", "expected '<Place>, a <size>"),
        (f"{_OPENING}. Near the top, a small red solid circle.", "expected '<Place>, a <size>"),
        (f"{_OPENING}. At the top, a small red solid hexagon.", "shape is 'hexagon'"),
        (f"{_OPENING}.", "announces one objects but lists 0"),
        ("A picture of no objects on a mauve background.", "background is 'mauve'"),
        (
            "A picture of two objects on a white background. At the top, a small red solid ring. "
            "At the top, a small red solid star.",
            "at most one object a cell",
        ),
    ],
)
def test_other_texts_are_not_descriptions(text, message):
    with pytest.raises(ValueError, match=message):
        language.parse_description(text)


def _fits(facts, item, chosen):
    """Independent check of facts about objects `chosen` for the entities."""
    sides = {
        "left of": lambda a, b: a.column < b.column,
        "right of": lambda a, b: a.column > b.column,
        "above": lambda a, b: a.row < b.row,
        "below": lambda a, b: a.row > b.row,
    }
    for fact in facts:
        if fact.name == "count":
            good = int(fact.value) == len(item.objects)
        elif fact.name == "background":
            good = fact.value == item.background
        elif fact.name == "placement":
            good = sides[fact.value](chosen[fact.entity], chosen[fact.other])
        else:
            good = getattr(chosen[fact.entity], fact.name) == fact.value
        if not good:
            return False
    return True


_BACKGROUND_PHRASE = rf"(on|against|,)( a)? ({'|'.join(scene.BACKGROUNDS)})"


@hypothesis.settings(max_examples=300)
@hypothesis.given(scenes(1, 3), seeds)
def test_prompts_state_true_facts_about_every_object(item, seed):
    prompt, facts = language.user_prompt(item, generator(seed))
    entities = {fact.entity for fact in facts} - {None}
    assert entities == set(range(len(item.objects)))
    assert any(_fits(facts, item, chosen) for chosen in itertools.permutations(item.objects))
    assert [fact.value for fact in facts if fact.category == "count"] == [str(len(item.objects))]
    words = prompt.lower()
    stems = {"striped": "strip", "dotted": "dot"}
    for fact in facts:
        if fact.name in ("shape", "colour", "size", "texture", "background"):
            assert stems.get(fact.value, fact.value) in words
    assert ("background" in {fact.name for fact in facts}) == bool(re.search(_BACKGROUND_PHRASE, words))


def test_prompts_vary_and_leave_things_out():
    item = sample_scene(generator(8), num_objects=2)
    prompts = [language.user_prompt(item, generator(8, k)) for k in range(200)]
    assert len({prompt for prompt, _ in prompts}) > 150
    stated = [fact.name for _, facts in prompts for fact in facts]
    for name in ("colour", "size", "texture", "position"):  # of both objects
        assert 0 < stated.count(name) < 2 * len(prompts)
    for name in ("background", "placement"):
        assert 0 < stated.count(name) < len(prompts)
    lengths = [len(prompt) for prompt, _ in prompts]
    assert np.median(lengths) < len(language.describe(item))


def test_all_facts_of_a_scene_are_listed():
    left = SceneObject("circle", "red", "large", "solid", "left")
    corner = SceneObject("star", "blue", "small", "dotted", "top right")
    facts = language.facts(Scene((left, corner), "beige"))  # the corner comes first in reading order
    assert language.Fact("relation", "placement", "right of", 0, 1) in facts
    assert language.Fact("relation", "placement", "above", 0, 1) in facts
    assert language.Fact("relation", "position", "left", 1) in facts
    assert language.Fact("attribute", "texture", "dotted", 0) in facts
    assert {fact.category for fact in facts} == set(language.FACT_CATEGORIES)
    assert len(facts) == 2 + 2 * 5 + 4


def test_an_empty_scene_has_no_prompt():
    with pytest.raises(ValueError, match="at least one object"):
        language.user_prompt(Scene((), "white"), generator(0))
