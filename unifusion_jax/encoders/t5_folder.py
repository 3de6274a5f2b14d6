"""What folders of T5 hold: names of the encoder's tensors, and how words are put to it."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unifusion_jax.encoders.folder import read_tokenizer
from unifusion_jax.encoders.processor import Processor
from unifusion_jax.encoders.t5 import T5Config
from unifusion_jax.encoders.templates import Piece, Spans, Template, Words
from unifusion_jax.weights import LINEAR, Rule


@dataclasses.dataclass(frozen=True)
class T5Template(Template):
    """Words and a closing token: the target where there is one, else the instruction. There are no turns."""

    user: str = "{}"
    answer: str = "{}</s>"

    def pieces(self, instruction: str, images: Sequence[Spans], *, system: str, target: str | None) -> Iterator[Piece]:
        """Yields the words; see `Chat.render` for the arguments.

        Raises:
          ValueError: there is a system message.
        """
        if system:
            raise ValueError(
                f"T5 has no system turn, got the system message {system!r}. Leave it out; in a training config by "
                'encoder.system_prompts="none".'
            )
        if target:
            yield Words(target, keep=True, target=True)  # the closing token follows every target
        else:
            yield Words(instruction if target is None else "", keep=True)
            yield self.answer.removeprefix("{}")


TEMPLATE = T5Template()

_LAYER = "encoder.block.{layer}.layer."
_BLOCK = "layers.blocks."

RULES = (
    Rule("shared.weight", "embed_tokens.embedding"),
    Rule("encoder.final_layer_norm.weight", "norm.scale"),
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "position_bias"),
    Rule(_LAYER + "0.layer_norm.weight", _BLOCK + "attention_norm.scale"),
    *(Rule(f"{_LAYER}0.SelfAttention.{name}.weight", f"{_BLOCK}{name}.kernel", LINEAR) for name in "qkvo"),
    Rule(_LAYER + "1.layer_norm.weight", _BLOCK + "ffn_norm.scale"),
    Rule(_LAYER + "1.DenseReluDense.wi_0.weight", _BLOCK + "ffn.gate.kernel", LINEAR),
    Rule(_LAYER + "1.DenseReluDense.wi_1.weight", _BLOCK + "ffn.up.kernel", LINEAR),
    Rule(_LAYER + "1.DenseReluDense.wo.weight", _BLOCK + "ffn.down.kernel", LINEAR),
)


def canonical_name(name: str) -> str | None:
    """Maps a tensor's name to the table's; None for what takes no part: the decoder, and copies of the embedding table."""
    if name.startswith("decoder.") or name in ("lm_head.weight", "encoder.embed_tokens.weight"):
        return None
    return name


def read_processor(folder: Path, raw: Mapping[str, Any], config: T5Config) -> Processor:
    """Reads the tokenizer."""
    return Processor(
        read_tokenizer(folder),
        tiling=None,
        tokens_per_tile=0,
        max_positions=config.max_positions,
        template=TEMPLATE,
    )
