"""What folders of Qwen2.5-VL hold: names of tensors, chat template, image settings.

The table of names is in transformers' current spelling; the published one is mapped onto it.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unifusion_jax.encoders.families import decoder_rules
from unifusion_jax.encoders.folder import read_image_settings, read_tokenizer
from unifusion_jax.encoders.internvl_weights import third
from unifusion_jax.encoders.native import CLIP_MEAN, CLIP_STD, NativeConfig
from unifusion_jax.encoders.processor import Processor
from unifusion_jax.encoders.qwen_vl import QwenVLConfig
from unifusion_jax.encoders.templates import CHATML
from unifusion_jax.weights import CONV3D, IDENTITY, LINEAR, Rule

TEMPLATE = dataclasses.replace(
    CHATML,
    system_default="You are a helpful assistant.",
    image="<|vision_start|>{}<|vision_end|>",
    image_token="<|image_pad|>",
)

_TOWER = "model.visual."
_LAYER = _TOWER + "blocks.{layer}"
_BLOCK = "vision.layers.blocks"


def _tower_rules() -> list[Rule]:
    rules = [
        Rule(_TOWER + "patch_embed.proj.weight", "vision.patch", CONV3D),
        Rule(_TOWER + "merger.ln_q.weight", "vision.norm.scale"),
        Rule(f"{_LAYER}.norm1.weight", f"{_BLOCK}.attention_norm.scale"),
        Rule(f"{_LAYER}.norm2.weight", f"{_BLOCK}.mlp_norm.scale"),
    ]
    for index, name in enumerate("qkv"):
        rules.append(Rule(f"{_LAYER}.attn.qkv.weight", f"{_BLOCK}.{name}.kernel", third(index, LINEAR)))
        rules.append(Rule(f"{_LAYER}.attn.qkv.bias", f"{_BLOCK}.{name}.bias", third(index, IDENTITY)))
    maps = [(f"{_LAYER}.attn.proj", f"{_BLOCK}.o")]
    maps += [(f"{_LAYER}.mlp.{name}_proj", f"{_BLOCK}.{name}") for name in ("gate", "up", "down")]
    maps += [(_TOWER + "merger.mlp.0", "vision.up"), (_TOWER + "merger.mlp.2", "vision.down")]
    for theirs, ours in maps:
        rules.append(Rule(f"{theirs}.weight", f"{ours}.kernel", LINEAR))
        rules.append(Rule(f"{theirs}.bias", f"{ours}.bias"))
    return rules


RULES = (*_tower_rules(), *decoder_rules("model.language_model.", "lm_head.weight"))

_PUBLISHED_TEXT = re.compile(r"model\.((?:embed_tokens|layers|norm)\..+)")


def canonical_name(name: str) -> str | None:
    """Maps either spelling of a tensor's name to the table's; None for tensors that take no part."""
    if name.endswith("rotary_emb.inv_freq") or name.endswith("rotary_pos_emb.inv_freq"):
        return None
    if name.startswith("visual."):
        return "model." + name
    found = _PUBLISHED_TEXT.fullmatch(name)
    return f"model.language_model.{found[1]}" if found else name


def read_processor(folder: Path, raw: Mapping[str, Any], config: QwenVLConfig) -> Processor:
    """Reads tokenizer and image settings; areas are spelled as pixel counts or, in newer files, as the edges of "size"."""
    settings, defaults = read_image_settings(folder), NativeConfig()
    size = settings.get("size") or {}
    vision = config.vision
    tiling = NativeConfig(
        tile_px=vision.tile_px,
        window_tiles=vision.window_tiles,
        min_area_px=settings.get("min_pixels", size.get("shortest_edge", defaults.min_area_px)),
        max_area_px=settings.get("max_pixels", size.get("longest_edge", defaults.max_area_px)),
        mean=tuple(settings.get("image_mean", CLIP_MEAN)),
        std=tuple(settings.get("image_std", CLIP_STD)),
    )
    return Processor(
        read_tokenizer(folder),
        tiling=tiling,
        tokens_per_tile=config.tokens_per_tile,
        max_positions=config.max_positions,
        system=TEMPLATE.system_default,
        template=TEMPLATE,
    )
