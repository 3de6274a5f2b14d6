"""VERIFI: the system prompts under which the encoder rewrites a user's words into a target description (paper, section 3)."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import PIL.Image

from unifusion_jax.data.images import to_pixels
from unifusion_jax.data.records import Record
from unifusion_jax.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class SystemPrompts:
    """System messages by task. The same message is used in training (with stored targets) and at inference.

    Attributes:
      text_to_image: no pictures are given.
      joint: one picture is given beside a description of what to draw.
      edit: the instruction changes one picture.
      multi_reference: the instruction combines several pictures.
      reconstruction: the picture itself is wanted again.
    """

    text_to_image: str
    joint: str
    edit: str
    multi_reference: str
    reconstruction: str

    def of(self, task: str) -> str:
        """Returns the message of a task. Raises ValueError for an unknown one."""
        names = [field.name for field in dataclasses.fields(self)]
        if task not in names:
            raise ValueError(f"There is no system prompt for task {task!r}; tasks are {names}.")
        return getattr(self, task)


def task_of(num_images: int) -> str:
    """Returns the task that a request with this many pictures is, when the user does not say."""
    return ("text_to_image", "edit")[num_images] if num_images < 2 else "multi_reference"


def prompt_of(record: Record, prompts: SystemPrompts, *, verifi: bool = True) -> Prompt:
    """Returns the prompt of a training record: its stored target as the encoder's answer (teacher-forced).

    Without `verifi` the user's own words condition, and no target; image tokens alone stay what they are.
    """
    images = [PIL.Image.fromarray(to_pixels(image)) for image in record.images]
    target = None if record.target and not verifi else record.target
    return Prompt(record.prompt, images, target=target, system=prompts.of(record.task))


_DETAIL = (
    "Name every object with its count, colours, size, material, texture and pose, where each one stands and how they relate "
    "to one another, the background, the light, the style and the point of view. Write plain sentences about what is seen, "
    "nothing about what is not, and no introduction or comment."
)

SYSTEM_PROMPTS: Mapping[str, SystemPrompts] = MappingProxyType(
    {
        # For pretrained vision-language models.
        "full": SystemPrompts(
            text_to_image=(
                "You describe pictures that are yet to be painted. Read the user's request and describe the one picture that "
                f"fulfils it best, in detail. Keep everything the user asks for and decide what is left open. {_DETAIL}"
            ),
            joint=(
                "You describe pictures that are yet to be painted. Read the user's request, look at the picture that comes "
                f"with it, and describe in detail the one picture that fits both. {_DETAIL}"
            ),
            edit=(
                "You describe the result of edits to pictures. Look at the user's picture, think through what the instruction "
                "changes and what follows from it, and describe in detail the picture after the edit. Everything that the "
                f"instruction does not touch stays as it is. {_DETAIL}"
            ),
            multi_reference=(
                "You describe pictures that are composed of several others. Look at the user's pictures, take from each what "
                f"the instruction asks for, and describe in detail the one picture that results. {_DETAIL}"
            ),
            reconstruction=f"You describe pictures. Look at the user's picture and describe it in detail. {_DETAIL}",
        ),
        # For the small bundled encoder, which was trained with these.
        "short": SystemPrompts(
            text_to_image="Describe the picture.",
            joint="Describe the picture.",
            edit="Describe the edited picture.",
            multi_reference="Describe the combined picture.",
            reconstruction="Describe the picture.",
        ),
        # For encoders without a system turn, such as T5.
        "none": SystemPrompts(text_to_image="", joint="", edit="", multi_reference="", reconstruction=""),
    }
)
