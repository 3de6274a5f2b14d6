"""The other classes of autoencoders against diffusers, and every class at its published sizes."""

import dataclasses
import json
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from autoencoders_support import assert_close, cosine, nhwc, random_images, randomised
from flax import nnx, traverse_util

from unifusion_jax import autoencoders
from unifusion_jax.autoencoders import AutoencoderKLConfig, AutoencoderKLWanConfig, AutoencoderTinyConfig, families
from unifusion_jax.autoencoders.wan import patchify, unpatchify
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.tasks.autoencoder import AutoencoderTask

STATISTICS = {"latents_mean": [0.5, -0.25, 0.0, 1.0], "latents_std": [0.5, 2.0, 1.0, 3.0]}
SMALL = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
RESIDUAL = SMALL | {"is_residual": True, "decoder_base_dim": 12, "in_channels": 12, "out_channels": 12, "patch_size": 2}
FIVE = {"dim_mult": [1, 2, 2, 4, 4], "temperal_downsample": [False, True, True, True]}

WAN_VARIANTS = {
    "wan21": ("Wan", SMALL),
    "wan21_packed": ("Wan", SMALL | {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}),
    "wan21_deep": ("Wan", SMALL | {"num_res_blocks": 2, "decoder_base_dim": 4}),
    "wan22": ("Wan", RESIDUAL),
    "wan22_deep": (
        "Wan",
        RESIDUAL | {"num_res_blocks": 2, "temperal_downsample": [True, False], "dim_mult": [2, 1, 1]},
    ),
    "qwen_image": ("QwenImage", SMALL),
    "qwen_image_deep": ("QwenImage", SMALL | {"dim_mult": [2, 1, 3], "num_res_blocks": 2}),
    "qwen_image21": ("QwenImage21", SMALL | FIVE | {"base_dim": 4, "decoder_base_dim": 6}),
    "qwen_image21_plain": ("QwenImage21", SMALL | {"is_residual": False, "decoder_base_dim": None}),
}
TINY_VARIANTS = {
    "taesd": {"num_encoder_blocks": (1, 2, 1, 1), "num_decoder_blocks": (2, 1, 1, 1)},
    "unpacked": {
        "num_encoder_blocks": (0, 1, 2),
        "num_decoder_blocks": (1, 0, 1),
        "latent_channels": 16,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    },
    "mish": {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "act_fn": "mish"},
}
DOWNSAMPLE = {"mish": 2} | dict.fromkeys(["wan21_packed", "wan22", "wan22_deep", "qwen_image21", "taesd"], 16)


def build(variant):
    torch.manual_seed(0)
    if variant in WAN_VARIANTS:
        name, options = WAN_VARIANTS[variant]
        return randomised(getattr(diffusers, f"AutoencoderKL{name}")(**options, **STATISTICS))
    options = TINY_VARIANTS[variant]
    stages = len(options["num_encoder_blocks"])
    widths = {"encoder_block_out_channels": (16,) * stages, "decoder_block_out_channels": (12,) * stages}
    return randomised(diffusers.AutoencoderTiny(**options, **widths))


