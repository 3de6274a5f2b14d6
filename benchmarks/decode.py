"""Decoding descriptions: `Encoder.rewrite` against `transformers.generate` on torch.

    python benchmarks/decode.py                                    # CPU, float32: a tiny model and one of width 1024
    python benchmarks/decode.py --model=large --dtype=bfloat16 --device=gpu

Writes Qwen2 models with random weights to a temporary folder. Then fresh processes, ours and theirs in turn, load one and
decode greedily: 8 prompts, 128 new tokens. Ours also makes the prompts from text and collects the states of every third layer
of all decoded tokens, which is what it is for; theirs gets token ids. Prints one JSON object on one line; for each model:

    throughput_ratio   our tokens a second / theirs; goal 2 on a CPU
    same_tokens        share of decoded tokens that are the same
    compile_s          our first call, less a later one
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import processes
from processes import in_turn, jax_platforms, machine, measure

SIZES = {
    "tiny": {"width": 128, "layers": 4, "vocabulary": 2000},
    "large": {"width": 1024, "layers": 12, "vocabulary": 32000},
}
WORDS = (
    "a red circle left of the small blue star on white with two large green squares above it and one ring below".split()
)


def prompts(rows: int, words: int) -> list[str]:
    """Returns different instructions of one number of words."""
    return [" ".join(WORDS[(row + 3 * index) % len(WORDS)] for index in range(words)) for row in range(rows)]


def make_model(folder: str, width: int, layers: int, vocabulary: int, rows: int, words: int) -> dict[str, Any]:
    """Writes the model, a tokenizer, and the prompts as token ids."""
    import numpy as np
    import torch
    import transformers

    from unifusion_jax import Prompt, encoders
    from unifusion_jax.encoders import train_tokenizer

    heads = width // 64
    tokenizer = train_tokenizer([" ".join(WORDS)], 400)
    config = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    batch = encoders.load(folder, dtype="float32").prepare([Prompt(text, target="") for text in prompts(rows, words)])
    np.savez(Path(folder) / "prompts.npz", token_ids=batch.token_ids, mask=batch.mask)
    return {"parameters": model.num_parameters()}


def ours(folder: str, rows: int, words: int, new_tokens: int, dtype: str, device: str, repeats: int) -> dict[str, Any]:
    """Runs `Encoder.rewrite`."""
    import jax

    from unifusion_jax import Prompt, encoders

    del device  # JAX_PLATFORMS says which
    encoder = encoders.load(folder, dtype=dtype)
    asked = [Prompt(text) for text in prompts(rows, words)]
    times_s, ids = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        ids = encoder.rewrite(asked, max_new_tokens=new_tokens).token_ids
        times_s.append(time.perf_counter() - start)
    best = min(times_s[1:])
    return {"time_s": best, "compile_s": times_s[0] - best, "token_ids": ids, "platform": jax.default_backend()}


def theirs(
    folder: str, rows: int, words: int, new_tokens: int, dtype: str, device: str, repeats: int
) -> dict[str, Any]:
    """Runs `generate`, with torch's fused attention and a key-value cache."""
    import numpy as np
    import torch
    import transformers

    del rows, words
    place = "cuda" if device == "gpu" else "cpu"
    model: Any = transformers.Qwen2ForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model = model.eval().to(place)
    saved = np.load(Path(folder) / "prompts.npz")
    ids, mask = saved["token_ids"], saved["mask"]
    longest = int(mask.sum(axis=1).max())
    padded = np.zeros((len(ids), longest), np.int64)  # generate wants the padding on the left
    for row, exists, place_of in zip(ids, mask, padded, strict=True):
        place_of[longest - exists.sum() :] = row[exists]
    left = np.arange(longest) >= longest - mask.sum(axis=1)[:, None]
    inputs = {"input_ids": torch.tensor(padded).to(place), "attention_mask": torch.tensor(left).long().to(place)}
    config = transformers.GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    times_s, out = [], None
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(**inputs, generation_config=config).cpu()
        times_s.append(time.perf_counter() - start)
    assert out is not None
    return {"time_s": min(times_s[1:]), "token_ids": out[:, longest:].tolist()}


TASKS = {"make": make_model, "ours": ours, "theirs": theirs}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures all models and returns what is printed."""
    result: dict[str, Any] = {"benchmark": "decode", "machine": machine(), "dtype": arguments.dtype}
    result |= {"batch": arguments.batch, "new_tokens": arguments.new_tokens, "device": arguments.device}
    for name in arguments.model or SIZES:
        with tempfile.TemporaryDirectory(prefix="unifusion-decode-") as folder:
            result[name] = _model(arguments, name, folder)
    return result


def _model(arguments: argparse.Namespace, name: str, folder: str) -> dict[str, Any]:
    size, case = SIZES[name], {"rows": arguments.batch, "words": arguments.prompt_words}
    made = measure(__file__, "make", {"folder": folder, **size, **case}, platform_name="cpu")
    settings = {
        "folder": folder, **case, "new_tokens": arguments.new_tokens, "dtype": arguments.dtype,
        "device": arguments.device, "repeats": arguments.repeats,
    }  # fmt: skip
    sides = {"ours": settings, "theirs": settings}
    runs = in_turn(__file__, sides, arguments.rounds, platforms=jax_platforms(arguments.device))
    seconds = {side: min(run["time_s"] for run in found) for side, found in runs.items()}
    ours_ids, their_ids = (runs[side][0]["token_ids"] for side in ("ours", "theirs"))
    lengths = [len(ids) for ids in ours_ids]
    if min(lengths) < arguments.new_tokens:
        raise RuntimeError(
            f"A row met a stop token after {min(lengths)} tokens; both sides must decode the same number."
        )
    same = [a == b for row, other in zip(ours_ids, their_ids, strict=True) for a, b in zip(row, other, strict=True)]
    tokens = arguments.batch * arguments.new_tokens
    return {
        **made,
        **size,
        "throughput_ratio": round(seconds["theirs"] / seconds["ours"], 3),
        "same_tokens": round(sum(same) / len(same), 4),
        "tokens_per_s": {side: round(tokens / value, 1) for side, value in seconds.items()},
        "compile_s": round(min(run["compile_s"] for run in runs["ours"]), 2),
    }


def main() -> None:
    """Parses the command line and prints the result."""
    parser = processes.option_parser(__doc__)
    parser.add_argument("--model", action="append", choices=sorted(SIZES), help="measure only this one; repeatable")
    parser.add_argument("--batch", type=int, default=8, help="prompts (default 8)")
    parser.add_argument("--prompt_words", type=int, default=48, help="words of a prompt (default 48)")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens to decode (default 128)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and states")
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"], help="where both sides run (default cpu)")
    processes.main(parser, TASKS, compare, repeats=3)


if __name__ == "__main__":
    main()
