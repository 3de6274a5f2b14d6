"""Chat prompts as token ids: control tokens and image tokens are placed as ids, text is encoded on its own.

So the spelling of a control token inside a user's words is plain text and can neither end the turn nor stand for an
image.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from unifusion_jax.encoders.templates import INTERNVL, ImageTokens, Spans, Template, Words


@dataclasses.dataclass(frozen=True)
class ChatTokens:
    """One rendered prompt of s tokens; the fields mean what they mean in `EncoderBatch`."""

    token_ids: Int[np.ndarray, "s"]
    is_image: Bool[np.ndarray, "s"]
    keep: Bool[np.ndarray, "s"]
    is_target: Bool[np.ndarray, "s"]


class _Tape:
    """Collects ids with their marks. Text is held back until a control token or a boundary, then encoded as a whole."""

    def __init__(self, chat: "Chat") -> None:
        self.chat = chat
        self.rows: list[tuple[int, bool, bool, bool]] = []
        self.waiting: list[Words] = []

    def add(self, ids: Sequence[int], *, image: bool = False, keep: bool = False, target: bool = False) -> None:
        self.flush()
        self.rows.extend((token, image, keep, target) for token in ids)

    def write(self, words: Words) -> None:
        """Adds text. The answer begins with a token of its own, as it does when it is decoded."""
        if self.waiting and self.waiting[-1].target != words.target:
            self.flush()
        self.waiting.append(words)

    def flush(self) -> None:
        """Encodes what waits; a token belongs to the part that its last character stands in."""
        parts, self.waiting = self.waiting, []
        ends = np.cumsum([len(part.text) for part in parts])
        ids, token_ends = self.chat.encode("".join(part.text for part in parts))
        for token, end in zip(ids, token_ends, strict=True):
            part = parts[int(np.searchsorted(ends, end))]
            self.rows.append((token, False, part.keep, part.target))

    def finish(self) -> ChatTokens:
        self.flush()
        ids, image, keep, target = zip(*self.rows, strict=True)
        return ChatTokens(np.array(ids, np.int32), np.array(image), np.array(keep), np.array(target))


class Chat:
    """Renders prompts with one tokenizer and template. Picklable, and safe to use from several threads.

    Attributes:
      template: of the prompts.
      ids: ids of the control tokens that the template uses.

    Raises ValueError when the tokenizer lacks one of them.
    """

    def __init__(self, tokenizer: Any, template: Template = INTERNVL):
        self.template = template
        self.ids = _control_ids(tokenizer, template)
        self._backend = tokenizer.backend_tokenizer
        self._trusted = _any_of(self.ids)
        # A single character cannot be split; no published tokenizer has such a control token.
        self._control = _any_of(token for token in tokenizer.get_added_vocab() if len(token) > 1)
        after = template.answer.partition("{}")[2]
        closing = [self.ids[token] for token in self._trusted.findall(after)[:1]]
        self.stop_ids = tuple(closing + [self.ids[token] for token in template.stops if token in self.ids])

    @property
    def image_id(self) -> int | None:
        """Id of the image token; None for text-only templates."""
        token = self.template.image_token
        return None if token is None else self.ids[token]

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
        self, instruction: str, images: Sequence[Spans] = (), *, system: str = "", target: str | None = None
    ) -> ChatTokens:
        """Renders one prompt.

        Args:
          instruction: the user's words.
          images: of each image, in order, the number of image tokens of each of its runs.
          system: system message; "" leaves the turn out.
          target: None keeps the instruction; otherwise the assistant's answer, which is kept instead. The token that
            closes the answer is marked as target but never kept: only words condition. "" adds no answer.

        Image tokens are always kept. Words are encoded together with the template's text around them, up to the next
        control token, as the reference does.
        """
        tape = _Tape(self)
        for piece in self.template.pieces(instruction, images, system=system, target=target):
            if isinstance(piece, ImageTokens):
                tape.add([self.ids[self.template.image_token or ""]] * piece.count, image=True, keep=True)
            elif isinstance(piece, Words):
                tape.write(piece)
            else:
                self._trust(tape, piece)
        if target:
            tape.add(self.stop_ids[:1], target=True)
        return tape.finish()

    def _trust(self, tape: _Tape, text: str) -> None:
        """Writes trusted text, control tokens as such."""
        start = 0
        for found in self._trusted.finditer(text):
            if found.start() > start:
                tape.write(Words(text[start : found.start()]))
            tape.add([self.ids[found[0]]])
            start = found.end()
        if text[start:]:
            tape.write(Words(text[start:]))


def _any_of(tokens: Any) -> re.Pattern[str]:
    """Returns an expression that finds any of the spellings, the longest where several fit; nothing when there are none."""
    spelled = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in spelled) or r"(?!)")


def _control_ids(tokenizer: Any, template: Template) -> dict[str, int]:
    """Returns the ids of the control tokens spelled in a template, and of those of its stops that exist."""
    vocab = tokenizer.get_vocab()
    spelled = dict.fromkeys(re.findall(r"<[^<>\s]+>", template.trusted()))
    missing = [token for token in spelled if token not in vocab]
    if missing:
        raise ValueError(f"The tokenizer lacks the control tokens {missing} of this model's chat template.")
    return {token: int(vocab[token]) for token in [*spelled, *template.stops] if token in vocab}
