"""What a user asks for: an instruction, the images it speaks of, and (in training) the description it should become."""

import dataclasses
from collections.abc import Sequence

import PIL.Image

# The scale that the demo's base model draws best with (docs/demo.md). Models of photographs usually want 3 to 5.
DEFAULT_GUIDANCE = 1.5


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request to the model.

    Attributes:
      instruction: the user's words. Always plain text: spellings of control tokens in it have no effect.
      images: images that the instruction refers to, in order.
      target: what conditions the image generator besides the image tokens. None: the user's own words (no VERIFI).
        A description: the words the vision-language model would decode, given as its answer; only they are kept. "":
        image tokens only.
      system: system message; None takes the encoder's default, "" leaves the system turn out.
    """

    instruction: str
    images: Sequence[PIL.Image.Image] = ()
    target: str | None = None
    system: str | None = None

    def __post_init__(self):
        if not isinstance(self.instruction, str):
            raise ValueError(f"Prompt.instruction must be text, got {type(self.instruction).__name__}: pass a str.")
        if isinstance(self.images, PIL.Image.Image):
            raise ValueError("Prompt.images must be a sequence of images, got one image: pass images=[image].")
        for index, image in enumerate(self.images):
            if not isinstance(image, PIL.Image.Image):
                raise ValueError(
                    f"Prompt.images[{index}] must be a PIL image, got {type(image).__name__}: open files with "
                    "PIL.Image.open."
                )
        for name in ("target", "system"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"Prompt.{name} must be text or None, got {type(value).__name__}.")
