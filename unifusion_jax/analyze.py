"""Looks inside a checkpoint: `python -m unifusion_jax.analyze --figure=pooling_weights --checkpoint=runs/demo --output=figures`.

Writes NAME.png and NAME.csv. Figures are the paper's: layer_similarity (6), pooling_weights (7, 20), qk_norms (18),
layer_dropout (8), tile_scaling (5), verifi_effect (19), refiner_effect. Needs `pip install 'unifusion_jax[analysis]'`.

With --run it draws what trainings logged (no checkpoint is needed):
`python -m unifusion_jax.analyze --run=runs/demo --run=runs/other --quantity=loss --output=figures`.

With --study it trains every strategy several times instead and writes a report, see docs/findings.md:
`python -m unifusion_jax.analyze --study=runs/study --output=docs`; started again, it goes on where it stopped.
"""

import logging
import sys
from pathlib import Path

from absl import app, flags

from unifusion_jax.prompt import DEFAULT_GUIDANCE

_FIGURES = (
    "layer_similarity",
    "pooling_weights",
    "qk_norms",
    "layer_dropout",
    "tile_scaling",
    "verifi_effect",
    "refiner_effect",
)
_FIGURE = flags.DEFINE_multi_enum("figure", [], _FIGURES, "What to look at; repeat the flag for several.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Exported folder or training workdir; the bundled demo if not given."
)
_OUTPUT = flags.DEFINE_string("output", "figures", "Folder to write to.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Prompt to look at; repeat the flag. Held-out ones of the built-in world if not given."
)
_IMAGE = flags.DEFINE_multi_string(
    "image", [], "Picture to reconstruct; repeat the flag. Held-out ones of the built-in world if not given."
)
_COUNT = flags.DEFINE_integer("count", 4, "Prompts or pictures of the built-in world, and prompts that are scored.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of noise and of the built-in world.")
_STEPS = flags.DEFINE_integer("steps", 20, "Solver steps.")
_GUIDANCE = flags.DEFINE_float("guidance", DEFAULT_GUIDANCE, "Classifier-free guidance scale; 1 is off.")
_RUN = flags.DEFINE_multi_string("run", [], "Training workdir whose metrics are drawn; repeat the flag to compare.")
_QUANTITY = flags.DEFINE_string("quantity", "loss", "What of metrics.jsonl --run draws.")
_STUDY = flags.DEFINE_string("study", None, "Folder of the micro-study's runs; made if missing, gone on with if not.")
_STUDY_STEPS = flags.DEFINE_integer("study_steps", 0, "Steps of each run of the study; its own number if 0.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm of the study.")


def run() -> None:
    """Makes the figures, the curves, or the study."""
    from unifusion_jax import images
    from unifusion_jax.analysis import FIGURES, Options
    from unifusion_jax.analysis.figure import check_drawing
    from unifusion_jax.analysis.losses import losses

    check_drawing()
    output = Path(_OUTPUT.value).expanduser()
    if _RUN.value:
        drawn = losses([Path(run).expanduser() for run in _RUN.value], _QUANTITY.value)
        print("Wrote {} and {}.".format(*drawn.write(output, _QUANTITY.value)))
        return
    if _STUDY.value:
        from unifusion_jax.analysis import study

        folder = Path(_STUDY.value).expanduser()
        report = study.run(folder, output, seeds=_SEEDS.value, steps=_STUDY_STEPS.value or study.STEPS)
        print(f"Wrote {report}.")
        return
    from unifusion_jax.pipeline import UniFusion

    options = Options(
        tuple(_PROMPT.value),
        tuple(images.load(file) for file in _IMAGE.value),
        _COUNT.value,
        _SEED.value,
        _STEPS.value,
        _GUIDANCE.value,
    )
    model = UniFusion.load(_CHECKPOINT.value)
    for name in _FIGURE.value:
        picture, table = FIGURES[name](model, options).write(output, name)
        print(f"Wrote {picture} and {table}.")


def main(argv: list[str]) -> None:
    """Runs; a user's mistake ends in one line and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", force=True)
    if len(argv) > 1:
        sys.exit(f"Unexpected argument {argv[1]!r}; see --help.")
    if sum(map(bool, (_FIGURE.value, _RUN.value, _STUDY.value))) != 1:
        sys.exit(f"Give --figure (one of {', '.join(_FIGURES)}), --run or --study, one of the three; see --help.")
    try:
        run()
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main)
