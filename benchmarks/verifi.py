"""VERIFI in one pass against decoding first and encoding the finished text again, both with this project's encoder.

    python benchmarks/verifi.py
    python benchmarks/verifi.py --width=128 --layers=4 --rows=2         # quick

An InternVL model with random weights gets prompts with a picture each and decodes descriptions. Fresh processes, in turn:

    single   `Encoder.rewrite`: the states come from the pass that decodes
    again    decodes (the states of one layer only, as none can be left out), then `Encoder.export` of prompt and answer

Prints one JSON object on one line:

    time_ratio     time of "again" / time of "single"
    memory_ratio   working memory of "again" / that of "single": the peak while running less what is held between runs
    error          largest difference of the states / rms of the layer, worst layer
"""

import argparse
import dataclasses
import functools
import tempfile
import time
from typing import Any

import processes
from processes import HostMemory, in_turn, machine, measure


def _encoder(width: int, layers: int, tile_px: int, vocabulary: int) -> Any:
    from unifusion_jax.encoders import Encoder, InternVLConfig, train_tokenizer
    from unifusion_jax.encoders.decoder_config import DecoderConfig
    from unifusion_jax.encoders.vision import VisionConfig

    heads = width // 64
    vision = VisionConfig(tile_px, 14, width // 2, max(1, layers // 2), max(1, heads // 2), 2 * width)
    decoder = DecoderConfig(vocabulary, width, layers, heads, max(1, heads // 4), 64, 4 * width, max_positions=4096)
    tokenizer = train_tokenizer(["describe the picture in detail"], 400)
    return Encoder.create(InternVLConfig(vision, decoder), tokenizer, seed=0)


def _prompts(rows: int, tile_px: int) -> list[Any]:
    import numpy as np
    import PIL.Image

    from unifusion_jax import Prompt

    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(rows)]
    return [
        Prompt(f"describe picture {row}", [PIL.Image.fromarray(pixels).resize((2 * tile_px, 2 * tile_px))], target="")
        for row, pixels in enumerate(coarse)
    ]


def run(
    mode: str, size: dict[str, int], rows: int, new_tokens: int, tiles: int, repeats: int, states: str
) -> dict[str, Any]:
    """Runs one of the two ways and keeps its states."""
    import jax
    import numpy as np

    from unifusion_jax.encoders import Encoder

    encoder = _encoder(**size)
    prompts = _prompts(rows, size["tile_px"])
    short = Encoder(encoder.config, encoder.params, encoder.processor, layers=encoder.layers[:1])

    def single() -> Any:
        return encoder.rewrite(prompts, max_new_tokens=new_tokens, max_tiles=tiles).states

    def again() -> Any:
        answers = short.rewrite(prompts, max_new_tokens=new_tokens, max_tiles=tiles).token_ids
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            row = encoder.processor.prepare_row(prompt, max_tiles=tiles)
            marks = {"is_image": False, "keep": True, "is_target": True}
            more = {name: np.append(getattr(row, name), np.full(len(answer), value)) for name, value in marks.items()}
            ids = np.append(row.token_ids, answer).astype(np.int32)
            found.append(dataclasses.replace(row, token_ids=ids, **more))
        return encoder.export(encoder.processor.collate(found))

    step = {"single": single, "again": again}[mode]
    jax.block_until_ready(step())
    memory = HostMemory()
    memory.restart()
    best, result = float("inf"), None
    for _ in range(repeats):
        del result
        start = time.perf_counter()
        result = jax.block_until_ready(step())
        best = min(best, time.perf_counter() - start)
    memory.stop()
    np.savez(states, states=np.asarray(result.states, np.float32), mask=np.asarray(result.mask))
    return {"time_s": best, "tokens": int(np.asarray(result.mask).sum()), **memory.report()}


def error(first: str, second: str) -> dict[str, Any]:
    """Compares the states that two processes kept."""
    import numpy as np

    a, b = np.load(first), np.load(second)
    if not np.array_equal(a["mask"], b["mask"]):
        raise ValueError("The two ways kept other tokens.")
    ours, theirs = (x["states"][x["mask"]] for x in (a, b))
    scale = np.sqrt(np.square(theirs).mean(axis=(0, 2)))
    return {"error": float((np.abs(ours - theirs).max(axis=(0, 2)) / scale).max())}


TASKS = {**{mode: functools.partial(run, mode) for mode in ("single", "again")}, "error": error}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures both ways and returns what is printed."""
    size = {name: getattr(arguments, name) for name in ("width", "layers", "tile_px", "vocabulary")}
    common = {
        "size": size, "rows": arguments.rows, "new_tokens": arguments.new_tokens, "tiles": arguments.tiles,
        "repeats": arguments.repeats,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="unifusion-verifi-") as folder:
        states = {mode: f"{folder}/{mode}.npz" for mode in ("single", "again")}
        runs = in_turn(__file__, {mode: common | {"states": file} for mode, file in states.items()}, arguments.rounds)
        difference = measure(__file__, "error", {"first": states["single"], "second": states["again"]})
    seconds = {mode: min(run["time_s"] for run in found) for mode, found in runs.items()}
    working = {mode: min(run["running_bytes"] - run["idle_bytes"] for run in found) for mode, found in runs.items()}
    return {
        "benchmark": "verifi",
        **size,
        "rows": arguments.rows,
        "new_tokens": arguments.new_tokens,
        "tokens": runs["single"][0]["tokens"],
        "machine": machine(),
        "time_ratio": round(seconds["again"] / seconds["single"], 3),
        "memory_ratio": round(working["again"] / max(1, working["single"]), 3),
        **difference,
        "time_s": {mode: round(value, 3) for mode, value in seconds.items()},
        "working_bytes": working,
        "peak_bytes": {mode: min(run["peak_bytes"] for run in found) for mode, found in runs.items()},
    }


def main() -> None:
    """Parses the command line and prints the result."""
    parser = processes.option_parser(__doc__)
    parser.add_argument("--width", type=int, default=1024, help="of the decoder, a multiple of 128 (default 1024)")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the decoder (default 12)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding table (default 32000)")
    parser.add_argument("--tile_px", type=int, default=224, help="side of a tile, a multiple of 28 px (default 224)")
    parser.add_argument("--tiles", type=int, default=4, help="bound of a picture's tile grid (default 4)")
    parser.add_argument("--rows", type=int, default=8, help="prompts (default 8)")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens to decode (default 128)")
    processes.main(parser, TASKS, compare, repeats=3)


if __name__ == "__main__":
    main()
