"""Tiny Qwen2.5-VL, Gemma 3 and T5 models of transformers with random weights, their folders and tokenizers."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from encoders_support import TEXTS, photo, train_tokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from unifusion_jax.encoders import EncoderBatch, Prompt

VOCAB = 420
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
GEMMA_TOKENS = {
    "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
    "turn_start": "<start_of_turn>", "turn_end": "<end_of_turn>",
}  # fmt: skip

# Rows of unequal length: words only, one picture, several with a system message.
PROMPTS = [
    Prompt("a red square"),
    Prompt("make the ring yellow", [photo(1, 90, 40)], target="the picture shows a yellow ring"),
    Prompt(
        "put the first left of the second",
        [photo(2, 50, 60), photo(3, 31, 33), photo(4, 20, 90)],
        target="",
        system="short",
    ),
]


def randomise(model: torch.nn.Module, *, unit_gains: bool = True, large_embeddings: bool = False) -> Any:
    """Makes every parameter random, biases and norms too; each a bfloat16 number, as in published files.

    Norms multiply by 1 + weight where `unit_gains` is False. With small embeddings rounding is amplified as in no trained
    model; with large ones a model with tied embeddings repeats itself.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = any(part in name for part in ("norm", "ln_q")) and name.endswith("weight")
            offset = 1.0 if unit_gains or "vision_tower" in name else 0.0
            width = 1 if large_embeddings and "embed_tokens" in name else max(parameter.shape[-1], 9)
            parameter.copy_((offset + 0.2 * noise if is_gain else noise / width**0.5).bfloat16())
    for part in model.modules():
        if hasattr(part, "config"):
            part.config.tie_last_hidden_states = False  # the last state is compared before its norm
    return model.eval()


@functools.cache
def qwen_tokenizer() -> Any:
    base = train_tokenizer(TEXTS * 3, 400)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer, pad_token=base.pad_token, eos_token="<|im_end|>"
    )
    made.add_special_tokens({"additional_special_tokens": list(QWEN_TOKENS)})
    return made


@functools.cache
def gemma_tokenizer() -> Any:
    base = train_tokenizer(TEXTS * 3, 400)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer, pad_token=base.pad_token, bos_token="<bos>", eos_token="<eos>",
        extra_special_tokens=dict(GEMMA_TOKENS),
    )  # fmt: skip
    made.chat_template = GEMMA_JINJA
    return made


