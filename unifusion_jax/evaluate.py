"""Scores a model on a benchmark: `python -m unifusion_jax.evaluate --benchmark=shapes --checkpoint=runs/demo`.

    shapes           held-out prompts of the built-in world, read back by its detector
    shapes_verifi    the same with VERIFI, with the user's own words and with true descriptions, and what VERIFI gains
    shapes_edits     edits of one picture: does the edit show, and is the rest as it was
    shapes_compose   objects of two pictures brought together in one

Prints one JSON object: the scores and how they were made. --output also writes it to a file.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unifusion_jax import compile_cache, modes
from unifusion_jax.prompt import DEFAULT_GUIDANCE


def _benchmarks() -> dict[str, Callable[..., dict[str, float]]]:
    from unifusion_jax.evaluation import shapes

    return {
        "shapes": shapes.evaluate_prompts,
        "shapes_verifi": shapes.compare_verifi,
        "shapes_edits": shapes.evaluate_edits,
        "shapes_compose": shapes.evaluate_compositions,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    from unifusion_jax.data.shards import write_json
    from unifusion_jax.evaluation.shapes import Drawing
    from unifusion_jax.pipeline import UniFusion

    try:
        if options.count < 1:
            raise ValueError(f"--count must be at least 1, got {options.count}.")
        modes.find(options.mode)
        compile_cache.enable(options.compile_cache)
        names = [field.name for field in dataclasses.fields(Drawing)]
        drawing = Drawing(**{name: getattr(options, name) for name in names})
        model = UniFusion.load(options.checkpoint)
        pairs = options.pairs.split(",")
        scores = _benchmarks()[options.benchmark](model, drawing, count=options.count, pairs=pairs)
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {
        "benchmark": options.benchmark,
        "checkpoint": options.checkpoint,
        "count": options.count,
        **dataclasses.asdict(drawing),
        "scores": scores,
    }
    print(json.dumps(result))
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(options.output), result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unifusion_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = ("shapes", "shapes_verifi", "shapes_edits", "shapes_compose")
    add("--benchmark", required=True, choices=names, help="what to measure")
    add("--checkpoint", help="exported folder or training workdir; by default the bundled demo")
    add("--output", help="JSON file to write")
    add("--count", type=int, default=128, help="requests of each kind (default 128)")
    add("--pairs", default="seen,held_out", help="shape-colour pairs of the scenes (default seen,held_out)")
    add("--steps", type=int, default=30, help="solver steps (default 30)")
    add("--guidance", type=float, default=DEFAULT_GUIDANCE, help="guidance scale (default %(default)s)")
    add(
        "--text",
        choices=("trained", "verifi", "words", "truth"),
        default="trained",
        help="what conditions (default trained)",
    )
    add("--mode", default=modes.AUTO, help="mode, as zero_shot_edit for shapes_edits (default auto)")
    add("--tiles", type=int, help="most tiles of a reference picture")
    add("--batch_size", type=int, default=64, help="pictures at a time (default 64)")
    add("--seed", type=int, default=0, help="of requests and noise")
    add("--compile_cache", default=compile_cache.AUTO, help=compile_cache.HELP)
    return parser


if __name__ == "__main__":
    sys.exit(main())
