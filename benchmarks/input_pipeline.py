"""Images per second and core of the input pipeline, against reading the same files with nothing but PIL.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --images=24 --size_px=128 --batch=4          # quick

Writes pictures as JPEG files and as a prepared data set, then reads both from a warm page cache in one thread, in turn. PIL
opens, decodes and resizes a picture and makes an array of it; ours makes whole training batches: shuffled records, decoding,
fitting to the bucket, and (with `rows`) the prompt's tokens by the demo encoder's processor. Prints one JSON object on one
line:

    images_ratio   our images per second, without prompts / PIL's
    rows_ratio     the same with prompts
"""

import argparse
import functools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import processes
from processes import in_turn, machine, measure


def make(folder: str, images: int, size_px: int) -> dict[str, Any]:
    """Writes the pictures, larger than they are used by a quarter, as photographs are."""
    import io

    import numpy as np
    import PIL.Image

    from unifusion_jax.data import Record, write_records

    rng = np.random.default_rng(0)
    side = size_px * 5 // 4
    items = []
    for number in range(images):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
        picture, stored = coarse.resize((side, side), PIL.Image.Resampling.BICUBIC), io.BytesIO()
        picture.save(stored, "JPEG", quality=90)
        (Path(folder) / f"{number:06d}.jpg").write_bytes(stored.getvalue())
        words = "a plain picture of soft colours, number " + str(number)
        items.append(Record(f"{number:06d}", "text_to_image", words, words, stored.getvalue()))
    write_records(items, Path(folder) / "records", shards=2)
    return {"bytes": sum(file.stat().st_size for file in Path(folder).glob("*.jpg"))}


def pil(folder: str, size_px: int, images: int, repeats: int) -> dict[str, Any]:
    """Decodes and resizes every file."""
    import numpy as np
    import PIL.Image

    files = sorted(Path(folder).glob("*.jpg"))
    times_s = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for file in files:
            with PIL.Image.open(file) as picture:
                np.asarray(picture.convert("RGB").resize((size_px, size_px), PIL.Image.Resampling.BICUBIC))
        times_s.append(time.perf_counter() - start)
    return {"images_per_s": images / min(times_s[1:])}


def _picture(record: Any, bucket: Any) -> Any:
    return record.image


def _stack(rows: Any, bucket: Any) -> Any:
    import numpy as np

    return np.stack(rows)


def ours(folder: str, size_px: int, images: int, batch: int, repeats: int, prompts: bool) -> dict[str, Any]:
    """Goes through the batches of one pass."""
    from unifusion_jax.data import Buckets, Budget, make_batches, make_mixture

    build, collate = _picture, _stack
    if prompts:
        from unifusion_jax import encoders
        from unifusion_jax.training.config import EncoderRef
        from unifusion_jax.training.tasks import unifusion

        processor = encoders.load("bundled:demo/encoder").processor
        asked = EncoderRef(system_prompts="short")
        build = functools.partial(unifusion._build_row, processor=processor, asked=asked, tiles_per_image=1)
        collate = functools.partial(unifusion._collate, processor=processor)
    budget = Budget(max_tokens=256, max_tiles=0, max_kept_tokens=128)
    buckets = Buckets({"text_to_image": budget}, area_px=size_px * size_px, multiple_of_px=16, max_aspect=1.0)
    mixture = make_mixture([{"name": "records", "path": str(Path(folder) / "records")}], buckets)
    times_s = []
    for _ in range(repeats + 1):
        options: dict[str, Any] = {"build_row": build, "collate": collate, "read_threads": 1, "prefetch_batches": 1}
        with make_batches(mixture, batch_size=batch, seed=0, repeat=1, **options) as batches:
            start = time.perf_counter()
            read = sum(int(found.is_real.sum()) for found in batches)
            times_s.append(time.perf_counter() - start)
        if read != images:
            raise RuntimeError(f"read {read} of {images} images")
    return {"images_per_s": images / min(times_s[1:])}


def images_only(**settings: Any) -> dict[str, Any]:
    """Ours without prompts."""
    return ours(**settings, prompts=False)


def rows(**settings: Any) -> dict[str, Any]:
    """Ours with prompts."""
    return ours(**settings, prompts=True)


TASKS = {"make": make, "pil": pil, "images": images_only, "rows": rows}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures all and returns what is printed."""
    folder = tempfile.mkdtemp(prefix="unifusion-input-")
    try:
        made = {"folder": folder, "images": arguments.images, "size_px": arguments.size_px}
        written = measure(__file__, "make", made)
        case = made | {"repeats": arguments.repeats}
        batched = case | {"batch": arguments.batch}
        runs = in_turn(__file__, {"pil": case, "images": batched, "rows": batched}, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    rates = {side: max(run["images_per_s"] for run in found) for side, found in runs.items()}
    return {
        "benchmark": "input_pipeline",
        **{name: getattr(arguments, name) for name in ("images", "size_px", "batch")},
        "file_bytes": written["bytes"],
        "machine": machine(),
        "images_ratio": round(rates["images"] / rates["pil"], 3),
        "rows_ratio": round(rates["rows"] / rates["pil"], 3),
        "images_per_s": {side: round(rate, 1) for side, rate in rates.items()},
    }


def main() -> None:
    """Parses the command line and prints the result."""
    parser = processes.option_parser(__doc__)
    parser.add_argument("--images", type=int, default=512, help="pictures (default 512)")
    parser.add_argument("--size_px", type=int, default=512, help="side they are brought to (default 512)")
    parser.add_argument("--batch", type=int, default=16, help="pictures of a batch (default 16)")
    processes.main(parser, TASKS, compare, repeats=2)


if __name__ == "__main__":
    main()
