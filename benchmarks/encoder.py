"""Exporting layer states: `Encoder.export` against transformers on torch with `output_hidden_states`.

    python benchmarks/encoder.py                       # CPU, float32, text and pictures
    python benchmarks/encoder.py --dtype=bfloat16 --device=gpu

Writes an InternVL model (Qwen2 decoder, random weights) to a temporary folder. Then fresh processes, ours and theirs in turn,
load it, run a batch and return the states of every third layer. Prints one JSON object on one line. For each case ("text":
rows of words; "image": tiles and words):

    throughput_ratio   their fastest step / our fastest step; goal 1.2 on a CPU
    memory_ratio       our working memory / theirs: the peak while running less what is held between steps; goal 0.7
    peak_ratio         the same of the whole process (on a GPU: of the device), weights included
    error              largest difference of the states / rms of the layer, worst layer

Both sides use all cores. Theirs calls the model without its output head, with torch's fused attention. Theirs runs every
block; ours ends with the last exported one, which is part of what is compared.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import processes
from processes import HostMemory, in_turn, jax_platforms, machine, measure

IMAGE_TOKEN = 5


def make_model(folder: str, width: int, layers: int, tile_px: int, vocabulary: int) -> dict[str, Any]:
    """Writes the model: tower and decoder of one width and depth, heads of 64 (4 query heads share a key-value head)."""
    import torch
    import transformers

    heads = width // 64
    config = transformers.InternVLConfig(
        vision_config={
            "image_size": [tile_px, tile_px], "patch_size": [14, 14], "hidden_size": width, "num_attention_heads": heads,
            "num_hidden_layers": layers, "intermediate_size": 4 * width, "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
            "tie_word_embeddings": True,
        },
        image_token_id=IMAGE_TOKEN, image_seq_length=(tile_px // 28) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(config)
    model.save_pretrained(folder)
    return {"parameters": model.num_parameters()}


def make_batch(rows: int, tiles: int, text_tokens: int, tile_px: int, vocabulary: int) -> dict[str, Any]:
    """Returns random ids [B, S], which of them are image tokens, and tiles [B, T, h, w, 3] or None."""
    import numpy as np

    rng = np.random.default_rng(0)
    image_tokens = tiles * (tile_px // 28) ** 2
    token_ids = rng.integers(IMAGE_TOKEN + 1, vocabulary, (rows, image_tokens + text_tokens), dtype=np.int32)
    token_ids[:, :image_tokens] = IMAGE_TOKEN
    pixels = rng.normal(size=(rows, tiles, tile_px, tile_px, 3)).astype(np.float32) if tiles else None
    return {"token_ids": token_ids, "is_image": token_ids == IMAGE_TOKEN, "pixels": pixels}


def ours(folder: str, batch: dict[str, Any], dtype: str, device: str, repeats: int, states: str) -> dict[str, Any]:
    """Runs `Encoder.export`."""
    import dataclasses

    import jax
    import numpy as np

    from unifusion_jax import encoders

    encoder = encoders.load(folder, dtype=dtype)
    jax.block_until_ready(encoder.params)
    arrays = make_batch(**batch)
    inputs = encoders.EncoderBatch.from_tokens(arrays["token_ids"])
    if arrays["pixels"] is not None:
        inputs = dataclasses.replace(inputs, is_image=arrays["is_image"], pixels=arrays["pixels"])
    memory = _GpuMemory(jax.devices()[0]) if device == "gpu" else HostMemory()
    result, seconds = _run(lambda: jax.block_until_ready(encoder.export(inputs).states), repeats, memory)
    np.save(states, np.asarray(result, np.float32))
    return {"time_s": seconds, "layers": list(encoder.layers), "platform": jax.default_backend(), **memory.report()}


def theirs(folder: str, batch: dict[str, Any], dtype: str, device: str, repeats: int, states: str) -> dict[str, Any]:
    """Runs transformers and stacks the same layers."""
    import numpy as np
    import torch
    import transformers

    from unifusion_jax.encoders import default_layers

    model: Any = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    place = "cuda" if device == "gpu" else "cpu"
    model = model.model.eval().to(place)
    sum(
        float(parameter.sum()) for parameter in model.parameters()
    )  # what is mapped from the file is memory from here on
    layers = default_layers(model.config.text_config.num_hidden_layers)
    arrays = make_batch(**batch)
    inputs = {"input_ids": torch.tensor(arrays["token_ids"]).long().to(place)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if arrays["pixels"] is not None:
        tiles = torch.tensor(arrays["pixels"]).flatten(0, 1).permute(0, 3, 1, 2)
        inputs["pixel_values"] = tiles.to(place, getattr(torch, dtype))

    def step() -> Any:
        with torch.inference_mode():
            hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            result = torch.stack([hidden[layer] for layer in layers], dim=2)
            if device == "gpu":
                torch.cuda.synchronize()
            return result

    memory = _CudaMemory() if device == "gpu" else HostMemory()
    result, seconds = _run(step, repeats, memory)
    np.save(states, result.float().cpu().numpy())
    return {"time_s": seconds, "layers": list(layers), **memory.report()}


def _run(step: Any, repeats: int, memory: Any) -> tuple[Any, float]:
    """Runs once to warm up (and compile), then `repeats` times; returns the last result and the fastest time."""
    step()
    memory.restart()
    best, result = float("inf"), None
    for _ in range(repeats):
        del result
        start = time.perf_counter()
        result = step()
        best = min(best, time.perf_counter() - start)
    memory.stop()
    return result, best


class _GpuMemory:
    """The same of a device, as XLA counts it."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.idle = self.peak = 0

    def restart(self) -> None:
        """XLA's peak cannot be forgotten; loading and compiling hold less than running does."""
        self.idle = self.device.memory_stats()["bytes_in_use"]

    def stop(self) -> None:
        self.peak = self.device.memory_stats()["peak_bytes_in_use"]

    def report(self) -> dict[str, int]:
        return {"idle_bytes": self.idle, "running_bytes": self.peak, "peak_bytes": self.peak}


