"""Which encoder a folder's `config.json` means: one line a published `model_type`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unifusion_jax import weights
from unifusion_jax.encoders import families, folder, gemma_vision_folder, internvl_weights, qwen_vl_folder, t5_folder
from unifusion_jax.encoders.gemma_vision import GemmaVisionConfig
from unifusion_jax.encoders.internvl import InternVLConfig
from unifusion_jax.encoders.model import TextConfig
from unifusion_jax.encoders.processor import Processor
from unifusion_jax.encoders.qwen_vl import QwenVLConfig
from unifusion_jax.encoders.t5 import T5Config


@dataclasses.dataclass(frozen=True)
class Family:
    """What makes the models of one `model_type` encoders.

    Attributes:
      read_config: reads sizes from a parsed `config.json`; `has_head` tells whether the weights hold an output head. The
        configuration has `build`, `num_layers`, `hidden_size`, `vocab_size`, `max_positions` and `decodes`.
      rules: the weight table of a configuration.
      canonical_name: maps any spelling of a tensor's name to the table's, or to None to leave the tensor out.
      read_processor: reads tokenizer, template and image settings of a folder.
    """

    read_config: Callable[..., Any]
    rules: Callable[[Any], Sequence[weights.Rule]]
    canonical_name: Callable[[str], str | None]
    read_processor: Callable[[Path, Mapping[str, Any], Any], Processor]


def _text_rules(config: TextConfig) -> list[weights.Rule]:
    gemma = config.decoder.post_norms
    rules = families.decoder_rules("model.", "lm_head.weight", post_norms=gemma)
    return rules if gemma else rules + families.meta_rules(config.decoder, "model.", "output.weight")


_INTERNVL = Family(
    InternVLConfig.from_hf,
    internvl_weights.read_rules,
    internvl_weights.canonical_name,
    folder.read_internvl_processor,
)
_GEMMA_VISION = Family(
    GemmaVisionConfig.from_hf,
    lambda config: gemma_vision_folder.RULES,
    gemma_vision_folder.canonical_name,
    gemma_vision_folder.read_processor,
)
_QWEN_VL = Family(
    QwenVLConfig.from_hf,
    lambda config: qwen_vl_folder.RULES,
    qwen_vl_folder.canonical_name,
    qwen_vl_folder.read_processor,
)
_T5 = Family(T5Config.from_hf, lambda config: t5_folder.RULES, t5_folder.canonical_name, t5_folder.read_processor)
_TEXT = Family(TextConfig.from_hf, _text_rules, families.canonical_name, folder.read_text_processor)

FAMILIES: dict[str, Family] = {
    "gemma3": _GEMMA_VISION,
    "qwen2_5_vl": _QWEN_VL,
    "t5": _T5,
    "internvl": _INTERNVL,
    "internvl_chat": _INTERNVL,
    **dict.fromkeys(families.LANGUAGE_MODELS, _TEXT),
}


def find(config: Mapping[str, Any]) -> Family:
    """Returns the family of a parsed `config.json`; ValueError for unsupported models."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(
            f"Unsupported encoder model_type={name!r} in config.json; supported: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[name]
