"""Encoder folders: tokenizer, chat template and image settings, and writing the transformers layout of InternVL."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unifusion_jax import weights
from unifusion_jax.encoders import internlm2_tokenizer, internvl_weights, templates
from unifusion_jax.encoders.internvl import InternVLConfig
from unifusion_jax.encoders.model import TextConfig
from unifusion_jax.encoders.processor import Processor
from unifusion_jax.encoders.tiling import IMAGENET_MEAN, IMAGENET_STD, TilingConfig

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# Templates of text-only models that were taught turns, and of those that were not (their tokenizers come without one).
_TEXT_TEMPLATES = {
    "gemma3_text": (templates.GEMMA3, templates.GEMMA3_BASE),
    "internlm2": (templates.INTERNLM2, templates.INTERNLM2),
    "llama": (templates.LLAMA3, templates.LLAMA3_BASE),
    "qwen2": (templates.QWEN2, templates.QWEN2),
    "qwen3": (templates.CHATML, templates.CHATML),
}


def read_tokenizer(folder: Path) -> Any:
    """Reads a folder's tokenizer; FileNotFoundError when there is none. Code that comes with a model is never run."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). Copy the model's tokenizer files "
            "there; only batches of token ids (EncoderBatch.from_tokens) run without."
        )
    if internlm2_tokenizer.describes(folder):
        return internlm2_tokenizer.read(folder)
    return AutoTokenizer.from_pretrained(folder)


def read_text_processor(folder: Path, raw: Mapping[str, Any], config: TextConfig) -> Processor:
    """Reads the processor of a text-only model."""
    tokenizer = read_tokenizer(folder)
    taught, plain = _TEXT_TEMPLATES[raw["model_type"]]
    template = taught if tokenizer.chat_template else plain
    return Processor(
        tokenizer,
        tiling=None,
        tokens_per_tile=0,
        max_positions=config.max_positions,
        system=template.system_default,
        template=template,
    )


def read_internvl_processor(folder: Path, raw: Mapping[str, Any], config: InternVLConfig) -> Processor:
    """Reads tokenizer and image settings of an InternVL folder of either layout."""
    original = raw["model_type"] == "internvl_chat"
    if original and raw.get("template", "internvl2_5") != "internvl2_5":
        raise ValueError(f"Unsupported chat template={raw['template']!r} in config.json; supported: 'internvl2_5'.")
    language_model = raw["llm_config" if original else "text_config"].get("model_type", "qwen2")
    template = templates.INTERNVL if language_model.startswith("qwen") else templates.INTERNVL_INTERNLM2
    system = raw.get("system_message")
    return Processor(
        read_tokenizer(folder),
        tiling=_original_tiling(raw, config) if original else _tiling(folder, config),
        tokens_per_tile=config.tokens_per_tile,
        max_positions=config.max_positions,
        # Published files say null and mean the template's own message.
        system=template.system_default if system is None else system,
        template=template,
    )


def _original_tiling(raw: Mapping[str, Any], config: InternVLConfig) -> TilingConfig:
    dynamic = raw.get("dynamic_image_size", True)
    return TilingConfig(
        tile_px=config.vision.image_px,
        min_tiles=raw.get("min_dynamic_patch", 1) if dynamic else 1,
        max_tiles=raw.get("max_dynamic_patch", 12) if dynamic else 1,
        thumbnail=raw.get("use_thumbnail", True),
    )


def read_image_settings(folder: Path) -> dict[str, Any]:
    """Reads preprocessor_config.json, or the image processor's part of processor_config.json (newer files).

    Settings that are null, or files that do not exist, are left out.
    """
    settings: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").exists():
        settings = weights.read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").exists():
        settings = weights.read_json(folder / "processor_config.json").get("image_processor") or {}
    return {key: value for key, value in settings.items() if value is not None}


def _tiling(folder: Path, config: InternVLConfig) -> TilingConfig:
    settings = read_image_settings(folder)
    return TilingConfig(
        tile_px=config.vision.image_px,
        min_tiles=settings.get("min_patches", 1),
        max_tiles=settings.get("max_patches", 12),
        mean=tuple(settings.get("image_mean", IMAGENET_MEAN)),
        std=tuple(settings.get("image_std", IMAGENET_STD)),
    )


def write(folder: Path, config: InternVLConfig, params: weights.Params, processor: Processor) -> None:
    """Writes a folder that `load` and transformers' InternVLForConditionalGeneration read.

    Raises ValueError for image settings that the layout has no words for.
    """
    tiling = processor.tiling
    if not isinstance(tiling, TilingConfig) or processor.template != templates.INTERNVL:
        raise ValueError("Only InternVL models with Qwen's chat tokens can be written.")
    if not tiling.thumbnail:
        raise ValueError(
            "The transformers layout always appends a thumbnail, this processor's tiling has thumbnail=False."
        )
    folder.mkdir(parents=True, exist_ok=True)
    chat, tokenizer = processor.chat, processor.tokenizer
    tensors = weights.to_tensors(params, internvl_weights.RULES)
    renamed = {internvl_weights.file_name(name): value for name, value in tensors.items()}
    weights.save(renamed, folder / "model.safetensors")
    image = _image_settings(tiling)
    end = chat.ids[templates.TURN_END]
    raw = config.to_hf(
        image_token_id=chat.ids[templates.IMAGE],
        eos_token_id=end,
        pad_token_id=processor.pad_id,
        system=processor.system,
    )
    raw["dtype"] = str(next(iter(renamed.values())).dtype)
    generation = {"eos_token_id": list(processor.stop_ids), "pad_token_id": processor.pad_id}
    template = templates.JINJA.replace("SYSTEM", "'" + processor.system.replace("\\", "\\\\").replace("'", "\\'") + "'")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(folder / "config.json", raw)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "preprocessor_config.json", image)
    _write_json(
        folder / "processor_config.json",
        {"processor_class": "InternVLProcessor", "image_seq_length": config.tokens_per_tile, "image_processor": image},
    )


def _image_settings(tiling: TilingConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(tiling.mean),
        "image_std": list(tiling.std),
        "max_patches": tiling.max_tiles,
        "min_patches": tiling.min_tiles,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": tiling.tile_px, "width": tiling.tile_px},
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
