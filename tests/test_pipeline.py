import dataclasses

import jax
import numpy as np
import PIL.Image
import pytest
from pipeline_support import shaken_model

from unifusion_jax import Prompt, UniFusion, sampler
from unifusion_jax.config import to_json
from unifusion_jax.flow import SamplingConfig
from unifusion_jax.training.checkpoints import Checkpoints, write_config
from unifusion_jax.training.optimizer import make_optimizer
from unifusion_jax.training.state import create_state


@pytest.fixture(scope="module")
def model(frozen):
    return shaken_model(frozen)


def pixels(images):
    return [np.asarray(image).astype(int) for image in images]


def test_each_picture_can_be_made_again_alone(model):
    prompts = [Prompt("a red circle", target="A red circle."), Prompt("a blue star", target="A blue star.")]
    both = pixels(model.generate(prompts, seed=5, steps=2))
    alone = pixels(model.generate(prompts[1:], seed=6, steps=2))
    assert np.abs(both[1] - alone[0]).max() <= 1
    assert np.abs(both[0] - both[1]).max() > 1


def test_guidance_seed_and_condition_all_matter(model):
    prompt = [Prompt("x", target="A red circle.")]
    base = pixels(model.generate(prompt, steps=2))[0]
    for change in ({"guidance": 1.0}, {"seed": 1}, {"steps": 3}, {"solver": "heun"}):
        assert np.abs(base - pixels(model.generate(prompt, **({"steps": 2} | change)))[0]).max() > 0, change
    other = pixels(model.generate([Prompt("x", target="A blue star on the left.")], steps=2))[0]
    assert np.abs(base - other).max() > 0


def test_texts_say_what_conditioned(model):
    prompts = [Prompt("a red circle", target="A red circle.")]
    assert model.condition(prompts).texts == ["A red circle."]
    assert model.condition(["a red circle"], rewrite=False).texts == ["a red circle"]
    assert isinstance(model.condition(["a red circle"], max_new_tokens=4).texts[0], str)


def test_reference_images_condition_by_their_tokens(model):
    red, blue = (PIL.Image.new("RGB", (96, 96), colour) for colour in ("red", "blue"))
    states = [model.condition([Prompt("Reproduce.", [image], target="")]).states for image in (red, blue)]
    assert states[0].is_image[states[0].mask].all()
    assert not np.allclose(states[0].states, states[1].states)


def test_other_sizes_and_mistakes(model):
    prompt = [Prompt("x", target="A red circle.")]
    assert model.generate(prompt, steps=1, size=(64, 32))[0].size == (64, 32)
    with pytest.raises(ValueError, match=r"multiples of 16 px, got 50x50. The nearest is 48x48"):
        model.generate(prompt, steps=1, size=50)
    with pytest.raises(ValueError, match="No prompts were given"):
        model.generate([])
    with pytest.raises(ValueError, match="2 seeds for 1 pictures"):
        model.generate(prompt, seed=[1, 2], steps=1)