def reference_maps(model, images, pack):
    """One frame through the video model: normalised packed latents, and the picture they decode to."""
    if isinstance(model, diffusers.AutoencoderTiny):
        scale, shift = model.config.scaling_factor, model.config.shift_factor
        z = model.encode(images).latents
        return torch.nn.functional.pixel_unshuffle((z - shift) * scale, pack), model.decode(z).sample
    if isinstance(model, diffusers.AutoencoderKLQwenImage21):
        images = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    z = model.encode(images[:, :, None]).latent_dist.mode()
    mean, std = (torch.tensor(model.config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
    decoded = model.decode(z).sample[:, :3, 0]
    return torch.nn.functional.pixel_unshuffle((z[:, :, 0] - mean) / std, pack), decoded


def assert_same_maps(ours, model):
    images = random_images(3 * ours.downsample, 4 * ours.downsample)
    with torch.no_grad():
        latents, decoded = reference_maps(model, images, ours.config.pack)
    assert (decoded.abs() == 1).float().mean() < 0.5  # else the clipping would hide differences
    assert_close(ours.encode(nhwc(images)), latents)
    assert_close(ours.decode(nhwc(latents)), decoded)
    return images, latents, decoded


def settings(model):
    """The content of config.json but for diffusers' notes to itself, and the factors that its tiling alone reads."""
    skipped = ("_", "scale_factor_")
    return json.loads(json.dumps({key: value for key, value in model.config.items() if not key.startswith(skipped)}))


@pytest.mark.parametrize("variant", ["wan21", "wan22", "qwen_image21", "taesd"])
def test_bfloat16(variant, tmp_path):
    model = build(variant)
    model.save_pretrained(tmp_path)
    half = autoencoders.load(tmp_path, dtype="bfloat16")
    images = random_images(3 * half.downsample, 4 * half.downsample)
    with torch.no_grad():
        latents, decoded = reference_maps(model, images, half.config.pack)
    assert cosine(half.encode(nhwc(images)), latents) > 0.999
    assert cosine(half.decode(nhwc(latents)), decoded) > 0.999


@pytest.mark.filterwarnings("ignore:.*serves still images only")
@pytest.mark.parametrize("variant", [*WAN_VARIANTS, *TINY_VARIANTS])
def test_equals_diffusers(variant, tmp_path):
    model = build(variant)
    model.save_pretrained(tmp_path / "theirs")
    ours = autoencoders.load(tmp_path / "theirs")
    assert ours.downsample == DOWNSAMPLE.get(variant, 4)
    images, latents, decoded = assert_same_maps(ours, model)
    ours.save(tmp_path / "ours")
    back, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert settings(back) == settings(model)
    with torch.no_grad():
        again = reference_maps(back.eval(), images, ours.config.pack)
    for got, before in zip(again, (latents, decoded), strict=True):
        assert torch.equal(got, before)
    reloaded = autoencoders.load(tmp_path / "ours")
    assert reloaded.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, reloaded.params, ours.params)


def test_saving_a_video_autoencoder_warns(tmp_path):
    build("wan21").save_pretrained(tmp_path)
    ours = autoencoders.load(tmp_path)
    with pytest.warns(UserWarning, match="serves still images only: the parts of AutoencoderKLWan that act over time"):
        ours.save(tmp_path / "again")


def test_patches_are_ordered_by_column_first():
    images = jnp.arange(24.0).reshape(1, 2, 4, 3)
    patches = patchify(images, 2)
    assert patches.shape == (1, 1, 2, 12)
    # red of the first patch: top left, bottom left, top right, bottom right
    np.testing.assert_array_equal(patches[0, 0, 0, :4], images[0, [0, 1, 0, 1], [0, 0, 1, 1], 0])
    np.testing.assert_array_equal(unpatchify(patches, 2), images)


FULL_SIZES = [
    (AutoencoderKLConfig.sd1(), 83_653_863, 16),
    (AutoencoderKLConfig.sd3(), 83_819_683, 64),
    (AutoencoderKLConfig.flux1(), 83_819_683, 64),
    (AutoencoderKLConfig.flux2(), 84_046_115, 128),
    (AutoencoderKLConfig.kl_f16(), 69_610_963, 16),
    (AutoencoderKLConfig.kl_f16(32), 69_836_067, 32),
    (AutoencoderKLWanConfig.wan21(), 126_892_531, 64),
    (AutoencoderKLWanConfig.qwen_image(), 126_892_531, 64),
    (AutoencoderKLWanConfig.wan22(), 704_688_668, 48),
    (AutoencoderKLWanConfig.qwen_image21(), 337_740_404, 64),
    (AutoencoderTinyConfig.taesd(), 2_445_063, 16),
    (AutoencoderTinyConfig.taesd(16), 2_458_899, 64),
]
FULL_NAMES = "sd1 sd3 flux1 flux2 kl_f16 va_vae wan21 qwen_image wan22 qwen_image21 taesd taef1".split()


@pytest.mark.parametrize(("config", "count", "channels"), FULL_SIZES, ids=FULL_NAMES)
def test_full_sizes(config, count, channels):
    """Names and shapes of the files that we would write are diffusers', and the number of weights is the published one."""
    values = json.loads(json.dumps(config.to_diffusers()))
    with torch.device("meta"):
        reference = getattr(diffusers, values["_class_name"]).from_config(values)
    family = families.family_of(config)
    module = nnx.eval_shape(lambda: family.module(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(module))
    flat = traverse_util.flatten_dict(params, sep=".")
    shapes = {
        rule.source: jax.eval_shape(rule.transform.inverse, flat[rule.target]).shape for rule in family.rules(params)
    }
    shapes |= {name: shape for name, (shape, _) in family.stored(list(shapes)).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("bn.")) == count

    assert (config.downsample, config.latent_channels) == (16, channels)
    latents = nnx.eval_shape(lambda m: m.encode(jnp.zeros((2, 256, 384, 3))), module)
    assert latents.shape == (2, 16, 24, channels)
    assert nnx.eval_shape(lambda m: m.decode(jnp.zeros(latents.shape)), module).shape == (2, 256, 384, 3)


@pytest.mark.parametrize(
    "config", [*(row[0] for row in FULL_SIZES), AutoencoderKLConfig.demo()], ids=[*FULL_NAMES, "demo"]
)
def test_named_sizes_survive_config_json(config):
    for config_ in (config, dataclasses.replace(config, pack=1)):
        assert families.config_of(json.loads(json.dumps(config_.to_diffusers()))) == config_


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "AutoencoderKLWan", "dim_mult": []}, r"at least one level.* got dim_mult=\(\)"),
        ({"_class_name": "AutoencoderKLWan", "temperal_downsample": [True]}, r"must have 3 entries.* got \(True,\)"),
        ({"_class_name": "AutoencoderKLWan", "in_channels": 5}, r"both be 3 \(RGB\) or 4 \(RGBA\) .* got 5 and 3"),
        ({"_class_name": "AutoencoderKLWan", "z_dim": 8}, "need 8 entries, one per channel.* got 16 and 16"),
        (
            {"_class_name": "AutoencoderKLWan", "base_dim": 3, "dim_mult": [1, 1, 1, 1]},
            r"must be even, got \[3, 3, 3, 3\]",
        ),
        (
            {"_class_name": "AutoencoderKLWan", "is_residual": True, "dim_mult": [1, 3, 4, 4]},
            "cannot average 768 channels to 288",
        ),
        ({"_class_name": "AutoencoderKLWan", "attn_scales": [0.5]}, r"attn_scales must be empty.* got \[0.5\]"),
        ({"_class_name": "AutoencoderKLQwenImage", "is_residual": True}, "has neither is_residual"),
        ({"_class_name": "AutoencoderTiny", "act_fn": "tanh"}, r"one of \['mish', 'relu', .* got 'tanh'"),
        ({"_class_name": "AutoencoderTiny", "upsample_fn": "bilinear"}, "must be 'nearest', .* got 'bilinear'"),
        ({"_class_name": "AutoencoderTiny", "scaling_factor": 0.0}, "must be positive, got 0.0"),
        ({"_class_name": "AutoencoderTiny", "encoder_block_out_channels": [8, 8]}, "each of the 4 stages .* got"),
        (
            {"_class_name": "AutoencoderTiny", "decoder_block_out_channels": [8, 8, 8, 4]},
            "one width, the same for each",
        ),
        (
            {"_class_name": "AutoencoderTiny", "num_encoder_blocks": [1], "encoder_block_out_channels": [8]},
            "same number of stages, got 1 and 4",
        ),
    ],
)
def test_bad_configs(values, message):
    with pytest.raises(ValueError, match=message):
        families.config_of(values)


