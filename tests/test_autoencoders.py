"""Autoencoders as the rest of the project uses them; `test_autoencoders_*.py` compares them with diffusers."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from autoencoders_support import perturbed
from flax import nnx

from unifusion_jax import autoencoders
from unifusion_jax.autoencoders import Autoencoder, AutoencoderKLConfig
from unifusion_jax.autoencoders.loss import _gradient_error
from unifusion_jax.parallel import attention
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
TINY = AutoencoderKLConfig(z_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2)


@functools.cache
def tiny():
    return perturbed(Autoencoder.create(TINY, seed=1))


def test_bfloat16_and_mesh(tmp_path):
    tiny().save(tmp_path)
    exact = autoencoders.load(tmp_path)
    half = autoencoders.load(tmp_path, dtype="bfloat16", mesh=make_mesh(MeshConfig(data=2, fsdp=4)))
    first, last = (half.params["encoder"][name]["kernel"] for name in ("conv_in", "conv_out"))
    assert first.dtype == jnp.bfloat16
    assert first.shape[-1] == 8 and first.sharding.shard_shape(first.shape)[-1] == 2
    assert last.shape[-1] == 6 and last.sharding.is_fully_replicated  # what fsdp does not divide stays whole
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    latents = half.encode(images)
    assert latents.dtype == jnp.float32
    np.testing.assert_allclose(latents, exact.encode(images), atol=0.1)


def test_pure_functions_and_sampling():
    autoencoder = tiny()
    images = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3), minval=-1.0)
    latents = jax.jit(autoencoder.encode_fn)(autoencoder.params, images)
    np.testing.assert_allclose(latents, autoencoder.encode(images), atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(autoencoder.decode_fn)(autoencoder.params, latents), autoencoder.decode(latents), atol=1e-6
    )

    @jax.jit
    def draw(params, keys):
        module = autoencoder.module(params)
        return jax.vmap(lambda key: module.encode(images, key))(keys), module.encode_moments(images).logvar

    samples, logvar = draw(autoencoder.params, jax.random.split(jax.random.key(0), 400))
    np.testing.assert_allclose(samples.mean(0), latents, atol=0.02)  # standard deviation 0.05
    np.testing.assert_allclose(samples.std(0), jnp.exp(0.5 * logvar), rtol=0.25)


def test_attention_over_many_cells_equals_all_pairs(monkeypatch):
    config = dataclasses.replace(TINY, block_out_channels=(8,), down_block_types=(), up_block_types=())
    autoencoder = perturbed(Autoencoder.create(config))
    images = jax.random.uniform(jax.random.key(0), (2, 5, 7, 3))

    def encode():
        # Made here, so that each call is traced anew.
        return jax.jit(lambda params: autoencoder.module(params).encode(images))(autoencoder.params)

    whole = encode()
    monkeypatch.setattr(attention, "_BLOCK_TOKENS", 14)  # 35 cells: three blocks of twelve, the last one not full
    np.testing.assert_allclose(encode(), whole, atol=1e-5)


@pytest.mark.parametrize("levels_pack", [(2, 1), (4, 2)])
def test_latent_statistics(levels_pack):
    levels, pack = levels_pack
    config = AutoencoderKLConfig(
        z_channels=3,
        block_out_channels=(4,) * levels,
        layers_per_block=1,
        norm_num_groups=2,
        pack=pack,
        shift_factor=0.3,
    )
    generator = np.random.default_rng(0)
    batches = [generator.uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32) for _ in range(3)]
    for start in (config, dataclasses.replace(config, batch_norm_eps=1e-4, shift_factor=None)):
        autoencoder = Autoencoder.create(start).with_latent_statistics(batches)
        latents = np.concatenate([autoencoder.encode(batch) for batch in batches])
        by_channel = latents.reshape(-1, config.z_channels, pack**2)
        np.testing.assert_allclose(by_channel.mean((0, 2)), 0.0, atol=1e-3)
        np.testing.assert_allclose(by_channel.std((0, 2)), 1.0, atol=2e-2)
        z = jax.jit(lambda params, images, made=autoencoder: made.module(params).encode_moments(images).mean)
        expected = z(autoencoder.params, jnp.asarray(batches[0]))
        made = autoencoder.module().denormalise(autoencoder.encode(batches[0]))
        np.testing.assert_allclose(made, expected, atol=1e-5)
    with pytest.raises(ValueError, match="at least two latent cells"):
        autoencoder.with_latent_statistics([])


def test_training_lowers_the_loss():
    autoencoder = Autoencoder.create(TINY, seed=0)
    generator = np.random.default_rng(0)
    colours = generator.uniform(-1, 1, (8, 1, 1, 3)).astype(np.float32)
    images = jnp.asarray(np.broadcast_to(colours, (8, 8, 8, 3)))

    @jax.jit
    def step(params, key):
        def loss(params):
            return autoencoders.autoencoder_loss(autoencoder.module(params), images, key)

        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, gradients), metrics

    params, history = autoencoder.params, []
    for index in range(40):
        params, metrics = step(params, jax.random.key(index))
        history.append(float(metrics["loss"]))
    assert history[-1] < 0.6 * history[0]
    weights = autoencoders.LossWeights()
    expected = sum(getattr(weights, name) * metrics[name] for name in ("l1", "l2", "gradient", "kl"))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["psnr_db"], 10 * np.log10(4 / metrics["l2"]), rtol=1e-5)


def test_gradient_term_sees_edges_only():
    flat = jnp.full((1, 8, 8, 3), 0.5)
    assert _gradient_error(flat, 3) == 0.0
    step_edge = jnp.zeros((1, 8, 8, 1)).at[:, :, 4:].set(1.0)
    # one of 7, 3 and 1 horizontal differences is 1 at the three scales, none of the vertical ones
    np.testing.assert_allclose(_gradient_error(step_edge, 3), 0.5 * (1 / 7 + 1 / 3 + 1) / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 9, 8, 3), np.float32, r"multiples of 2 px .* got 9 x 8 px.* resize the images, e\.g\. to 8 x 8 px"),
        ((1, 8, 8, 4), np.float32, r"images must be an array \[batch, height, width, 3\], got shape \(1, 8, 8, 4\)"),
        ((8, 8, 3), np.float32, "images must be an array"),
        ((1, 8, 8, 3), np.uint8, r"floating point \(uint8 given\); bring 8-bit images to \[-1, 1\]"),
    ],
)
def test_bad_images(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        tiny().encode(np.zeros(shape, dtype))


def test_bad_latents():
    with pytest.raises(
        ValueError, match=r"latents must be an array \[batch, height, width, 3\], got shape \(1, 4, 4, 5\)"
    ):
        tiny().decode(np.zeros((1, 4, 4, 5), np.float32))


@pytest.fixture
def folder(tmp_path):
    tiny().save(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected a folder with config\.json"):
        autoencoders.load(folder / "nowhere")
    edit_config(folder, unheard_of=3)
    with pytest.warns(UserWarning, match=r"does not know and that are left out: \['unheard_of'\]"):
        autoencoders.load(folder)
    edit_config(folder, latent_channels=5)
    with pytest.raises(
        ValueError,
        match=r"(?s)config.json the one .*decoder\.conv_in\.kernel: got \(3, 3, 3, 8\), the config expects \(3, 3, 5, 8\)",
    ):
        autoencoders.load(folder)
    edit_config(folder, _class_name="AutoencoderDC")
    with pytest.raises(
        ValueError,
        match=r"'AutoencoderDC', .* values: AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLWan, AutoencoderKLQwenImage, "
        "AutoencoderKLQwenImage21, AutoencoderTiny",
    ):
        autoencoders.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        autoencoders.load(folder)


def test_bad_weights(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        autoencoders.load(folder)
    tensors = safetensors.numpy.load(whole)
    kept = {name: value for name, value in tensors.items() if name != "encoder.conv_in.weight"}
    safetensors.numpy.save_file(kept | {"stray": np.zeros(2, np.float32)}, file)
    with pytest.raises(ValueError, match=r"(?s)2 weights of .* unexpected: stray.*missing: encoder.conv_in.kernel"):
        autoencoders.load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"No \*.safetensors file"):
        autoencoders.load(folder)


def test_pipeline_folder(folder, tmp_path):
    pipeline = tmp_path / "pipeline"
    tiny().save(pipeline / "vae")
    (pipeline / "model_index.json").write_text("{}")
    assert autoencoders.load(pipeline).config == TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": ()}, "at least one level"),
        ({"norm_num_groups": 3}, r"norm_num_groups=3 must divide every width, got widths \[8, 8, 8, 8\]"),
        ({"down_block_types": (DOWN,)}, "down_block_types must name 2 levels like block_out_channels, got 1"),
        ({"up_block_types": (UP, "CrossUp")}, r"unsupported blocks \['CrossUp'\]; supported: \['UpDecoderBlock2D'"),
        ({"decoder_block_out_channels": (8,)}, "decoder_block_out_channels must have 2 levels"),
        ({"pack": 3}, "pack must be 1 .* got 3"),
        ({"scaling_factor": 0.0}, "scaling_factor must be positive, got 0.0"),
        ({"latents_mean": (0.0,) * 3}, "go together"),
        ({"latents_mean": (0.0,) * 3, "latents_std": (1.0,) * 2}, "need 3 entries, .* got 3 and 2"),
        ({"latents_mean": (0.0,) * 3, "latents_std": (1.0,) * 3, "shift_factor": 1.0}, "both shift the latents"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_bad_diffusers_configs():
    with pytest.raises(ValueError, match=r"act_fn must be 'silu'.* got 'relu'"):
        AutoencoderKLConfig.from_diffusers({"_class_name": "AutoencoderKL", "act_fn": "relu"})
    with pytest.raises(ValueError, match=r"patch_size must be \[2, 2\] or \[1, 1\], got \[4, 4\]"):
        AutoencoderKLConfig.from_diffusers({"_class_name": "AutoencoderKLFlux2", "patch_size": [4, 4]})
    with pytest.raises(ValueError, match="must not be negative"):
        autoencoders.LossWeights(l1=-1.0)


def test_demo_is_small():
    config = AutoencoderKLConfig.demo()
    module = nnx.eval_shape(lambda: autoencoders.AutoencoderKL(config, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module))) <= 900_000
    assert (config.downsample, config.latent_channels) == (16, 32)
