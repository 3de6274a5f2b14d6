"""Writes target prompts for a prepared data set, as the encoder decodes them (VERIFI).

    python -m unifusion_jax.rewrite --encoder=OpenGVLab/InternVL3-8B --input=my_records --output=my_rewritten_records

Every record gets as its target the description that the encoder writes of its prompt and reference pictures, under the same
system prompt as when the model is used; with --see_picture it also looks at the picture that is to be drawn. Records that have
a description keep it (--replace writes a new one). Train on the new data set as on any other.

Several hosts share the work through a common file system: give each the same command with --hosts=N and its own --host=0 ...
N-1. A job that was stopped or killed goes on from its last whole shard when the command is repeated. What could not be used is
listed in OUTPUT/report.json; the exit status is 0 when this host's part is done.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from unifusion_jax import compile_cache


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = vars(_parser().parse_args(arguments))
    from unifusion_jax import encoders, rewriting

    names = [field.name for field in dataclasses.fields(rewriting.Settings)]
    try:
        compile_cache.enable(options["compile_cache"])
        settings = rewriting.Settings(**{name: options[name] for name in names})
        outcome = rewriting.rewrite_dataset(
            settings,
            lambda: encoders.load(
                options["encoder"], layers=[1], dtype=options["dtype"], quantize=options["quantize"], mesh=_mesh()
            ),
            encoder_name=options["encoder"],
        )
    except (ValueError, OSError) as error:
        print(f"rewrite: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rewrite: interrupted; the same command goes on from the last whole shard", file=sys.stderr)
        return 1
    print(outcome.summary())
    if outcome.stopped is not None:
        print(f"rewrite: stopped: {outcome.stopped}", file=sys.stderr)
        return 1
    if outcome.waiting:
        print(f"this host's part is done; {outcome.waiting} shards of other hosts are not")
    else:
        print(f"the data set is in {settings.output}")
    return 0


def _mesh() -> Any:
    """Returns a mesh of this host's devices, over which the rows of a batch are spread; None where there is one device."""
    import jax

    from unifusion_jax.parallel.mesh import make_mesh

    devices = jax.local_devices()
    return make_mesh(devices=devices) if len(devices) > 1 else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unifusion_jax.rewrite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--encoder", required=True, metavar="PATH", help="folder or hub id of the vision-language model")
    add("--input", required=True, metavar="DIR", help="a prepared data set")
    add("--output", required=True, metavar="DIR", help="folder of the new data set")
    add("--shards", type=int, default=0, help="number of files; default one for every 1024 records")
    add("--hosts", type=int, default=1, help="hosts that share the work (default 1)")
    add("--host", type=int, default=0, help="number of this host, from 0")
    add("--batch_size", type=int, default=16, help="prompts decoded together (default 16)")
    add("--max_new_tokens", type=int, default=256, help="longest description (default 256)")
    add("--max_tiles", type=int, help="bound of a picture's tile grid, thumbnail not counted (default: the encoder's)")
    add("--system_prompts", choices=("full", "short"), default="full", help="set of system prompts (default full)")
    add("--system_prompt", help="system message in their place")
    add("--see_picture", action="store_true", help="show the encoder the picture that is to be drawn")
    add("--replace", action="store_true", help="also rewrite records that have a description")
    add("--temperature", type=float, default=0.0, help="of decoding; 0 takes the likeliest words (default)")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest words of this probability together")
    add("--seed", type=int, default=0, help="of decoding")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the encoder (default bfloat16)")
    add("--quantize", choices=("none", "int8"), default="none", help="keep the encoder's matrices in 8 bits")
    add(
        "--max_skipped_share", type=float, default=0.05, help="stop above this share of unusable records (default 0.05)"
    )
    add("--overwrite", action="store_true", help="replace a data set that is already in --output")
    add("--compile_cache", default=compile_cache.AUTO, help=compile_cache.HELP)
    return parser


if __name__ == "__main__":
    sys.exit(main())