def test_several_pictures_of_a_prompt_share_its_condition(model, monkeypatch):
    prompts = [Prompt("a red circle", target="A red circle."), Prompt("a blue star", target="A blue star.")]
    encoded = []
    export = model.encoder.export
    monkeypatch.setattr(
        model.encoder, "export", lambda batch, **options: encoded.append(batch) or export(batch, **options)
    )
    pictures = pixels(model.generate(prompts, seed=3, steps=2, images_per_prompt=2))
    assert [len(batch.token_ids) for batch in encoded] == [2]
    assert len(pictures) == 4
    alone = [pixels(model.generate(prompts[row // 2 : row // 2 + 1], seed=3 + row, steps=2))[0] for row in range(4)]
    for together, single in zip(pictures, alone, strict=True):
        assert np.abs(together - single).max() <= 1
    with pytest.raises(ValueError, match="Got 2 seeds for 4 pictures"):
        model.generate(prompts, seed=[1, 2], steps=1, images_per_prompt=2)


def test_chunks_make_the_same_picture_and_tell_how_far_they_are(model):
    condition = model.condition([Prompt("x", target="A red circle.")])
    sampling = SamplingConfig(5, guidance=2.0)
    whole = pixels(model.sample(condition, seed=1, sampling=sampling))
    steps = list(model.sample_in_chunks(condition, seed=1, sampling=sampling, chunk_steps=2))
    assert [(progress.steps, progress.total_steps) for progress in steps] == [(2, 5), (4, 5), (5, 5)]
    assert [progress.images is None for progress in steps] == [True, True, False]
    np.testing.assert_array_equal(pixels(steps[-1].images), whole)
    with pytest.raises(ValueError, match="chunk_steps must be at least 1, got 0"):
        next(model.sample_in_chunks(condition, sampling=sampling, chunk_steps=0))


def test_long_lists_are_drawn_in_batches_of_one_shape(model, monkeypatch, capsys):
    words = (", ".join(["a large red circle on the left", "a blue star"] * 3), "A ring.", "A blue star.")
    prompts = [Prompt("x", target=target) for target in words]
    shapes, begin = [], sampler.begin

    def spy(params, states, keys, **options):
        shapes.append((keys.shape, states[0].states.shape))
        return begin(params, states, keys, **options)

    monkeypatch.setattr(sampler, "begin", spy)
    drawn = list(model.draw(prompts, seed=5, sampling=SamplingConfig(2), batch_size=2))
    assert len(shapes) == 2 and shapes[0] == shapes[1] and shapes[0][0] == (2,) and shapes[0][1][1] > 32
    assert [each.text for each in drawn] == list(words)
    together = pixels(each.image for each in drawn)
    assert "3/3" in capsys.readouterr().err
    alone = [pixels(model.generate([prompt], seed=5 + row, steps=2))[0] for row, prompt in enumerate(prompts)]
    assert "drawing" not in capsys.readouterr().err
    # Several pictures of one prompt go in batches too; seeds may be given one by one.
    several = pixels(model.generate(prompts[2:], seed=[7, 8, 5], steps=2, images_per_prompt=3, batch_size=2))
    first, *_, last = (pixels(model.generate(prompts[2:], seed=seed, steps=2))[0] for seed in (8, 5))
    for one, other in zip([*together, *several], [*alone, alone[2], first, last], strict=True):
        assert np.abs(one - other).max() <= 1
    assert np.abs(first - last).max() > 1 and np.abs(alone[1] - alone[2]).max() > 1
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.generate(prompts, steps=1, batch_size=0)


@pytest.fixture(scope="module")
def compilations():
    found = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: found.append(event) if event.startswith("/jax/core/compile") else None
    )
    return found


def test_a_second_call_compiles_nothing(model, compilations, frozen):
    def draw(model, prompts, **options):
        before = len(compilations)
        model.generate(prompts, **{"steps": 2, "rewrite": False} | options)
        return len(compilations) - before

    red = PIL.Image.new("RGB", (96, 96), "red")
    assert draw(model, ["a red circle"], size=64) > 0
    assert draw(model, ["two stars, the left one large and blue"], size=64, seed=7) == 0
    assert draw(model, ["a ring"], size=64, steps=9, guidance=1.5, guidance_interval=(0.1, 0.8)) == 0
    draw(model, [Prompt("make it blue", [red])], size=64)
    assert draw(model, [Prompt("put a star on the left", [red.resize((50, 40))])], size=64) == 0
    # So does another model of the same sizes.
    assert draw(shaken_model(frozen), ["a ring"], size=64) == 0
    for expected in (True, False):
        before = len(compilations)
        condition = model.condition(["a ring" if expected else "a large star"], max_new_tokens=20)
        model.sample(condition, sampling=SamplingConfig(2), size=64)
        assert (len(compilations) > before) == expected


def test_prompts_with_and_without_a_description_go_together(model):
    prompts = [Prompt("a ring", target="A red circle."), "a star", Prompt("x", target="A blue star on the left.")]
    mixed = model.condition(prompts, max_new_tokens=6)
    assert mixed.texts[0] == "A red circle." and mixed.texts[2] == "A blue star on the left."
    for row, prompt in enumerate(prompts):
        alone = model.condition([prompt], max_new_tokens=6).states
        count = int(np.sum(alone.mask))
        assert int(np.sum(np.asarray(mixed.states.mask)[row])) == count
        np.testing.assert_allclose(
            np.asarray(mixed.states.states)[row, :count], np.asarray(alone.states)[0, :count], rtol=1e-3, atol=1e-4
        )


def test_a_description_can_be_passed_back(model):
    first = model.condition(["a ring"], max_new_tokens=6)
    assert first.finished == [False]
    edited = dataclasses.replace(first.prompts[0], target="A blue star.")
    assert model.condition([edited]).texts == ["A blue star."]


def test_a_prompt_that_fills_the_context_is_refused(model):
    long = "word " * 600
    with pytest.raises(ValueError, match=r"leaves no room for max_new_tokens=96 within the decoder's 512 positions"):
        model.generate([long])
    with pytest.raises(ValueError, match=r"Prompt 0 has \d+ tokens .* the budget is 512"):
        model.generate([long], rewrite=False)


def test_a_checkpoint_without_an_average_gives_its_weights(model, tmp_path):
    config = dataclasses.replace(model.config, ema_decay=0.0)
    write_config(tmp_path, to_json(config))
    state = create_state(model.params, make_optimizer(config.optimizer, config.total_steps), False, ["loss"])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.maybe_save(1, state, {"next_step": 1}, force=True)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, UniFusion.load(tmp_path).params, model.params)
