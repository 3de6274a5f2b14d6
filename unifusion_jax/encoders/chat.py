"""Chat prompts as token ids: system, user (images, then words), assistant.

The template is InternVL's `internvl2_5` (OpenGVLab/InternVL `conversation.py`), which all InternVL 2.5 and 3 models
use. Control tokens are placed as ids and text is encoded on its own, so the spelling of a control token inside a user's
words is plain text and can neither end the turn nor stand for an image.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

INTERNVL_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
)
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE = "<img>", "</img>", "<IMG_CONTEXT>"
CONTROL_TOKENS = (TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE)

# The same template for transformers' processors. SYSTEM is replaced by the default system message as a Jinja string.
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


@dataclasses.dataclass(frozen=True)
class ChatTokens:
    """One rendered prompt of s tokens; the fields mean what they mean in `EncoderBatch`."""

    token_ids: Int[np.ndarray, "s"]
    is_image: Bool[np.ndarray, "s"]
    keep: Bool[np.ndarray, "s"]
    is_target: Bool[np.ndarray, "s"]


class _Tape:
    """Collects ids with their marks."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, bool, bool, bool]] = []

    def add(self, ids: Sequence[int], *, image: bool = False, keep: bool = False, target: bool = False) -> None:
        self.rows.extend((token, image, keep, target) for token in ids)

    def finish(self) -> ChatTokens:
        ids, image, keep, target = zip(*self.rows, strict=True)
        return ChatTokens(np.array(ids, np.int32), np.array(image), np.array(keep), np.array(target))


class Chat:
    """Renders prompts with one tokenizer. Picklable, and safe to use from several threads.

    Raises ValueError when the tokenizer lacks one of the control tokens.
    """

    def __init__(self, tokenizer: Any):
        vocab = tokenizer.get_vocab()
        missing = [token for token in CONTROL_TOKENS if token not in vocab]
        if missing:
            raise ValueError(f"The tokenizer lacks the control tokens {missing}; expected an InternVL tokenizer.")
        self.ids = {token: int(vocab[token]) for token in CONTROL_TOKENS}
        self._backend = tokenizer.backend_tokenizer
        # A single character cannot be split; no published tokenizer has such a control token.
        spellings = [token for token in tokenizer.get_added_vocab() if len(token) > 1]
        self._control = re.compile("|".join(re.escape(token) for token in sorted(spellings, key=len, reverse=True)))

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Encodes text as plain text; returns the ids and where in the text each token ends.

        Wherever a control token is spelled, the text is cut after its first character, so that the tokenizer sees it in
        two parts and never as the control token.
        """
        ids: list[int] = []
        ends: list[int] = []
        start = 0
        cuts = []
        found = self._control.search(text)
        while found:
            cuts.append(found.start() + 1)
            found = self._control.search(text, found.start() + 1)
        for cut in [*cuts, len(text)]:
            if cut > start:
                encoded = self._backend.encode(text[start:cut], add_special_tokens=False)
                ids.extend(encoded.ids)
                ends.extend(start + end for _, end in encoded.offsets)
                start = cut
        return ids, ends

    def render(
        self, instruction: str, image_tokens: Sequence[int], *, system: str = "", target: str | None = None
    ) -> ChatTokens:
        """Renders one prompt.

        Args:
          instruction: the user's words.
          image_tokens: number of image tokens of each image, in order.
          system: system message; "" leaves the turn out.
          target: None keeps the instruction; otherwise the assistant's answer, which is kept instead. The token that
            closes the answer is marked as target but never kept: only words condition. "" adds no answer.

        Image tokens are always kept. Labels "Image-1: " stand before the images when there are several.
        """
        tape = _Tape()
        if system:
            tape.add([self.ids[TURN_START], *self.encode(f"system\n{system}")[0], self.ids[TURN_END]])
            tape.add(self.encode("\n")[0])
        tape.add([self.ids[TURN_START]])
        text = "user\n"
        for index, count in enumerate(image_tokens):
            text += f"Image-{index + 1}: " if len(image_tokens) > 1 else ""
            tape.add([*self.encode(text)[0], self.ids[IMAGE_START]])
            tape.add([self.ids[IMAGE]] * count, image=True, keep=True)
            tape.add([self.ids[IMAGE_END]])
            text = "\n"
        # The words are encoded together with what stands before them, as the reference does, and found again by offset.
        for token, end in zip(*self.encode(text + instruction), strict=True):
            tape.add([token], keep=target is None and end > len(text))
        tape.add([self.ids[TURN_END], *self.encode("\n")[0], self.ids[TURN_START], *self.encode("assistant\n")[0]])
        if target:
            tape.add(self.encode(target)[0], keep=True, target=True)
            tape.add([self.ids[TURN_END]], target=True)
        return tape.finish()