def test_tiny_has_no_statistics_of_its_own(tmp_path):
    build("mish").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="distilled from; measure that one"):
        autoencoders.load(tmp_path).with_latent_statistics([np.zeros((1, 8, 8, 3), np.float32)])


def test_training_goes_on_from_an_autoencoder_kl_only(tmp_path):
    build("mish").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no AutoencoderKL.*configuration is AutoencoderTinyConfig"):
        AutoencoderTask(TrainConfig(task="autoencoder", init_from=str(tmp_path)), make_mesh(MeshConfig()))


def test_statistics_of_wan_are_measured(tmp_path):
    build("wan22").save_pretrained(tmp_path)
    images = nhwc(random_images(64, 64))
    measured = autoencoders.load(tmp_path, pack=1).with_latent_statistics([images])
    latents = np.asarray(measured.encode(images)).reshape(-1, 4)
    np.testing.assert_allclose(latents.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(latents.std(0), 1.0, atol=1e-4)


def test_weights_that_disagree_with_the_config(tmp_path):
    build("wan22").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"decoder_base_dim": 16}))
    with pytest.raises(
        ValueError, match=r"decoder\.conv_in\.kernel: got \(3, 3, 4, 24\), the config expects \(3, 3, 4, 32\)"
    ):
        autoencoders.load(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_text(json.dumps(values))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        autoencoders.load(tmp_path)
