"""What is drawn from and what comes out of it, and how many pictures are cut into batches."""

import dataclasses
import logging
from collections.abc import Sequence

import PIL.Image

from unifusion_jax import sampler
from unifusion_jax.encoders.batch import LayerStates
from unifusion_jax.prompt import Prompt

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Condition:
    """What the DiT is told.

    Attributes:
      prompts: the prompts as the encoder was asked, each with the description it was conditioned on as its target. One of
        them, its target edited, can be given to `UniFusion.condition` again.
      states: layer states of image tokens and text tokens.
      first: those of the first steps, where the mode switches from one condition to another; else None.
      finished: whether each description ended by itself; False where it was cut off for its length.
    """

    prompts: list[Prompt]
    states: LayerStates
    first: LayerStates | None = None
    finished: list[bool] = dataclasses.field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """The description each row was conditioned on, as decoded or as given; the user's own words without rewriting."""
        return [prompt.instruction if prompt.target is None else prompt.target for prompt in self.prompts]

    def warn_of_cut_off(self) -> None:
        """Logs which descriptions did not end, each once."""
        cut_off = [prompt.instruction for prompt, whole in zip(self.prompts, self.finished, strict=True) if not whole]
        for words in dict.fromkeys(cut_off):
            log.warning("The description of %r did not end; it is cut off where room ends.", words)

    @property
    def phases(self) -> tuple[LayerStates, ...]:
        """The states in the order in which they condition."""
        return (self.states,) if self.first is None else (self.first, self.states)

    @property
    def room(self) -> int:
        """Tokens a row for which sampling is compiled."""
        return sampler.round_up(max(states.mask.shape[1] for states in self.phases))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture, and the text that conditioned it (see `Condition.texts`)."""

    image: PIL.Image.Image
    text: str


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a sampling run is: solver steps done and in all, batch after batch, and after the last one the pictures."""

    steps: int
    total_steps: int
    images: list[PIL.Image.Image] | None = None


def check_counts(**counts: int) -> None:
    """Raises ValueError for a number below 1, by its name."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")


def groups(count: int, size: int) -> list[list[int]]:
    """Cuts 0 .. count - 1 into groups of `size`; where there are several, the last is filled up with its last number."""
    if count <= size:
        return [list(range(count))]
    return [[min(start + place, count - 1) for place in range(size)] for start in range(0, count, size)]


def seeds_of(seed: int | Sequence[int], count: int) -> list[int]:
    """Returns a seed for each of `count` pictures. Raises ValueError for another number of them."""
    seeds = [seed + row for row in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"Got {len(seeds)} seeds for {count} pictures; give one seed, or one a picture.")
    return seeds
