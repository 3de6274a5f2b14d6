import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx
from training_support import tiny_config

from unifusion_jax import Prompt, UniFusion
from unifusion_jax.config import from_mapping
from unifusion_jax.model import UniFusionModel
from unifusion_jax.pipeline import load_frozen, model_config_of
from unifusion_jax.training.config import TrainConfig


@pytest.fixture(scope="module")
def model(frozen):
    config = from_mapping(TrainConfig, tiny_config(str(frozen)))
    encoder, autoencoder = load_frozen(config)
    sizes = model_config_of(config, encoder.config)
    params = nnx.to_pure_dict(nnx.state(UniFusionModel(sizes, rngs=nnx.Rngs(0)), nnx.Param))
    # The velocity starts at zero whatever the condition; shaken weights make pictures differ.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params)
    return UniFusion(encoder, autoencoder, config, sizes, params)


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
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        model.generate(prompt, seed=[1, 2], steps=1)