# Gemma 3's own, shortened to what it does with one system and one user turn.
GEMMA_JINJA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
{%- set first = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
{{ '<start_of_turn>' + message['role'] + '\n' + (first if loop.first else '') }}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
{%- endfor -%}
{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

QWEN_VARIANTS = {
    "wide": (
        {"depth": 4, "hidden_size": 48, "num_heads": 3, "intermediate_size": 30, "window_size": 24,
         "fullatt_block_indexes": [1, 3], "out_hidden_size": 40},
        {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 5},
        [1, 1, 2], False,
    ),
    "tied": (
        {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 44, "window_size": 16,
         "fullatt_block_indexes": [0], "out_hidden_size": 36},
        {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 4},
        [1, 0, 2], True,
    ),
}  # fmt: skip
QWEN_PIXELS = {"min_pixels": 6 * 64, "max_pixels": 30 * 64}


@functools.cache
def qwen_reference(variant: str) -> transformers.Qwen2_5_VLForConditionalGeneration:
    vision, text, section, tied = QWEN_VARIANTS[variant]
    ids = qwen_tokenizer().get_vocab()
    config = transformers.Qwen2_5_VLConfig(
        vision_config={"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
        text_config={
            "vocab_size": VOCAB, "intermediate_size": 52, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": section},
            "bos_token_id": 0, "eos_token_id": ids["<|im_end|>"], **text,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return randomise(transformers.Qwen2_5_VLForConditionalGeneration(config))


def write_qwen(folder: Path, variant: str, layout: str = "saved") -> Path:
    """Writes a model as transformers saves it, under its current names, or with the published flat config."""
    model = qwen_reference(variant)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if layout == "current":
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    elif layout == "flat":
        raw = json.loads((folder / "config.json").read_text())
        text = raw.pop("text_config")
        rope = text.pop("rope_parameters")
        text |= {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        }
        (folder / "config.json").write_text(json.dumps(text | raw))
    qwen_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_PIXELS))
    return folder


def qwen_inputs(batch: EncoderBatch, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """What transformers is given for a batch; the pixels are those of its own processor."""
    processor = Qwen2VLImageProcessorPil(patch_size=4, **QWEN_PIXELS)
    inputs = {
        "input_ids": torch.tensor(batch.token_ids).long(),
        "attention_mask": torch.tensor(batch.mask).long(),
        "mm_token_type_ids": torch.tensor(batch.is_image).int(),
    }
    images = [image for prompt in prompts for image in prompt.images]
    if images:
        out = processor(images, return_tensors="np")
        inputs["pixel_values"] = torch.tensor(out["pixel_values"])
        inputs["image_grid_thw"] = torch.tensor(out["image_grid_thw"])
    return inputs


GEMMA_VARIANTS = {
    "small images": (  # 4 tokens an image, fewer than the window
        {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 30},
        {"hidden_size": 28, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "num_hidden_layers": 7,
         "query_pre_attn_scalar": 7, "sliding_window": 6},
        4,
    ),
    "large images": (  # 16 tokens an image, more than the window
        {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 44},
        {"hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 4,
         "query_pre_attn_scalar": 30, "sliding_window": 5,
         "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
        16,
    ),
}  # fmt: skip


@functools.cache
def gemma_reference(variant: str, large_embeddings: bool = False) -> transformers.Gemma3ForConditionalGeneration:
    vision, text, tokens = GEMMA_VARIANTS[variant]
    ids = gemma_tokenizer().get_vocab()
    config = transformers.Gemma3Config(
        vision_config={"image_size": 32, "patch_size": 4, "vision_use_head": False, **vision},
        text_config={
            "vocab_size": VOCAB, "intermediate_size": 44, "max_position_embeddings": 512,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
            "bos_token_id": ids["<bos>"], "eos_token_id": ids["<eos>"], "pad_token_id": 0, **text,
        },
        mm_tokens_per_image=tokens, image_token_index=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"], eoi_token_index=ids["<end_of_image>"],
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.Gemma3ForConditionalGeneration(config)
    return randomise(model, unit_gains=False, large_embeddings=large_embeddings)


def gemma_settings(*, crops: bool) -> dict[str, Any]:
    return {
        "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "do_pan_and_scan": crops or None, "pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }  # fmt: skip


def write_gemma(
    folder: Path, variant: str, layout: str = "saved", *, crops: bool = False, large_embeddings: bool = False
) -> Path:
    """Writes a model as transformers saves it, under its current names, or under those of the published files."""
    model = gemma_reference(variant, large_embeddings)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tensors = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    if layout == "published":
        tensors = {_published_gemma(name): value for name, value in tensors.items()}
    if layout == "middle":
        spelled = ("model.vision_tower.", "model.vision_tower.vision_model.")
        tensors = {name.replace(*spelled): value for name, value in tensors.items()}
    if layout != "saved":
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    gemma_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(gemma_settings(crops=crops)))
    return folder


def _published_gemma(name: str) -> str:
    name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
    return name.replace("language_model.", "language_model.model.")


def gemma_processor(variant: str) -> Any:
    images = Gemma3ImageProcessorPil(**gemma_settings(crops=False))
    return transformers.Gemma3Processor(
        images, gemma_tokenizer(), chat_template=GEMMA_JINJA, image_seq_length=GEMMA_VARIANTS[variant][2]
    )


def gemma_inputs(batch: EncoderBatch, tokens_per_tile: int) -> dict[str, torch.Tensor]:
    inputs = {
        "input_ids": torch.tensor(batch.token_ids).long(),
        "attention_mask": torch.tensor(batch.mask).long(),
        "position_ids": torch.tensor(np.maximum(batch.mask.cumsum(axis=1) - 1, 0)),
        "token_type_ids": torch.tensor(batch.is_image).long(),
    }
    if batch.pixels is not None:
        counts = batch.is_image.sum(axis=1) // tokens_per_tile
        tiles = np.concatenate([row[:count] for row, count in zip(batch.pixels, counts, strict=True)])
        inputs["pixel_values"] = torch.tensor(tiles).permute(0, 3, 1, 2)
    return inputs


@functools.cache
def t5_tokenizer() -> Any:
    learner = tokenizers.Tokenizer(tokenizers.models.Unigram())
    learner.normalizer = tokenizers.normalizers.NFKC()
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=180, special_tokens=special, unk_token="<unk>")
    learner.train_from_iterator(TEXTS * 3, trainer)
    vocab = json.loads(learner.to_str())["model"]["vocab"]
    return transformers.T5Tokenizer(vocab=[tuple(entry) for entry in vocab], extra_ids=10)


T5_VARIANTS = {
    "wide": {"d_model": 48, "d_kv": 20, "d_ff": 90, "num_layers": 4, "num_heads": 3},
    "few buckets": {
        "d_model": 30, "d_kv": 6, "d_ff": 44, "num_layers": 3, "num_heads": 5, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20, "feed_forward_proj": "gated-silu",
    },
}  # fmt: skip


@functools.cache
def t5_reference(variant: str) -> transformers.T5ForConditionalGeneration:
    settings = {"feed_forward_proj": "gated-gelu", "vocab_size": 200, **T5_VARIANTS[variant]}
    config = transformers.T5Config(
        num_decoder_layers=1, decoder_start_token_id=0, tie_word_embeddings=False, **settings
    )
    config._attn_implementation = "eager"
    model = randomise(transformers.T5ForConditionalGeneration(config))
    with torch.no_grad():
        for block in model.encoder.block:  # products are not scaled: T5's queries are that much smaller
            block.layer[0].SelfAttention.q.weight *= config.d_kv**-0.5
    return model


def write_t5(folder: Path, variant: str, layout: str = "whole") -> Path:
    """Writes the whole model, or the encoder alone."""
    model = t5_reference(variant)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "whole":
        model.save_pretrained(folder)
    else:
        encoder = transformers.T5EncoderModel(model.config)
        encoder.load_state_dict(model.state_dict(), strict=False)
        encoder.save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)
    return folder


def hidden_states(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray | None]:
    """Runs transformers; returns its states [B, S, layers + 1, H], none normed, and its logits, if it has any."""
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    logits = getattr(out, "logits", None)
    return torch.stack(out.hidden_states, dim=2).numpy(), None if logits is None else logits.numpy()