class _CudaMemory:
    """The same of a device, as torch counts it."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda
        self.idle = self.peak = 0

    def restart(self) -> None:
        self.idle = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()

    def stop(self) -> None:
        self.peak = self.cuda.max_memory_allocated()

    def report(self) -> dict[str, int]:
        return {"idle_bytes": self.idle, "running_bytes": self.peak, "peak_bytes": self.peak}


def error(first: str, second: str) -> dict[str, Any]:
    """Compares the states that two processes wrote."""
    import numpy as np

    a, b = np.load(first), np.load(second)
    if a.shape != b.shape:
        raise ValueError(f"The two sides gave states of shapes {a.shape} and {b.shape}.")
    worst = [
        float(np.abs(a[:, :, n] - b[:, :, n]).max() / np.sqrt(np.square(b[:, :, n]).mean())) for n in range(a.shape[2])
    ]
    return {"error": max(worst)}


TASKS = {"make": make_model, "ours": ours, "theirs": theirs, "error": error}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures both cases and returns what is printed."""
    size = {"tile_px": arguments.tile_px, "vocabulary": arguments.vocabulary}
    shapes = {
        "text": {"rows": arguments.batch, "tiles": 0, "text_tokens": arguments.text_tokens, **size},
        "image": {
            "rows": arguments.image_batch, "tiles": arguments.tiles, "text_tokens": arguments.image_text_tokens, **size,
        },
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="unifusion-encoder-") as folder:
        model = {"folder": folder, "width": arguments.width, "layers": arguments.layers, **size}
        result: dict[str, Any] = {"benchmark": "encoder", **measure(__file__, "make", model)}
        result |= {"width": arguments.width, "layers": arguments.layers, "dtype": arguments.dtype}
        result |= {"device": arguments.device, "machine": machine()}
        return result | {case: _case(arguments, Path(folder), shapes[case]) for case in arguments.case or shapes}


def _case(arguments: argparse.Namespace, folder: Path, shape: dict[str, int]) -> dict[str, Any]:
    common = {
        "folder": str(folder), "batch": shape, "dtype": arguments.dtype, "device": arguments.device,
        "repeats": arguments.repeats,
    }  # fmt: skip
    settings = {side: common | {"states": str(folder / f"{side}.npy")} for side in ("ours", "theirs")}
    runs = in_turn(__file__, settings, arguments.rounds, platforms=jax_platforms(arguments.device))
    seconds = {side: min(run["time_s"] for run in found) for side, found in runs.items()}
    working = {side: min(run["running_bytes"] - run["idle_bytes"] for run in found) for side, found in runs.items()}
    peak = {side: min(run["peak_bytes"] for run in found) for side, found in runs.items()}
    tokens = shape["rows"] * (shape["text_tokens"] + shape["tiles"] * (shape["tile_px"] // 28) ** 2)
    return {
        "tokens": tokens,
        "exported_layers": runs["ours"][0]["layers"],
        "throughput_ratio": round(seconds["theirs"] / seconds["ours"], 3),
        "memory_ratio": round(working["ours"] / max(1, working["theirs"]), 3),
        "peak_ratio": round(peak["ours"] / peak["theirs"], 3),
        **measure(__file__, "error", {"first": str(folder / "ours.npy"), "second": str(folder / "theirs.npy")}),
        "tokens_per_s": {side: round(tokens / value, 1) for side, value in seconds.items()},
        "working_bytes": working,
        "peak_bytes": peak,
    }


def main() -> None:
    """Parses the command line and prints the result."""
    parser = processes.option_parser(__doc__)
    parser.add_argument(
        "--width", type=int, default=1024, help="width of tower and decoder, a multiple of 128 (default 1024)"
    )
    parser.add_argument("--layers", type=int, default=12, help="blocks of tower and of decoder (default 12)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding table (default 32000)")
    parser.add_argument("--batch", type=int, default=8, help="rows of the text case (default 8)")
    parser.add_argument("--text_tokens", type=int, default=512, help="tokens a row of the text case (default 512)")
    parser.add_argument("--image_batch", type=int, default=1, help="rows of the image case (default 1)")
    parser.add_argument("--tiles", type=int, default=5, help="tiles a row of the image case (default 5)")
    parser.add_argument("--image_text_tokens", type=int, default=128, help="its words after the tiles (default 128)")
    parser.add_argument("--tile_px", type=int, default=448, help="side of a tile, a multiple of 28 px (default 448)")
    parser.add_argument("--case", action="append", choices=["text", "image"], help="measure only this case; repeatable")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and states")
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"], help="where both sides run (default cpu)")
    processes.main(parser, TASKS, compare, repeats=5)


if __name__ == "__main__":
    main()
