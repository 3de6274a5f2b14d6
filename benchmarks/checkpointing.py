"""Saving and restoring a run's state, against copying a file of the same size.

    python benchmarks/checkpointing.py --folder=/where/checkpoints/go
    python benchmarks/checkpointing.py --gb=0.01                                     # quick

The state is random numbers (nothing to compress) in the shapes of the trainer's: parameters, their average, two moments. A fresh
process saves it with the trainer's own class and restores it; another copies a file of the same bytes, both to the same disk and
flushed to it. Prints one JSON object on one line:

    stall_s              how long a save holds the training up: the copy to the host's memory and starting the writers
    copy_s               that copy alone; goal: the stall is longer by less than 5 % of a step
    save_gb_per_s        until the checkpoint is complete
    restore_gb_per_s     from the page cache
    *_ratio              the same over that of the file copy, or of reading that file
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import processes
from processes import in_turn, machine


def ours(folder: str, gb: float, repeats: int) -> dict[str, Any]:
    """Saves and restores with `training.checkpoints`."""
    import jax
    import numpy as np

    from unifusion_jax.training.checkpoints import Checkpoints
    from unifusion_jax.training.state import TrainState

    shape = (16, 1024, max(1, round(gb * 1e9 / 4 / 4 / 16 / 1024)))
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def part() -> dict[str, jax.Array]:
        return {"kernel": jax.random.normal(next(keys), shape)}

    state = TrainState(jax.numpy.int32(0), part(), part(), (part(), part()), {})
    jax.block_until_ready(state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    start = time.perf_counter()
    jax.tree.map(lambda leaf: np.array(leaf), state)
    copy_s = time.perf_counter() - start
    stall_s, save_s, restore_s = [], [], []
    for number in range(repeats + 1):
        workdir = Path(folder) / f"run_{number}"
        checkpoints = Checkpoints(workdir)
        start = time.perf_counter()
        checkpoints.save(1, state, {})
        stall_s.append(time.perf_counter() - start)
        checkpoints.close()
        os.sync()
        save_s.append(time.perf_counter() - start)
        checkpoints = Checkpoints(workdir, read_only=True)
        start = time.perf_counter()
        jax.block_until_ready(checkpoints.restore(state))
        restore_s.append(time.perf_counter() - start)
        shutil.rmtree(workdir)
    return {"bytes": size, "copy_s": copy_s} | {
        name: min(times[1:]) for name, times in (("stall_s", stall_s), ("save_s", save_s), ("restore_s", restore_s))
    }


def plain(folder: str, gb: float, repeats: int) -> dict[str, Any]:
    """Copies a file, and reads it."""
    source, target = Path(folder) / "source", Path(folder) / "target"
    with source.open("wb") as file:
        for _ in range(max(1, round(gb * 1000))):
            file.write(os.urandom(1_000_000))
    os.sync()
    copy_s, read_s = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        shutil.copyfile(source, target)
        os.sync()
        copy_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        target.read_bytes()
        read_s.append(time.perf_counter() - start)
    size = source.stat().st_size
    source.unlink()
    target.unlink()
    return {"bytes": size, "save_s": min(copy_s[1:]), "restore_s": min(read_s[1:])}


TASKS = {"ours": ours, "plain": plain}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures both and returns what is printed."""
    folder = tempfile.mkdtemp(prefix="unifusion-checkpoints-", dir=arguments.folder)
    case = {"folder": folder, "gb": arguments.gb, "repeats": arguments.repeats}
    try:
        runs = in_turn(__file__, {"ours": case, "plain": case}, arguments.rounds)
    finally:
        shutil.rmtree(folder)

    def rate(side: str, what: str) -> float:
        return max(run["bytes"] / run[what] / 1e9 for run in runs[side])

    rates = {name: rate("ours", f"{name}_s") for name in ("save", "restore")}
    return {
        "benchmark": "checkpointing",
        "bytes": runs["ours"][0]["bytes"],
        "machine": machine(),
        **{name: round(min(run[name] for run in runs["ours"]), 4) for name in ("stall_s", "copy_s")},
        **{f"{name}_gb_per_s": round(found, 3) for name, found in rates.items()},
        **{f"{name}_ratio": round(found / rate("plain", f"{name}_s"), 3) for name, found in rates.items()},
    }


def main() -> None:
    """Parses the command line and prints the result."""
    parser = processes.option_parser(__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the state in 1e9 bytes (default 1)")
    parser.add_argument("--folder", help="disk to write to (default: the system's temporary folder)")
    processes.main(parser, TASKS, compare, repeats=2)


if __name__ == "__main__":
    main()
