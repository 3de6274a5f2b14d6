"""Tiny InternVL models of transformers with random weights, their folders, and prompts for them."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import safetensors.torch
import torch
import transformers

from unifusion_jax.encoders import EncoderBatch, LayerStates, train_tokenizer

TEXTS = [
    "a red square left of a small blue circle on a white background",
    "the picture shows two green triangles, one above the other; make the ring yellow",
    "Übergröße ça va 日本語 naïve 12345 don't",
    "system user assistant Image-1: Image-2:",
]
VOCAB = 400


@functools.cache
def tokenizer():
    return train_tokenizer(TEXTS * 3, VOCAB)


def photo(seed: int, width_px: int, height_px: int) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width_px, height_px), PIL.Image.Resampling.BICUBIC)


# name -> (vision settings, text settings, tied). Head counts, widths and depths are chosen so that no two sizes agree.
VARIANTS = {
    "grouped": (
        {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 40},
        {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "num_hidden_layers": 5},
        False,
    ),
    "tied": (
        {
            "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 24,
            "attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm",
        },
        {"hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1, "num_hidden_layers": 4},
        True,
    ),
}  # fmt: skip
# Other language models behind the same tower: InternLM2 computes what Llama does (InternVL 2.5), Qwen3 (InternVL 3.5).
OTHER_LANGUAGE_MODELS = {
    "llama": (
        VARIANTS["grouped"][0],
        {
            "model_type": "llama", "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2,
            "num_hidden_layers": 4, "vocab_size": 420,
        },
        False,
    ),
    "qwen3": (
        VARIANTS["tied"][0],
        {
            "model_type": "qwen3", "hidden_size": 28, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": 10, "num_hidden_layers": 4,
        },
        False,
    ),
}  # fmt: skip


@functools.cache
def reference(variant: str) -> transformers.InternVLForConditionalGeneration:
    """A float32 model, every parameter random, biases and norms too; each a bfloat16 number, as in published files."""
    vision, text, tied = (VARIANTS | OTHER_LANGUAGE_MODELS)[variant]
    ids = tokenizer().get_vocab()
    config = transformers.InternVLConfig(
        vision_config={"image_size": [32, 32], "patch_size": [8, 8], "attention_bias": True, **vision},
        text_config={
            "model_type": "qwen2", "vocab_size": VOCAB, "intermediate_size": 52, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "tie_word_embeddings": tied,
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"], **text,
        },
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.InternVLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(len(variant))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = ("norm" in name and name.endswith("weight")) or "lambda" in name
            value = 1 + 0.2 * noise if is_gain else noise / max(parameter.shape[-1], 9) ** 0.5
            parameter.copy_(value.bfloat16())
    return model


def write_processor(folder: Path) -> None:
    tokenizer().save_pretrained(folder)
    image = {
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "max_patches": 12,
        "min_patches": 1,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image))


def original_tensors(model: transformers.InternVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of the original layout, q, k and v of the vision tower fused."""
    tensors = {}
    state = model.state_dict()
    tower = "model.vision_tower."
    for name, value in state.items():
        if name.startswith("model.language_model."):
            tensors[name.replace("model.language_model.", "language_model.model.")] = value
        elif name == "lm_head.weight":
            tensors["language_model.lm_head.weight"] = value
        elif name.startswith("model.multi_modal_projector."):
            numbers = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
            part, kind = name.removeprefix("model.multi_modal_projector.").split(".")
            tensors[f"mlp1.{numbers[part]}.{kind}"] = value
        elif name.startswith(tower + "embeddings"):
            short = name.removeprefix(tower + "embeddings.").replace("patch_embeddings.projection", "patch_embedding")
            short = short.replace("cls_token", "class_embedding").replace("position_embeddings", "position_embedding")
            tensors[f"vision_model.embeddings.{short}"] = value
        elif ".k_proj." not in name and ".v_proj." not in name:
            short = name.removeprefix(tower).replace("encoder.layer.", "encoder.layers.")
            for theirs, ours in (
                ("attention.projection_layer", "attn.proj"), ("attention.q_proj", "attn.qkv"), ("attention.", "attn."),
                ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("lambda_", "ls"),
            ):  # fmt: skip
                short = short.replace(theirs, ours)
            if ".q_proj." in name:
                value = torch.cat([state[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"])
            tensors[f"vision_model.{short}"] = value
    return {name: value.clone() for name, value in tensors.items()}


def original_config(model: transformers.InternVLForConditionalGeneration) -> dict:
    vision, text = model.config.vision_config, model.config.text_config
    llm = {
        key: getattr(text, key)
        for key in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "max_position_embeddings", "rms_norm_eps",
        )
    }  # fmt: skip
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 32,
        "llm_config": {
            "model_type": "qwen2", "rope_theta": 5000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "tie_word_embeddings": False, "head_dim": text.head_dim, **llm,
        },
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": None,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "vision_config": {
            "model_type": "intern_vit_6b", "image_size": 32, "patch_size": 8, "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm, "norm_type": vision.norm_type, "hidden_size": vision.hidden_size,
            "num_attention_heads": vision.num_attention_heads, "num_hidden_layers": vision.num_hidden_layers,
            "intermediate_size": vision.intermediate_size, "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": "gelu",
        },
    }  # fmt: skip


