"""Generates or edits pictures: `python -m unifusion_jax.sample --prompt="a large red circle" --output=out.png`.

With --image the prompt is an instruction for that picture; --image can be given several times. --mode has further uses: a
variation or a reconstruction of a picture, or an edit by a model that was never trained on edits. Without --checkpoint the
demo model that comes with the package is used.

The encoder first rewrites the prompt into a description (VERIFI), which is printed. Change it and pass it back by --target, or
leave it out by --norewrite. All settings are stored in the file; `python -m unifusion_jax.sample --show=out.png` prints them.
"""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from unifusion_jax import compile_cache
from unifusion_jax.prompt import DEFAULT_GUIDANCE

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Exported folder or training workdir; by default the bundled demo."
)
_IMAGE = flags.DEFINE_multi_string("image", [], "Reference picture; repeat the flag for several.")
_OUTPUT = flags.DEFINE_string("output", "", "PNG, JPEG or WebP file to write; with --count, out-0.png, out-1.png, ...")
_SIZE = flags.DEFINE_string("size", None, "Side in pixels, or WIDTHxHEIGHT; the training size if not given.")
_GUIDANCE_INTERVAL = flags.DEFINE_list("guidance_interval", ["0", "1"], "Times LOW,HIGH between which guidance acts.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Most pictures at a time; --count beyond it takes turns.")
_COMPILE_CACHE = flags.DEFINE_string("compile_cache", compile_cache.AUTO, compile_cache.HELP)
_SHOW = flags.DEFINE_string("show", None, "Print the settings stored in a picture, and do nothing else.")
# These are fields of `request.Request` as they are.
_FIELDS = (
    flags.DEFINE_string("prompt", "", "What to draw, or how to change the picture given by --image."),
    flags.DEFINE_string(
        "mode",
        "auto",
        "auto, text_to_image, edit, compose, joint, variation, reconstruct or zero_shot_edit; auto goes by the pictures.",
    ),
    flags.DEFINE_string("target", None, "Description to condition on, in place of the encoder's own."),
    flags.DEFINE_bool(
        "rewrite", None, "Let the encoder describe the picture first (VERIFI); as the model was trained if not given."
    ),
    flags.DEFINE_string("system_prompt", None, "System message in place of the task's own."),
    flags.DEFINE_integer("tiles", None, "Most tiles that a reference picture is cut into, as 1, 5 or 10."),
    flags.DEFINE_integer("max_new_tokens", None, "Longest description, in tokens."),
    flags.DEFINE_float("temperature", 0.0, "Of the description's decoding; 0 takes the likeliest words."),
    flags.DEFINE_float("top_p", 1.0, "Draw its words from the likeliest ones that have this probability together."),
    flags.DEFINE_integer("rewrite_seed", 0, "Seed of its decoding."),
    flags.DEFINE_integer("count", 1, "Pictures to make, from seeds SEED, SEED + 1, ..."),
    flags.DEFINE_integer("seed", 0, "Seed of the initial noise."),
    flags.DEFINE_integer("steps", 30, "Solver steps."),
    flags.DEFINE_float("guidance", DEFAULT_GUIDANCE, "Classifier-free guidance scale; 1 is off."),
    flags.DEFINE_enum("solver", "euler", ["euler", "heun"], "Euler, or Heun's second-order method."),
    flags.DEFINE_float("switch", 0.15, "Share of the steps under the picture in --mode=zero_shot_edit."),
)


def files_of(output: str, count: int) -> list[Path]:
    """Returns the files to write: `output` itself for one picture, else out-0.png, out-1.png, ... beside each other."""
    path = Path(output)
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def run() -> None:
    """Loads the model, generates and writes the files."""
    import tqdm

    from unifusion_jax import images
    from unifusion_jax.pipeline import UniFusion
    from unifusion_jax.request import Request, parse_size

    compile_cache.enable(_COMPILE_CACHE.value)
    low, high = (float(bound) for bound in _GUIDANCE_INTERVAL.value)
    images.check_output(_OUTPUT.value)
    fields: dict[str, Any] = {flag.name: flag.value for flag in _FIELDS}
    request = Request(
        images=[images.load(file) for file in _IMAGE.value],
        size=parse_size(_SIZE.value),
        guidance_interval=(low, high),
        **fields,
    )
    model = UniFusion.load(_CHECKPOINT.value)
    condition = request.condition(model)
    if condition.prompts[0].target:
        print(f"Description: {condition.texts[0]}", flush=True)
    # A bar where somebody watches it; elsewhere the host does not wait for the device before the end.
    watched = sys.stderr.isatty()
    made = None
    with tqdm.tqdm(unit="step", disable=not watched) as bar:
        chunk_steps = math.ceil(request.steps / 10) if watched else request.steps
        for progress in request.sample_in_chunks(model, condition, chunk_steps, _BATCH_SIZE.value):
            bar.total, made = progress.total_steps, progress.images
            bar.update(progress.steps - bar.n)
    for number, (file, image) in enumerate(zip(files_of(_OUTPUT.value, request.count), made or [], strict=True)):
        settings = {"checkpoint": _CHECKPOINT.value, "image": _IMAGE.value, **request.settings(condition, number)}
        images.save(image, file, settings=settings)
        print(f"Wrote {file} ({image.width}x{image.height} px).")


def main(argv: list[str]) -> None:
    """Runs; a user's mistake ends in one line and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", force=True)
    if len(argv) > 1:
        sys.exit(f"Unexpected argument {argv[1]!r}; see --help.")
    try:
        if _SHOW.value is not None:
            from unifusion_jax import images

            print(json.dumps(images.read_settings(_SHOW.value), indent=2, ensure_ascii=False))
        elif not _OUTPUT.value:
            sys.exit(f"--{_OUTPUT.name} is missing; see --help.")
        else:
            run()
    except (ValueError, FileNotFoundError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main)
