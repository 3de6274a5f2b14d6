"""Chat templates of the families, as data: what stands around system message, images, words and answer.

A template yields pieces: trusted text, in which control tokens are spelled out; words from outside, which are never read
as control tokens; and image tokens. `unifusion_jax.encoders.chat` turns them into ids.
"""

import dataclasses
from collections.abc import Iterator, Sequence

INTERNVL_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE = "<img>", "</img>", "<IMG_CONTEXT>"
CONTROL_TOKENS = (TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE)
LLAMA_SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

# The number of image tokens of each run of one image.
Spans = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Words:
    """Text from outside. `keep`: its tokens condition the image generator; `target`: it is the assistant's answer."""

    text: str
    keep: bool = False
    target: bool = False


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """A run of `count` image tokens."""

    count: int


Piece = str | Words | ImageTokens


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands around the parts of a prompt; "{}" is the place of the part.

    Attributes:
      user: around the user's turn.
      answer: around the assistant's answer. The text up to "{}" asks for it; the first control token behind closes it.
      begin: before everything.
      system: around the system message.
      system_inside: whether the system message stands at the beginning of the user's turn, not before it.
      system_default: message of prompts that give none, where the model's folder has none of its own.
      image: around each image of the user's turn; "" for text-only models.
      image_token: the control token that stands for a place of an image.
      image_label: before each image when there are several; its "{}" is the number, from 1.
      stops: control tokens that end an answer besides the closing one, as far as the tokenizer has them.
      strips: whether white space around words and answer is taken off.
      asks: whether the text that asks for an answer also stands in prompts that are only read.
    """

    user: str
    answer: str
    begin: str = ""
    system: str = ""
    system_inside: bool = False
    system_default: str = ""
    image: str = ""
    image_token: str | None = None
    image_label: str = ""
    stops: tuple[str, ...] = ()
    strips: bool = False
    asks: bool = True

    def trusted(self) -> str:
        """All trusted text, to look up its control tokens."""
        parts = (self.begin, self.system, self.user, self.answer, self.image, self.image_token or "")
        return " ".join(parts)

    def image_pieces(self, images: Sequence[Spans]) -> Iterator[Piece]:
        """Yields all images, each as one run of tokens."""
        before, _, after = self.image.partition("{}")
        for number, spans in enumerate(images, 1):
            if len(images) > 1:
                yield self.image_label.format(number)
            yield before
            yield ImageTokens(sum(spans))
            yield after

    def pieces(self, instruction: str, images: Sequence[Spans], *, system: str, target: str | None) -> Iterator[Piece]:
        """Yields the pieces of a prompt; see `Chat.render` for the arguments."""
        if self.strips:
            instruction = instruction.strip()
            target = None if target is None else target.strip()
        yield self.begin
        if system and not self.system_inside:
            yield from _around(self.system, Words(system))
        before, _, after = self.user.partition("{}")
        yield before
        if system and self.system_inside:
            yield from _around(self.system, Words(system))
        yield from self.image_pieces(images)
        yield Words(instruction, keep=target is None)
        yield after
        if self.asks or target is not None:
            before, _, after = self.answer.partition("{}")
            yield before
        if target:
            yield Words(target, keep=True, target=True)


def _around(text: str, piece: Piece) -> Iterator[Piece]:
    before, _, after = text.partition("{}")
    yield before
    yield piece
    yield after


CHATML = Template(
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    answer="<|im_start|>assistant\n{}<|im_end|>",
)
# `internvl2_5` of OpenGVLab/InternVL `conversation.py`, which all InternVL 2.5 and 3 models use.
INTERNVL = dataclasses.replace(
    CHATML,
    system_default=INTERNVL_SYSTEM,
    image="<img>{}</img>\n",
    image_token="<IMG_CONTEXT>",
    image_label="Image-{}: ",
)
# INTERNVL for transformers' processors. SYSTEM is replaced by the default system message as a Jinja string.
JINJA = """{%- if messages[0]['role'] != 'system' and SYSTEM -%}
{{- '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list -%}
{%- set seen = namespace(images=0) -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{%- set seen.images = seen.images + 1 -%}
{%- if images | length > 1 -%}{{- 'Image-' ~ seen.images ~ ': ' -}}{%- endif -%}
{{- '<IMG_CONTEXT>\\n' -}}
{%- elif item['type'] == 'text' -%}
{{- item['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

INTERNLM2 = dataclasses.replace(CHATML, begin="<s>")
INTERNVL_INTERNLM2 = dataclasses.replace(INTERNVL, begin="<s>")
# Only Qwen2.5 has a default message; Qwen3 has none.
QWEN2 = dataclasses.replace(CHATML, system_default=QWEN_SYSTEM)
# meta-llama/llama-models `prompt_format.md`; the default message is all that the published Jinja template writes.
LLAMA3 = Template(
    begin="<|begin_of_text|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    system_default=LLAMA_SYSTEM,
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    answer="<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
    stops=("<|eom_id|>", "<|end_of_text|>"),
    strips=True,
)
GEMMA3 = Template(
    begin="<bos>",
    system="{}\n\n",
    system_inside=True,
    user="<start_of_turn>user\n{}<end_of_turn>\n",
    answer="<start_of_turn>model\n{}<end_of_turn>",
    stops=("<eos>",),
    strips=True,
)
# Models that were never taught turns: the words alone, and an empty line before an answer.
LLAMA3_BASE = Template(
    begin="<|begin_of_text|>", system="{}\n\n", user="{}", answer="\n\n{}<|end_of_text|>", asks=False
)
GEMMA3_BASE = dataclasses.replace(LLAMA3_BASE, begin="<bos>", answer="\n\n{}<eos>")
