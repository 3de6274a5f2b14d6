"""The ways to use one model: which pictures and words a request has, and which of them condition which steps.

All of them run through `unifusion_jax.pipeline.UniFusion`; a mode says what is encoded, never how.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

from unifusion_jax.data.records import RECONSTRUCTION_PROMPT
from unifusion_jax.prompt import Prompt
from unifusion_jax.verifi import SystemPrompts, task_of

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to use the model.

    Attributes:
      about: for people, one line.
      task: whose system prompt it takes, see `unifusion_jax.verifi`.
      images: fewest and most reference pictures; no bound where the second is None.
      words: whether the request must have words. Without, only the pictures condition.
      switches: whether the first steps are conditioned on the pictures alone and the others on the words alone.
      tiles: into how many tiles a picture is cut, thumbnail included, where the user does not say; None leaves that to the
        model.
    """

    about: str
    task: str
    images: tuple[int, int | None]
    words: bool = True
    switches: bool = False
    tiles: int | None = None


MODES: Mapping[str, Mode] = MappingProxyType(
    {
        "text_to_image": Mode("a picture of what the words say", "text_to_image", (0, 0)),
        "edit": Mode("one picture, changed as the words say", "edit", (1, 1)),
        "compose": Mode("several pictures, combined as the words say", "multi_reference", (2, None)),
        "joint": Mode("a picture of what the words say, after the given ones", "joint", (1, None)),
        "variation": Mode("another picture like the given one", "reconstruction", (1, 1), words=False, tiles=1),
        "reconstruct": Mode(
            "what is in the pictures again, from their tokens alone", "reconstruction", (1, None), words=False
        ),
        "zero_shot_edit": Mode(
            "what the words say, laid out as in the given picture; for models that were never trained on edits",
            "text_to_image",
            (1, 1),
            switches=True,
        ),
    }
)


def find(name: str) -> Mode | None:
    """Returns a mode; None for "auto", where each prompt decides. Raises ValueError for an unknown name."""
    if name == AUTO:
        return None
    if name not in MODES:
        near = difflib.get_close_matches(name, MODES, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no mode {name!r}; modes are {', '.join([AUTO, *MODES])}.{hint}")
    return MODES[name]


def mode_of(prompt: Prompt) -> str:
    """Returns the mode that a prompt is in when the user does not say: by its pictures, and "" as target for no words."""
    if prompt.target == "":
        return "reconstruct"
    return {"text_to_image": "text_to_image", "edit": "edit", "multi_reference": "compose"}[task_of(len(prompt.images))]


def check(name: str, prompt: Prompt) -> None:
    """Raises ValueError where a prompt lacks what the mode needs, or has more."""
    mode = MODES[name]
    least, most = mode.images
    if len(prompt.images) < least or (most is not None and len(prompt.images) > most):
        expected = f"{least} or more" if most is None else f"exactly {most}" if most else "no"
        raise ValueError(
            f"Mode {name!r} ({mode.about}) takes {expected} reference pictures, got {len(prompt.images)}. Give another number "
            "of pictures, or choose another mode."
        )
    if mode.words and prompt.target is None and not prompt.instruction.strip():
        raise ValueError(
            f"The prompt is empty. Mode {name!r} ({mode.about}) needs words; for pictures alone there are 'variation' and "
            "'reconstruct'."
        )


def shaped(name: str, prompt: Prompt, systems: SystemPrompts, system_prompt: str | None) -> Prompt:
    """Returns the prompt as the encoder is asked in this mode: system message set, words left out where they do not count.

    Args:
      name: of the mode.
      prompt: checked by `check`.
      systems: the model's own system messages.
      system_prompt: in their place; a prompt's own message comes before both.
    """
    mode = MODES[name]
    system = next(text for text in (prompt.system, system_prompt, systems.of(mode.task)) if text is not None)
    if not mode.words:
        return Prompt(prompt.instruction or RECONSTRUCTION_PROMPT, prompt.images, target="", system=system)
    images = () if mode.switches else prompt.images
    return dataclasses.replace(prompt, images=images, system=system)


def pictures_only(prompt: Prompt, systems: SystemPrompts) -> Prompt:
    """Returns what conditions the first steps of a mode that switches: the tokens of the prompt's pictures."""
    return Prompt(RECONSTRUCTION_PROMPT, prompt.images, target="", system=systems.reconstruction)


def grid_tiles(tiles: int) -> int:
    """Returns the bound of a tile grid for `tiles` tiles in all: a grid of more than one has a thumbnail beside it."""
    if tiles < 1:
        raise ValueError(f"tiles must be at least 1, got {tiles}. The paper cuts pictures into 1, 5 or 10.")
    return max(1, tiles - 1)
