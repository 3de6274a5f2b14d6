"""Loading time and memory: an encoder of a given size from safetensors shards, against a plain read of the same files.

    python benchmarks/loading.py

Writes an InternVL model with random weights to a temporary folder, then alternates fresh processes that either read its files
into memory or load it with `encoders.load`, both from a warm page cache. Prints one JSON object on one line:

    peak_over_bytes   (peak memory of loading - peak memory of importing) / the parameters' own bytes; goal 1.2
    time_ratio        fastest load / fastest read; goal 1.5
    cpu_ratio         the same of processor time, all threads and the kernel: steadier on a shared machine
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import processes
from processes import in_turn, machine, measure, peak_bytes


def make_model(folder: str, size_bytes: int, width: int, stored: str, shards: int) -> dict[str, Any]:
    """Writes an InternVL model of about `size_bytes` in `shards` files; its decoder has the proportions of Qwen2.5-1.5B."""
    import torch
    import transformers

    vocabulary, ffn, heads = 16 * width, 35 * width // 6, width // 128
    layer = 2 * width * width + 2 * width * 256 + 3 * width * ffn
    item = getattr(torch, stored).itemsize
    layers = max(1, round((size_bytes / item - 2 * vocabulary * width) / layer))
    config = transformers.InternVLConfig(
        vision_config={
            "image_size": [32, 32], "patch_size": [8, 8], "hidden_size": 64, "num_attention_heads": 2,
            "num_hidden_layers": 2, "intermediate_size": 128, "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": ffn,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 128,
            "tie_word_embeddings": False,
        },
        tie_word_embeddings=False, image_seq_length=4,
    )  # fmt: skip
    torch.set_default_dtype(getattr(torch, stored))
    model = transformers.InternVLForConditionalGeneration(config)
    size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=-(-size // shards))
    return {"layers": layers}


def only_import() -> dict[str, Any]:
    """Imports what loading imports."""
    import unifusion_jax.encoders  # noqa: F401

    return {"peak_bytes": peak_bytes()}


def plain_read(folder: str) -> dict[str, Any]:
    """Reads all files into memory."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    start, cpu = time.perf_counter(), time.process_time()
    held = [path.read_bytes() for path in paths]
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return {"time_s": seconds, "cpu_s": cpu_s, "files": len(held), "bytes": sum(map(len, held))}


def load(folder: str, dtype: str, quantize: Literal["none", "int8"], profile: bool) -> dict[str, Any]:
    """Loads the encoder onto the default device."""
    import cProfile
    import pstats
    import sys

    import jax

    from unifusion_jax import encoders

    jax.devices()
    profiler = cProfile.Profile()
    start, cpu = time.perf_counter(), time.process_time()
    if profile:
        profiler.enable()
    encoder = encoders.load(folder, dtype=dtype, quantize=quantize)
    jax.block_until_ready(encoder.params)
    if profile:
        profiler.disable()
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumulative").print_stats(40)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(encoder.params))
    return {"time_s": seconds, "cpu_s": cpu_s, "peak_bytes": peak_bytes(), "bytes": held}


TASKS = {"make": make_model, "import": only_import, "read": plain_read, "load": load}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternates reading and loading, and returns what is printed."""
    if arguments.folder:
        return _compare(arguments, arguments.folder)
    with tempfile.TemporaryDirectory(prefix="unifusion-loading-") as folder:
        return _compare(arguments, folder)


def _compare(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    made = {
        "folder": folder,
        "size_bytes": int(arguments.gb * 1e9),
        "width": arguments.width,
        "stored": arguments.stored,
    }
    if not (Path(folder) / "config.json").exists():
        measure(__file__, "make", {**made, "shards": arguments.shards})
    base = measure(__file__, "import", {})["peak_bytes"]
    measure(__file__, "read", {"folder": folder})  # warms the page cache
    settings = {"folder": folder, "dtype": arguments.dtype, "quantize": arguments.quantize, "profile": False}
    reads, loads = in_turn(__file__, {"read": {"folder": folder}, "load": settings}, arguments.repeats).values()
    if arguments.profile:
        measure(__file__, "load", settings | {"profile": True}, verbose=True)

    def least(runs: list[dict[str, Any]], key: str) -> float:
        return min(run[key] for run in runs)

    return {
        "benchmark": "loading",
        "file_bytes": reads[0]["bytes"],
        "files": reads[0]["files"],
        "stored": arguments.stored,
        "dtype": arguments.dtype,
        "quantize": arguments.quantize,
        "peak_over_bytes": round((max(run["peak_bytes"] for run in loads) - base) / loads[0]["bytes"], 3),
        "time_ratio": round(least(loads, "time_s") / least(reads, "time_s"), 3),
        "cpu_ratio": round(least(loads, "cpu_s") / least(reads, "cpu_s"), 3),
        "read_s": [round(run["time_s"], 3) for run in reads],
        "load_s": [round(run["time_s"], 3) for run in loads],
        "read_cpu_s": [round(run["cpu_s"], 3) for run in reads],
        "load_cpu_s": [round(run["cpu_s"], 3) for run in loads],
        "import_peak_bytes": base,
        "machine": machine(),
    }


def main() -> None:
    """Parses the command line and prints the result."""
    parser = processes.option_parser(__doc__)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the model's files in 1e9 bytes (default 2)")
    parser.add_argument("--shards", type=int, default=5, help="files the model is cut into (default 5)")
    parser.add_argument(
        "--width", type=int, default=1536, help="width of the decoder, a multiple of 256 (default 1536)"
    )
    parser.add_argument("--stored", default="bfloat16", choices=["bfloat16", "float32"], help="type in the files")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="type to load into")
    parser.add_argument("--quantize", default="none", choices=["none", "int8"], help="also quantise while loading")
    parser.add_argument("--profile", action="store_true", help="afterwards load once under cProfile, printed to stderr")
    parser.add_argument(
        "--folder", help="an encoder's folder, or where one is written and left; temporary if not given"
    )
    processes.main(parser, TASKS, compare, repeats=5, rounds=None)


if __name__ == "__main__":
    main()
