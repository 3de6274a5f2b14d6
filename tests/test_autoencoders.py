"""Autoencoders against diffusers: random tiny models share weights through diffusers folders."""

import dataclasses
import functools
import json
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx

from unifusion_jax import autoencoders
from unifusion_jax.autoencoders import Autoencoder, AutoencoderKLConfig, kl
from unifusion_jax.autoencoders.kl import pack_cells, unpack_cells
from unifusion_jax.autoencoders.loss import _gradient_error

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
ATTENTION_DOWN, ATTENTION_UP = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
TOLERANCE = 1e-4  # of the root mean square of the reference


def widths(*values):
    return {
        "block_out_channels": values,
        "down_block_types": (DOWN,) * len(values),
        "up_block_types": (UP,) * len(values),
        "norm_num_groups": 4,
    }


KL_VARIANTS = {
    "one_level": widths(8),
    "two_levels": widths(8, 12) | {"layers_per_block": 2},
    "three_levels_no_quant": widths(8, 8, 12) | {"use_quant_conv": False, "use_post_quant_conv": False},
    "packed_sd": widths(8, 8, 12, 16) | {"scaling_factor": 0.18215},
    "packed_shift": widths(8, 8, 8, 8) | {"latent_channels": 3, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "packed_statistics": widths(4, 8, 8, 12)
    | {"latents_mean": (0.5, -0.25, 0.0, 1.0), "latents_std": (0.5, 2.0, 1.0, 3.0), "scaling_factor": 0.5},
    "five_levels_attention": widths(4, 8, 8, 8, 12)
    | {"down_block_types": (DOWN,) * 4 + (ATTENTION_DOWN,), "up_block_types": (ATTENTION_UP,) + (UP,) * 4},
    "attention_everywhere": widths(8, 12, 16)
    | {"down_block_types": (ATTENTION_DOWN,) * 3, "up_block_types": (ATTENTION_UP,) * 3, "layers_per_block": 2},
    "no_attention": widths(8, 12, 8) | {"mid_block_add_attention": False, "use_quant_conv": False},
    "only_quant_conv": widths(8, 8) | {"use_post_quant_conv": False, "latent_channels": 2},
}
FLUX2_VARIANTS = {
    "flux2": widths(8, 8, 12, 12) | {"latent_channels": 4},
    "flux2_small_decoder": widths(8, 16, 16)
    | {"latent_channels": 3, "decoder_block_out_channels": (4, 8, 8), "batch_norm_eps": 1e-2},
}


def randomised(model, seed=0):
    """Gives every weight, norm scales and batch-norm statistics included, a value that a slip would show in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 3 + 0.1)
            elif "running_mean" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def reference_encode(model, images, pack):
    """Posterior mean -> packing -> normalisation, as diffusers' pipelines do around the model."""
    z = model.encode(images).latent_dist.mode()
    if isinstance(model, diffusers.AutoencoderKLFlux2):
        z = torch.nn.functional.pixel_unshuffle(z, pack)
        std = torch.sqrt(model.bn.running_var + model.config.batch_norm_eps)
        return (z - model.bn.running_mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    mean, std = reference_statistics(model.config)
    z = (z - mean) * model.config.scaling_factor / std
    return torch.nn.functional.pixel_unshuffle(z, pack)


def reference_decode(model, latents, pack):
    if isinstance(model, diffusers.AutoencoderKLFlux2):
        std = torch.sqrt(model.bn.running_var + model.config.batch_norm_eps)
        latents = latents * std.view(1, -1, 1, 1) + model.bn.running_mean.view(1, -1, 1, 1)
        return model.decode(torch.nn.functional.pixel_shuffle(latents, pack)).sample
    mean, std = reference_statistics(model.config)
    z = torch.nn.functional.pixel_shuffle(latents, pack)
    return model.decode(z / model.config.scaling_factor * std + mean).sample


def reference_statistics(config):
    if config.latents_mean is not None:
        return (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return torch.tensor(config.shift_factor or 0.0), torch.tensor(1.0)


def assert_close(ours, reference):
    reference = reference.permute(0, 2, 3, 1).numpy()
    assert ours.shape == reference.shape
    worst = float(np.abs(np.asarray(ours) - reference).max() / np.sqrt(np.mean(reference**2)))
    print(f"max difference / rms: {worst:.2e}")
    assert worst < TOLERANCE


def assert_same_maps(ours, model, pack):
    generator = torch.Generator().manual_seed(1)
    cells = {1: 4, 2: 3}[pack]
    images = torch.rand((2, 3, cells * ours.downsample, (cells + 1) * ours.downsample), generator=generator) * 2 - 1
    with torch.no_grad():
        latents = reference_encode(model, images, pack)
        decoded = reference_decode(model, latents, pack)
    assert_close(ours.encode(images.permute(0, 2, 3, 1).numpy()), latents)
    assert_close(ours.decode(latents.permute(0, 2, 3, 1).numpy()), decoded)


def build(variant):
    if variant in KL_VARIANTS:
        return randomised(diffusers.AutoencoderKL(**KL_VARIANTS[variant]))
    return randomised(diffusers.AutoencoderKLFlux2(**FLUX2_VARIANTS[variant]))


@pytest.mark.parametrize("variant", [*KL_VARIANTS, *FLUX2_VARIANTS])
def test_equals_diffusers(variant, tmp_path):
    model = build(variant)
    model.save_pretrained(tmp_path / "theirs")
    ours = autoencoders.load(tmp_path / "theirs")
    levels = len(model.config.block_out_channels)
    pack = 2 if variant in FLUX2_VARIANTS or levels == 4 else 1
    assert ours.downsample == pack * 2 ** (levels - 1)
    assert ours.latent_channels == model.config.latent_channels * pack**2
    assert_same_maps(ours, model, pack)

    ours.save(tmp_path / "ours")
    back = type(model).from_pretrained(tmp_path / "ours").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert_same_maps(autoencoders.load(tmp_path / "ours"), back, pack)


def flux_original_name(name, levels):
    """Inverse of the renaming: a diffusers name in the spelling of the original LDM, FLUX.1 and FLUX.2 files."""
    if name.startswith(("quant_conv", "post_quant_conv")):
        return ("encoder." if name.startswith("quant") else "decoder.") + name
    parts = name.split(".")
    if parts[1] in ("down_blocks", "up_blocks"):
        side = parts[1].removesuffix("_blocks")
        index = parts[2] if side == "down" else str(levels - 1 - int(parts[2]))
        kind = {"resnets": "block", "attentions": "attn"}.get(parts[3], f"{side}sample")
        head = [parts[0], side, index, kind] + ([parts[4]] if kind in ("block", "attn") else [])
        parts = head + parts[5:]
    elif parts[1] == "mid_block":
        parts = [parts[0], "mid", "attn_1" if parts[2] == "attentions" else f"block_{int(parts[3]) + 1}", *parts[4:]]
    name = ".".join(parts).replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    if ".attn" in name:
        for ours, theirs in attention.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def old_diffusers_name(name):
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


@pytest.mark.parametrize("spelling", ["old_diffusers", "original"])
@pytest.mark.parametrize("variant", ["five_levels_attention", "flux2"])
def test_other_spellings_load_the_same_weights(spelling, variant, tmp_path):
    model = build(variant)
    model.save_pretrained(tmp_path)
    expected = autoencoders.load(tmp_path).params
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {}
    for name, tensor in safetensors.torch.load_file(file).items():
        if spelling == "old_diffusers":
            name = old_diffusers_name(name)
        elif not name.startswith("bn."):
            is_matrix = tensor.ndim == 2
            tensor = tensor[..., None, None] if is_matrix else tensor
            name = flux_original_name(name, len(model.config.block_out_channels))
        tensors[name] = tensor.contiguous()
    changed = set(tensors) - set(model.state_dict())
    assert len(changed) >= 8
    safetensors.torch.save_file(tensors, file)
    jax.tree.map(np.testing.assert_array_equal, autoencoders.load(tmp_path).params, expected)


def parameter_count(config):
    module = nnx.eval_shape(lambda: autoencoders.AutoencoderKL(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize(
    ("name", "count", "channels"),
    [
        ("sd1", 83_653_863, 16),
        ("sd3", 83_819_683, 64),
        ("flux1", 83_819_683, 64),
        ("flux2", 84_046_115, 128),
        ("kl_f16", 69_610_963, 16),
    ],
)
def test_full_sizes(name, count, channels):
    config = getattr(AutoencoderKLConfig, name)()
    assert parameter_count(config) == count
    assert (config.downsample, config.latent_channels) == (16, channels)
    module = nnx.eval_shape(lambda: autoencoders.AutoencoderKL(config, rngs=nnx.Rngs(0)))
    latents = nnx.eval_shape(lambda m: m.encode(jnp.zeros((2, 256, 384, 3))), module)
    assert latents.shape == (2, 16, 24, channels)
    assert nnx.eval_shape(lambda m: m.decode(jnp.zeros(latents.shape)), module).shape == (2, 256, 384, 3)


def test_named_sizes_survive_config_json():
    for name in ("sd1", "sd3", "flux1", "flux2", "kl_f16", "demo"):
        config = getattr(AutoencoderKLConfig, name)()
        assert AutoencoderKLConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config
    unpacked = dataclasses.replace(AutoencoderKLConfig.sd1(), pack=1)
    assert AutoencoderKLConfig.from_diffusers(unpacked.to_diffusers()) == unpacked


def test_packing_is_configurable_and_ordered_like_pixel_unshuffle(tmp_path):
    z = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    ours = pack_cells(jnp.asarray(z.permute(0, 2, 3, 1).numpy()), 2)
    np.testing.assert_array_equal(ours, torch.nn.functional.pixel_unshuffle(z, 2).permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(unpack_cells(ours, 2), z.permute(0, 2, 3, 1).numpy())
    build("packed_sd").save_pretrained(tmp_path)
    plain = autoencoders.load(tmp_path, pack=1)
    assert (plain.downsample, plain.latent_channels) == (8, 4)
    plain.save(tmp_path / "again")
    assert autoencoders.load(tmp_path / "again").downsample == 8


TINY = AutoencoderKLConfig(z_channels=3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2)


@functools.cache
def tiny():
    return Autoencoder.create(TINY, seed=1)


def test_bfloat16_and_mesh(tmp_path):
    tiny().save(tmp_path)
    exact = autoencoders.load(tmp_path)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    half = autoencoders.load(tmp_path, dtype="bfloat16", mesh=mesh)
    leaf = jax.tree.leaves(half.params)[0]
    assert leaf.dtype == jnp.bfloat16 and leaf.sharding.is_fully_replicated
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
    module = autoencoder.module()
    keys = jax.random.split(jax.random.key(0), 400)
    samples = jax.vmap(lambda key: module.encode(images, key))(keys)
    moments = module.encode_moments(images)
    np.testing.assert_allclose(samples.mean(0), latents, atol=0.4)
    np.testing.assert_allclose(samples.std(0), jnp.exp(0.5 * moments.logvar), rtol=0.25)


def test_attention_over_many_cells_equals_all_pairs(monkeypatch):
    config = dataclasses.replace(TINY, block_out_channels=(8,), down_block_types=(), up_block_types=())
    module = autoencoders.AutoencoderKL(config, rngs=nnx.Rngs(0))
    images = jax.random.uniform(jax.random.key(0), (2, 5, 7, 3))
    whole = module.encode(images)
    monkeypatch.setattr(kl, "_MAX_SCORES", 2 * 5 * 7 * 7)  # two rows at a time; five rows leave a remainder
    np.testing.assert_allclose(module.encode(images), whole, atol=1e-5)


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
        z = autoencoder.module().encode_moments(jnp.asarray(batches[0])).mean
        np.testing.assert_allclose(autoencoder.module().denormalise(autoencoder.encode(batches[0])), z, atol=1e-5)
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
    expected = metrics["l1"] + metrics["l2"] + 0.5 * metrics["gradient"] + 1e-4 * metrics["kl"]
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
    with pytest.raises(ValueError, match=r"(?s)config.json the one .* got .* the config expects"):
        autoencoders.load(folder)
    edit_config(folder, _class_name="AutoencoderDC")
    with pytest.raises(
        ValueError, match=r"'AutoencoderDC', .* Supported _class_name values: AutoencoderKL, AutoencoderKLFlux2"
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
    assert parameter_count(config) <= 900_000
    assert (config.downsample, config.latent_channels) == (16, 32)
