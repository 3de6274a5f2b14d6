"""What folders of Gemma 3 with pictures hold: names of tensors, chat template, image settings.

The table of names is in transformers' current spelling; the older ones are mapped onto it.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unifusion_jax.encoders.families import decoder_rules
from unifusion_jax.encoders.folder import read_image_settings, read_tokenizer
from unifusion_jax.encoders.gemma_vision import GemmaVisionConfig
from unifusion_jax.encoders.pan_scan import PanScanConfig
from unifusion_jax.encoders.processor import Processor
from unifusion_jax.encoders.templates import GEMMA3, GEMMA3_BASE, ImageTokens, Piece, Spans, Template
from unifusion_jax.weights import CONV, LINEAR, Rule, Transform


@dataclasses.dataclass(frozen=True)
class GemmaTemplate(Template):
    """Gemma 3's template with pictures; an image with crops is introduced in words."""

    image: str = "\n\n<start_of_image>{}<end_of_image>\n\n"
    image_token: str | None = "<image_soft_token>"

    def image_pieces(self, images: Sequence[Spans]) -> Iterator[Piece]:
        """Yields all images, each with its crops."""
        before, _, after = self.image.partition("{}")
        for spans in images:
            for number, count in enumerate(spans):
                yield self._introduction(number, len(spans))
                yield before
                yield ImageTokens(count)
                yield after

    def _introduction(self, number: int, count: int) -> str:
        if number == 0:
            return "Here is the original image " if count > 1 else ""
        return " and here are some crops to help you see better " if number == 1 else " "


def _with_pictures(text: Template) -> GemmaTemplate:
    own = {"image", "image_token"}
    fields = [field.name for field in dataclasses.fields(Template) if field.name not in own]
    return GemmaTemplate(**{name: getattr(text, name) for name in fields})


TEMPLATE, BASE_TEMPLATE = _with_pictures(GEMMA3), _with_pictures(GEMMA3_BASE)

_TOWER = "model.vision_tower."
_LAYER = _TOWER + "encoder.layers.{layer}"
_BLOCK = "vision.layers.blocks"
_PROJECTOR = "model.multi_modal_projector."
# The table of positions has no batch axis in files.
_POSITIONS = Transform(lambda x: x[None], lambda x: x[0])


def _tower_rules() -> list[Rule]:
    rules = [
        Rule(_TOWER + "embeddings.position_embedding.weight", "vision.positions", _POSITIONS),
        Rule(_TOWER + "embeddings.patch_embedding.weight", "vision.patch.kernel", CONV),
        Rule(_TOWER + "embeddings.patch_embedding.bias", "vision.patch.bias"),
    ]
    norms = [(f"{_LAYER}.layer_norm1", f"{_BLOCK}.attention_norm"), (f"{_LAYER}.layer_norm2", f"{_BLOCK}.mlp_norm")]
    for theirs, ours in (*norms, (_TOWER + "post_layernorm", "vision.norm")):
        rules.append(Rule(f"{theirs}.weight", f"{ours}.scale"))
        rules.append(Rule(f"{theirs}.bias", f"{ours}.bias"))
    maps = [(f"self_attn.{name}_proj", name) for name in "qkv"]
    maps += [("self_attn.out_proj", "o"), ("mlp.fc1", "up"), ("mlp.fc2", "down")]
    for theirs, ours in maps:
        rules.append(Rule(f"{_LAYER}.{theirs}.weight", f"{_BLOCK}.{ours}.kernel", LINEAR))
        rules.append(Rule(f"{_LAYER}.{theirs}.bias", f"{_BLOCK}.{ours}.bias"))
    return rules


RULES = (
    *_tower_rules(),
    Rule(_PROJECTOR + "mm_soft_emb_norm.weight", "projector.norm.scale"),
    Rule(_PROJECTOR + "mm_input_projection_weight", "projector.out.kernel"),  # used as it is, not transposed
    *decoder_rules("model.language_model.", "lm_head.weight", post_norms=True),
)

_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)", _TOWER + r"\1"),
        (r"multi_modal_projector\.(.+)", _PROJECTOR + r"\1"),
        (r"language_model\.model\.(.+)", r"model.language_model.\1"),
        (r"language_model\.lm_head\.weight", "lm_head.weight"),
    )
)


def canonical_name(name: str) -> str | None:
    """Maps any published spelling of a tensor's name to the table's; None for tensors that take no part."""
    if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
        return None
    for pattern, replacement in _SPELLINGS:
        if found := pattern.fullmatch(name):
            return found.expand(replacement)
    return name


def read_processor(folder: Path, raw: Mapping[str, Any], config: GemmaVisionConfig) -> Processor:
    """Reads tokenizer and image settings; models that were not taught turns have a tokenizer without a template."""
    settings, defaults = read_image_settings(folder), PanScanConfig()
    tiling = PanScanConfig(
        tile_px=config.vision.image_px,
        enabled=settings.get("do_pan_and_scan", False),
        min_crop_px=settings.get("pan_and_scan_min_crop_size", defaults.min_crop_px),
        max_crops=settings.get("pan_and_scan_max_num_crops", defaults.max_crops),
        min_aspect=settings.get("pan_and_scan_min_ratio_to_activate", defaults.min_aspect),
        mean=tuple(settings.get("image_mean", defaults.mean)),
        std=tuple(settings.get("image_std", defaults.std)),
    )
    tokenizer = read_tokenizer(folder)
    return Processor(
        tokenizer,
        tiling=tiling,
        tokens_per_tile=config.tokens_per_tile,
        max_positions=config.max_positions,
        template=TEMPLATE if tokenizer.chat_template else BASE_TEMPLATE,
    )
