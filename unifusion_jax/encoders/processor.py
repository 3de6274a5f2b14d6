"""Prompts to encoder batches on the host: tiles, chat tokens, padding. No jax arrays, so data workers can use it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Int

from unifusion_jax.encoders.batch import EncoderBatch
from unifusion_jax.encoders.chat import Chat
from unifusion_jax.encoders.templates import INTERNVL, Template
from unifusion_jax.encoders.tiling import Cut
from unifusion_jax.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class Row:
    """One prepared prompt of s tokens and t tiles, not padded; the fields mean what they mean in `EncoderBatch`."""

    token_ids: Int[np.ndarray, "s"]
    is_image: Bool[np.ndarray, "s"]
    keep: Bool[np.ndarray, "s"]
    is_target: Bool[np.ndarray, "s"]
    pixels: Float[np.ndarray, "t h w 3"] | None
    grid: Int[np.ndarray, "t 3"] | None = None


@runtime_checkable
class Tiling(Protocol):
    """A rule that cuts images; `tiling.TilingConfig` is one."""

    @property
    def tile_px(self) -> int:
        """Side of a tile."""
        ...

    @property
    def has_grid(self) -> bool:
        """Whether its cuts tell the place of each tile."""
        ...

    def with_max_tiles(self, max_tiles: int | None) -> Any:
        """Returns the same rule with another bound on the tiles of an image; None changes nothing."""
        ...

    def cut(self, image: PIL.Image.Image) -> Cut:
        """Cuts an image."""
        ...


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns prompts into encoder batches. Picklable.

    Attributes:
      tokenizer: a transformers tokenizer of the tokenizers backend.
      tiling: how images are cut; None for a model that reads text only.
      tokens_per_tile: image tokens of one tile.
      max_positions: longest sequence that the decoder takes.
      system: system message of prompts that give none; "" for no system turn.
      template: what stands around the parts of a prompt.
    """

    tokenizer: Any
    tiling: Tiling | None
    tokens_per_tile: int
    max_positions: int
    system: str = ""
    template: Template = INTERNVL

    @functools.cached_property
    def chat(self) -> Chat:
        """The renderer of prompts."""
        return Chat(self.tokenizer, self.template)

    @property
    def image_id(self) -> int | None:
        """Id of the image token; None for a model that reads text only."""
        return self.chat.image_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end the assistant's answer; the first is the one that closes a turn."""
        ids, eos = self.chat.stop_ids, self.tokenizer.eos_token_id
        return ids if eos is None or eos in ids else (*ids, int(eos))

    @property
    def pad_id(self) -> int:
        """Id in padded places."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def prepare_row(self, prompt: Prompt, *, max_tiles: int | None = None) -> Row:
        """Cuts and renders one prompt; `max_tiles` bounds the tile grid of each image (thumbnail not counted)."""
        cuts = self._cut(prompt.images, max_tiles)
        chat = self.chat.render(
            prompt.instruction,
            [[tiles * self.tokens_per_tile for tiles in cut.spans] for cut in cuts],
            system=self.system if prompt.system is None else prompt.system,
            target=prompt.target,
        )
        pixels = np.concatenate([cut.pixels for cut in cuts]) if cuts else None
        return Row(chat.token_ids, chat.is_image, chat.keep, chat.is_target, pixels, _numbered(cuts))

    def _cut(self, images: Sequence[PIL.Image.Image], max_tiles: int | None) -> list[Cut]:
        if not images:
            return []
        if self.tiling is None:
            raise ValueError(
                f"The prompt has {len(images)} images, but this encoder reads text only. Leave them out, or load an "
                "encoder with a vision tower."
            )
        tiling = self.tiling.with_max_tiles(max_tiles)
        return [tiling.cut(image) for image in images]

    def collate(
        self,
        rows: Sequence[Row],
        *,
        max_tokens: int | None = None,
        row_tiles: int | None = None,
        max_kept: int | None = None,
    ) -> EncoderBatch:
        """Pads rows on the right to one batch.

        Args:
          rows: at least one.
          max_tokens: S; the longest row's length when None.
          row_tiles: T, all tiles of a row with their thumbnails; the largest number of tiles when None. 0 tiles give
            `pixels=None`.
          max_kept: the room for kept tokens that the batch will be exported with; None checks nothing.

        Raises:
          ValueError: a row longer than `max_tokens` or `max_positions`, with more than `row_tiles` tiles, or that keeps
            more than `max_kept` tokens. Nothing is ever cut off.
        """
        if not rows:
            raise ValueError("Got no prompts, expected at least one.")
        for index, row in enumerate(rows):
            self.check_row(row, f"Prompt {index}", max_tokens=max_tokens, row_tiles=row_tiles, max_kept=max_kept)
        length = max(len(row.token_ids) for row in rows) if max_tokens is None else max_tokens
        tiles = max(_tiles(row) for row in rows) if row_tiles is None else row_tiles
        pixels = grid = None
        if tiles and self.tiling is not None:
            side = self.tiling.tile_px
            pixels = np.zeros((len(rows), tiles, side, side, 3), np.float32)
            for place, row in zip(pixels, rows, strict=True):
                if row.pixels is not None:
                    place[: len(row.pixels)] = row.pixels
            if self.tiling.has_grid:
                grid = _pad([_NO_GRID if row.grid is None else row.grid for row in rows], tiles, -1)
        return EncoderBatch(
            token_ids=_pad([row.token_ids for row in rows], length, self.pad_id),
            mask=np.arange(length) < np.array([len(row.token_ids) for row in rows])[:, None],
            is_image=_pad([row.is_image for row in rows], length, False),
            keep=_pad([row.keep for row in rows], length, False),
            pixels=pixels,
            is_target=_pad([row.is_target for row in rows], length, False),
            grid=grid,
        )

    def prepare(
        self, prompts: Sequence[Prompt], *, max_tokens: int | None = None, max_tiles: int | None = None
    ) -> EncoderBatch:
        """Prepares a batch of prompts; see `prepare_row` for `max_tiles` and `collate` for `max_tokens`."""
        return self.collate(
            [self.prepare_row(prompt, max_tiles=max_tiles) for prompt in prompts], max_tokens=max_tokens
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of decoded ids, control tokens left out."""
        return self.tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=True)

    def check_row(
        self,
        row: Row,
        name: str = "The prompt",
        *,
        max_tokens: int | None = None,
        row_tiles: int | None = None,
        max_kept: int | None = None,
    ) -> None:
        """Raises ValueError, which says `name`, for a row that `collate` with these arguments would refuse."""
        length, images = len(row.token_ids), int(row.is_image.sum())
        limit = self.max_positions if max_tokens is None else min(max_tokens, self.max_positions)
        if length > limit:
            raise ValueError(
                f"{name} has {length} tokens ({images} of them image tokens, {_tiles(row)} tiles), the budget "
                f"is {limit}. Shorten the text, lower max_tiles, or raise max_tokens (at most {self.max_positions})."
            )
        if row_tiles is not None and _tiles(row) > row_tiles:
            raise ValueError(
                f"{name} has {_tiles(row)} tiles, room is for {row_tiles}. Lower max_tiles, give fewer images, "
                "or raise row_tiles."
            )
        if max_kept is not None and row.keep.sum() > max_kept:
            raise ValueError(
                f"{name} keeps {row.keep.sum()} tokens ({images} of them image tokens), room is for {max_kept}. Shorten its "
                "target, lower max_tiles, or raise max_kept."
            )


def _tiles(row: Row) -> int:
    return 0 if row.pixels is None else len(row.pixels)


_NO_GRID = np.zeros((0, 3), np.int32)


def _numbered(cuts: Sequence[Cut]) -> np.ndarray | None:
    """Returns number of the image, row and column of each tile, -1 in empty places; None where cuts tell no places."""
    rows = []
    for number, cut in enumerate(cuts):
        if cut.grid is not None:
            numbers = np.where(cut.grid[:, :1] < 0, -1, number)
            rows.append(np.concatenate([numbers, cut.grid], axis=1).astype(np.int32))
    return np.concatenate(rows) if rows else None


def _pad(rows: Sequence[np.ndarray], length: int, value: int | bool) -> np.ndarray:
    """Stacks rows, the first axis of each filled up to `length`."""
    padded = np.full((len(rows), length, *rows[0].shape[1:]), value, rows[0].dtype)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded
