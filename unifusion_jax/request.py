"""One request with all its settings, as the command line and the web page make it and as pictures store it."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import PIL.Image

from unifusion_jax import modes
from unifusion_jax.flow import SamplingConfig
from unifusion_jax.pipeline import BATCH_SIZE, Condition, Progress, UniFusion
from unifusion_jax.prompt import DEFAULT_GUIDANCE, Prompt

_SIZE_PATTERN = re.compile(r"(\d+)(?:\s*x\s*(\d+))?")


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Reads "96" or "128x96" (width x height, px); None and "" stand for the training size. Raises ValueError otherwise."""
    if not text:
        return None
    found = _SIZE_PATTERN.fullmatch(text.strip())
    if not found:
        raise ValueError(f"size must be a side in px such as 96, or WIDTHxHEIGHT such as 128x96, got {text!r}.")
    return (int(found[1]), int(found[2])) if found[2] else int(found[1])


@dataclasses.dataclass(frozen=True)
class Request:
    """What to draw, and how. Settings out of range raise ValueError here, before a model is loaded.

    Attributes:
      prompt: the user's words.
      images: reference pictures.
      mode: one of `modes.MODES`, or "auto".
      target: description to condition on, in place of the one that the encoder would write.
      count: pictures, from seeds `seed`, `seed + 1`, ...
      rewrite_seed: of the description's decoding.

    The others are as in `UniFusion.generate` and `UniFusion.condition`.
    """

    prompt: str = ""
    images: Sequence[PIL.Image.Image] = ()
    mode: str = modes.AUTO
    target: str | None = None
    rewrite: bool | None = None
    system_prompt: str | None = None
    tiles: int | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    rewrite_seed: int = 0
    count: int = 1
    seed: int = 0
    steps: int = 30
    guidance: float = DEFAULT_GUIDANCE
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    solver: str = "euler"
    switch: float = 0.15
    size: int | tuple[int, int] | None = None

    def __post_init__(self):
        modes.find(self.mode)
        modes.check(modes.mode_of(self.asked) if self.mode == modes.AUTO else self.mode, self.asked)
        if self.tiles is not None:
            modes.grid_tiles(self.tiles)
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}.")
        _ = self.sampling  # raises for settings out of range

    @property
    def asked(self) -> Prompt:
        """The prompt."""
        return Prompt(self.prompt, self.images, target=self.target)

    @property
    def sampling(self) -> SamplingConfig:
        """The solver's settings."""
        return SamplingConfig(self.steps, self.solver, self.guidance, self.guidance_interval, switch=self.switch)

    def condition(self, model: UniFusion) -> Condition:
        """Encodes the prompt, and rewrites it where that is asked for."""
        model.check_size(self.size)
        return model.condition(
            [self.asked],
            mode=self.mode,
            rewrite=self.rewrite,
            system_prompt=self.system_prompt,
            tiles=self.tiles,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.rewrite_seed,
        )

    def sample_in_chunks(
        self, model: UniFusion, condition: Condition, chunk_steps: int, batch_size: int = BATCH_SIZE
    ) -> Iterator[Progress]:
        """Samples; see `UniFusion.sample_in_chunks`."""
        return model.sample_in_chunks(
            condition,
            seed=self.seed,
            size=self.size,
            sampling=self.sampling,
            images_per_prompt=self.count,
            chunk_steps=chunk_steps,
            batch_size=batch_size,
        )

    def settings(self, condition: Condition, number: int) -> dict[str, Any]:
        """Returns what makes picture `number` again, for its metadata: all fields but the pictures, its own seed, and the
        description that it was conditioned on."""
        fields = {name: value for name, value in vars(self).items() if name != "images"}
        return fields | {"seed": self.seed + number, "count": 1, "target": condition.prompts[0].target}