def write_reference(folder: Path, variant: str, layout: str = "saved") -> Path:
    """Writes a model's folder: as transformers saves it, under its current names, or in the original layout."""
    model = reference(variant)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "saved":
        model.save_pretrained(folder)
    elif layout == "current":
        model.config.save_pretrained(folder)
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        if VARIANTS[variant][2]:
            del tensors["lm_head.weight"]
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    else:
        (folder / "config.json").write_text(json.dumps(original_config(model)))
        safetensors.torch.save_file(original_tensors(model), folder / "model.safetensors")
    write_processor(folder)
    return folder


def reference_run(model, batch, *, positions: np.ndarray | None = None):
    """Runs transformers on an encoder batch; returns its states [B, S, layers + 1, H] (none normed) and logits."""
    options = {}
    if batch.pixels is not None:
        per_tile = 4
        tiles = [pixels[: row.sum() // per_tile] for pixels, row in zip(batch.pixels, batch.is_image, strict=True)]
        options["pixel_values"] = torch.tensor(np.concatenate(tiles)).permute(0, 3, 1, 2)
    if positions is not None:
        options["position_ids"] = torch.tensor(positions)
    for part in (model, model.model, model.model.language_model):
        part.config.tie_last_hidden_states = False
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(batch.token_ids).long(),
            attention_mask=torch.tensor(batch.mask).long(),
            output_hidden_states=True,
            **options,
        )
    return torch.stack(out.hidden_states, dim=2).numpy(), out.logits.numpy()


def relative_error(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> float:
    """Largest over layers of (largest absolute difference / rms of the layer); states [B, S, N, H]."""
    ours, theirs = np.asarray(ours)[mask], np.asarray(theirs)[mask]
    return max(
        float(np.abs(ours[:, n] - theirs[:, n]).max() / np.sqrt(np.mean(theirs[:, n] ** 2)))
        for n in range(ours.shape[1])
    )


def least_cosine(rough: Any, exact: np.ndarray, mask: np.ndarray) -> float:
    """The least cosine between two states of one token and layer; states [B, S, N, H]."""
    a, b = np.asarray(rough, np.float32)[mask], np.asarray(exact)[mask]
    return float((np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


def moved_left(batch: EncoderBatch) -> dict[str, np.ndarray]:
    """The batch's rows with their padding moved to the left."""
    shifts = batch.mask.shape[1] - batch.mask.sum(axis=1)
    names = ("token_ids", "mask", "is_image", "keep")
    rows = {name: zip(getattr(batch, name), shifts, strict=True) for name in names}
    return {name: np.stack([np.roll(row, shift) for row, shift in pairs]) for name, pairs in rows.items()}


def teacher_forced(encoder, rewrite, prompts, *, max_tiles: int | None = 4) -> LayerStates:
    """The states of the finished text by `export`: the answers' tokens appended to the prompts."""
    rows = []
    for prompt, answer in zip(prompts, rewrite.token_ids, strict=True):
        row = encoder.processor.prepare_row(dataclasses.replace(prompt, target=""), max_tiles=max_tiles)
        marks = {"is_image": False, "keep": True, "is_target": True}
        joined = {name: np.append(getattr(row, name), np.full(len(answer), value)) for name, value in marks.items()}
        ids = np.append(row.token_ids, answer).astype(np.int32)
        rows.append(dataclasses.replace(row, token_ids=ids, **joined))
    return encoder.export(encoder.processor.collate(rows))


def assert_same_states(ours, theirs) -> None:
    np.testing.assert_array_equal(ours.mask, theirs.mask)
    np.testing.assert_array_equal(ours.is_image, theirs.is_image)
    scale = np.sqrt(np.mean(np.square(theirs.states), axis=(0, 1, 3)))
    error = np.abs(np.asarray(ours.states) - np.asarray(theirs.states)).max(axis=(0, 1, 3))
    assert (error / scale).max() < 1e-4
