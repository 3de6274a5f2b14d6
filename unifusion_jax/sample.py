"""Generates or edits a picture: `python -m unifusion_jax.sample --prompt="a large red circle" --output=out.png`.

With --image the prompt is an instruction for that picture; --image can be given several times. Without --checkpoint the
demo model that comes with the package is used. The encoder first rewrites the prompt into a description (VERIFI), which is
printed; --norewrite conditions on the prompt's own words.
"""

import logging
import re
import sys

from absl import app, flags

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Exported folder or training workdir; the bundled demo if not given."
)
_PROMPT = flags.DEFINE_string("prompt", "", "What to draw, or how to change the picture given by --image.")
_IMAGE = flags.DEFINE_multi_string("image", [], "Reference picture; repeat the flag for several.")
_OUTPUT = flags.DEFINE_string("output", "", "PNG, JPEG or WebP file to write.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the initial noise.")
_STEPS = flags.DEFINE_integer("steps", 30, "Solver steps.")
_GUIDANCE = flags.DEFINE_float("guidance", 3.0, "Classifier-free guidance scale; 1 is off.")
_GUIDANCE_INTERVAL = flags.DEFINE_list("guidance_interval", ["0", "1"], "Times LOW,HIGH between which guidance acts.")
_SIZE = flags.DEFINE_string("size", None, "Side in pixels, or WIDTHxHEIGHT; the training size if not given.")
_SOLVER = flags.DEFINE_enum("solver", "euler", ["euler", "heun"], "Euler, or Heun's second-order method.")
_REWRITE = flags.DEFINE_bool(
    "rewrite", None, "Let the encoder describe the picture first (VERIFI); as the model was trained if not given."
)
_SYSTEM_PROMPT = flags.DEFINE_string("system_prompt", None, "System message in place of the task's own.")

_SIZE_PATTERN = re.compile(r"(\d+)(?:x(\d+))?")


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Reads "96" or "128x96" (width x height, px). Raises ValueError for anything else."""
    if text is None:
        return None
    found = _SIZE_PATTERN.fullmatch(text)
    if not found:
        raise ValueError(f"--size must be a side in px such as 96, or WIDTHxHEIGHT such as 128x96, got {text!r}.")
    return (int(found[1]), int(found[2])) if found[2] else int(found[1])


def run() -> None:
    """Loads the model, generates and writes the file."""
    from unifusion_jax import images
    from unifusion_jax.flow import SamplingConfig
    from unifusion_jax.pipeline import UniFusion
    from unifusion_jax.prompt import Prompt

    size = parse_size(_SIZE.value)
    low, high = (float(bound) for bound in _GUIDANCE_INTERVAL.value)
    sampling = SamplingConfig(_STEPS.value, _SOLVER.value, _GUIDANCE.value, (low, high))
    references = [images.load(file) for file in _IMAGE.value]
    images.check_output(_OUTPUT.value)
    model = UniFusion.load(_CHECKPOINT.value)
    model.check_size(size)
    condition = model.condition(
        [Prompt(_PROMPT.value, references)], rewrite=_REWRITE.value, system_prompt=_SYSTEM_PROMPT.value
    )
    if _REWRITE.value or (_REWRITE.value is None and model.config.encoder.verifi):
        print(f"Description: {condition.texts[0]}")
    image = model.sample(condition, seed=_SEED.value, size=size, sampling=sampling)[0]
    images.save(image, _OUTPUT.value)
    print(f"Wrote {_OUTPUT.value} ({image.width}x{image.height} px).")


def main(argv: list[str]) -> None:
    """Runs; a user's mistake ends in one line and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", force=True)
    if len(argv) > 1:
        sys.exit(f"Unexpected argument {argv[1]!r}; see --help.")
    for flag in (_PROMPT, _OUTPUT):
        if not flag.value:
            sys.exit(f"--{flag.name} is missing; see --help.")
    try:
        run()
    except (ValueError, FileNotFoundError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main)
