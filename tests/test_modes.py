"""What each mode encodes, and which steps it conditions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from pipeline_support import shaken_model

from unifusion_jax import Prompt, modes, sampler
from unifusion_jax.flow import SamplingConfig
from unifusion_jax.request import Request, parse_size
from unifusion_jax.training.rng import stream_key
from unifusion_jax.verifi import SYSTEM_PROMPTS

RED = PIL.Image.new("RGB", (96, 96), "red")
BLUE = PIL.Image.new("RGB", (120, 48), "blue")
SHORT = SYSTEM_PROMPTS["short"]


@pytest.fixture(scope="module")
def model(frozen):
    return shaken_model(frozen)


def kept(states):
    return np.asarray(states.states)[np.asarray(states.mask)]


@pytest.mark.parametrize(
    ("name", "prompt", "images", "words"),
    [
        ("text_to_image", Prompt("a star", target="A star."), 0, True),
        ("edit", Prompt("make it blue", [RED], target="A star."), 4, True),
        ("compose", Prompt("put both on white", [RED, BLUE], target="A star."), 8, True),
        ("joint", Prompt("a star", [RED], target="A star."), 4, True),
        ("variation", Prompt("", [RED]), 4, False),
        ("reconstruct", Prompt("", [RED]), 4, False),
    ],
)
def test_what_conditions(model, name, prompt, images, words):
    condition = model.condition([prompt], mode=name)
    states = condition.states
    is_image = np.asarray(states.is_image)[np.asarray(states.mask)]
    assert is_image.sum() == images
    assert (~is_image).any() == words
    assert condition.first is None
    assert condition.prompts[0].system == SHORT.of(modes.MODES[name].task)


def test_auto_goes_by_pictures_and_target(model):
    for prompt, name in (
        (Prompt("a star"), "text_to_image"),
        (Prompt("a star", [RED]), "edit"),
        (Prompt("a star", [RED, BLUE]), "compose"),
        (Prompt("a star", [RED], target=""), "reconstruct"),
    ):
        assert modes.mode_of(prompt) == name


def test_tiles_of_a_reconstruction(model):
    counts = {}
    for tiles in (1, 5, 10):
        states = model.condition([Prompt("", [RED])], mode="reconstruct", tiles=tiles).states
        counts[tiles] = int(np.asarray(states.mask).sum())
    # Four tokens a tile; 5 is a grid of 2 x 2 and its thumbnail, 10 one of 3 x 3.
    assert counts == {1: 4, 5: 20, 10: 40}


def test_a_variation_looks_once_by_default(model):
    pixels = [
        np.asarray(model.generate([Prompt("", [RED])], mode="variation", seed=seed, steps=2)[0]) for seed in (0, 1)
    ]
    assert (pixels[0] != pixels[1]).any()
    many = dataclasses.replace(model.config.data, tiles_per_image=9)
    other = model.with_params(model.params)
    other.config = dataclasses.replace(model.config, data=many)
    prompt = [Prompt("", [RED])]
    assert np.asarray(other.condition(prompt, mode="variation").states.mask).sum() == 4
    assert np.asarray(other.condition(prompt, mode="reconstruct").states.mask).sum() == 40


def test_zero_shot_edit_switches_from_pictures_to_words(model):
    prompt = Prompt("a blue star", [RED], target="A blue star.")
    condition = model.condition([prompt], mode="zero_shot_edit")
    assert np.asarray(condition.first.is_image)[np.asarray(condition.first.mask)].all()
    assert not np.asarray(condition.states.is_image).any()
    np.testing.assert_allclose(
        kept(condition.first),
        kept(model.condition([Prompt("", [RED])], mode="reconstruct").states),
        rtol=1e-4,
        atol=1e-5,
    )

    def draw(condition, switch):
        sampling = SamplingConfig(5, guidance=2.0, switch=switch)
        return np.asarray(model.sample(condition, seed=2, sampling=sampling)[0]).astype(int)

    words = draw(dataclasses.replace(condition, first=None), 0.2)
    pictures = draw(dataclasses.replace(condition, first=None, states=condition.first), 0.2)
    assert np.abs(draw(condition, 0.0) - words).max() <= 1
    assert np.abs(draw(condition, 1.0) - pictures).max() <= 1
    some = draw(condition, 0.2)
    assert np.abs(some - words).max() > 1 and np.abs(some - pictures).max() > 1


def test_a_switch_is_the_steps_of_one_condition_and_then_those_of_the_other(model):
    condition = model.condition([Prompt("x", [RED], target="A blue star.")], mode="zero_shot_edit")
    phases = tuple(sampler.padded(states, 32) for states in (condition.first, condition.states))
    keys = jnp.stack([stream_key(0, "noise")])
    noise, conditions = sampler.begin(model.params, phases, keys, model=model.model_config, cells=(2, 2))
    sampling = SamplingConfig(5, guidance=2.0, switch=0.4)

    def run(latents, conditions, start, stop):
        return sampler.denoise(model.params, latents, conditions, sampling, start, stop, model=model.model_config)

    together = run(noise, conditions, 0, 5)
    apart = run(run(noise, conditions[:1], 0, 2), conditions[1:], 2, 5)
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(together - run(noise, conditions[1:], 0, 5))).max() > 1e-3


@pytest.mark.parametrize(
    ("mode", "prompt", "message"),
    [
        ("text_to_image", Prompt("a star", [RED]), "takes no reference pictures, got 1"),
        ("edit", Prompt("a star"), "takes exactly 1 reference pictures, got 0"),
        ("edit", Prompt("a star", [RED, BLUE]), "takes exactly 1 reference pictures, got 2"),
        ("compose", Prompt("a star", [RED]), "takes 2 or more reference pictures, got 1"),
        ("variation", Prompt("a star"), "takes exactly 1 reference pictures, got 0"),
        ("zero_shot_edit", Prompt("a star"), "takes exactly 1 reference pictures, got 0"),
        ("edit", Prompt(" ", [RED]), "The prompt is empty. Mode 'edit'"),
        ("auto", Prompt(""), "The prompt is empty. Mode 'text_to_image'"),
        ("auto", Prompt("x", target=""), "Mode 'reconstruct'.* takes 1 or more reference pictures, got 0"),
        ("reconstrut", Prompt("", [RED]), "no mode 'reconstrut'.* Did you mean 'reconstruct'"),
    ],
)
def test_what_a_mode_refuses(model, mode, prompt, message):
    with pytest.raises(ValueError, match=message):
        model.condition([prompt], mode=mode)
    with pytest.raises(ValueError, match=message):
        Request(prompt.instruction, prompt.images, mode, prompt.target)


def test_a_request_draws_what_the_model_draws(model):
    request = Request("a star", mode="text_to_image", target="A star.", seed=4, steps=2, size=64, count=2)
    condition = request.condition(model)
    *_, last = request.sample_in_chunks(model, condition, 1)
    expected = model.generate([Prompt("a star", target="A star.")], seed=4, steps=2, size=64, images_per_prompt=2)
    for ours, theirs in zip(last.images, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    settings = request.settings(condition, 1)
    assert settings["seed"] == 5 and settings["count"] == 1 and settings["target"] == "A star."
    assert "images" not in settings


def test_sizes_as_text():
    assert parse_size(None) is None and parse_size("") is None
    assert parse_size("96") == 96 and parse_size("128x96") == (128, 96)
    with pytest.raises(ValueError, match="size must be a side in px"):
        parse_size("large")
