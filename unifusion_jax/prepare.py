"""Turns captioned images into record shards to train on.

    python -m unifusion_jax.prepare --input=my_images --output=my_records

The input is a folder of images with one or more .jsonl files, a folder (or glob) of WebDataset .tar files, or of
Parquet files (pip install 'unifusion_jax[parquet]'). A line of metadata.jsonl is

    {"file_name": "cat.png", "text": "a cat on a chair"}
    {"file_name": "red.png", "source_file_name": "blue.png", "instruction": "make the cat red", "text": "a red cat"}

the second kind being an edit; a list of source files makes a multi-reference example. Files that are missing, empty,
corrupt, too large or no images are skipped and listed in OUTPUT/report.json; more than --max_skipped_share of them stop
the job (exit status 1). What is written stays, and the same command goes on from there (--overwrite starts anew).

Then train with a data source {"name": "records", "path": "my_records"}.
"""

import argparse
import sys
from collections.abc import Sequence

from unifusion_jax.data import images, preparation


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 only when the data set is complete."""
    options = _parser().parse_args(arguments)
    try:
        rename = dict(pair.split("=", 1) for pair in options.rename)
    except ValueError:
        print(f"prepare: --rename takes OLD=NEW, got {' '.join(options.rename)}", file=sys.stderr)
        return 1
    try:
        settings = preparation.Settings(**{**vars(options), "rename": rename})
        outcome = preparation.prepare(settings)
    except (ValueError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    print(outcome.summary())
    if outcome.stopped:
        print(f"prepare: stopped: {outcome.stopped}", file=sys.stderr)
        return 1
    print("nothing was written (--dry_run)" if settings.dry_run else f"the data set is in {settings.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unifusion_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", required=True, metavar="DIR_OR_GLOB", help="folder, file or glob to read (quote a glob)")
    add("--output", required=True, metavar="DIR", help="folder of the new data set")
    add("--shards", type=int, default=0, help="number of files; default one for every 2048 entries")
    add("--max_skipped_share", type=float, default=0.05, help="stop above this share of broken entries (default 0.05)")
    add(
        "--task",
        choices=("text_to_image", "reconstruction", "joint"),
        help="task of entries that name none and have no source images (default text_to_image)",
    )
    add(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="read key OLD of the metadata as NEW, as --rename caption=text; may be repeated",
    )
    add("--min_side_px", type=int, default=0, help="leave out images with a shorter side (they do not count as broken)")
    add("--max_pixels", type=int, default=images.MAX_PIXELS, help="skip images with more pixels (default %(default)s)")
    add("--threads", type=int, default=8, help="images decoded side by side (default 8)")
    add("--dry_run", action="store_true", help="check everything, write nothing")
    add("--overwrite", action="store_true", help="replace a data set that is already in --output")
    return parser


if __name__ == "__main__":
    sys.exit(main())
