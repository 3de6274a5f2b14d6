"""AutoencoderKL and AutoencoderKLFlux2 against diffusers: random tiny models share weights through diffusers folders."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from autoencoders_support import assert_close, cosine, nhwc, random_images, randomised

from unifusion_jax import autoencoders
from unifusion_jax.autoencoders.latents import pack_cells, unpack_cells

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
ATTENTION_DOWN, ATTENTION_UP = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"


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


def assert_same_maps(ours, model, pack):
    cells = {1: 4, 2: 3}[pack]
    images = random_images(cells * ours.downsample, (cells + 1) * ours.downsample)
    with torch.no_grad():
        latents = reference_encode(model, images, pack)
        decoded = reference_decode(model, latents, pack)
    assert_close(ours.encode(nhwc(images)), latents)
    assert_close(ours.decode(nhwc(latents)), decoded)
    return images, latents, decoded


def build(variant):
    torch.manual_seed(0)
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
    images, latents, decoded = assert_same_maps(ours, model, pack)
    if variant in ("packed_shift", "flux2"):
        half = autoencoders.load(tmp_path / "theirs", dtype="bfloat16")
        assert cosine(half.encode(nhwc(images)), latents) > 0.999
        assert cosine(half.decode(nhwc(latents)), decoded) > 0.999

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


def test_other_files_load_the_same_weights(tmp_path):
    model = build("packed_shift")
    model.save_pretrained(tmp_path / "whole")
    expected = autoencoders.load(tmp_path / "whole").params
    model.save_pretrained(tmp_path / "pipeline" / "vae", max_shard_size="20KB")
    assert len(list((tmp_path / "pipeline" / "vae").glob("*-of-*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, autoencoders.load(tmp_path / "pipeline").params, expected)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half", variant="bf16")
    half = autoencoders.load(tmp_path / "half")
    jax.tree.map(lambda got, whole: np.testing.assert_allclose(got, whole, rtol=2**-8), half.params, expected)
    assert half.dtype == jnp.float32


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
