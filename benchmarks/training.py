"""A training step: ours against a diffusers transformer of equal parameters and tokens under torch.

    python benchmarks/training.py                                                   # CPU, float32
    python benchmarks/training.py --device=gpu --width=2048 --layers=28 --side=64 --condition_tokens=512 --batch=8
    python benchmarks/training.py --width=64 --layers=2 --side=4 --condition_tokens=8 --steps=2       # quick

Both take a step of flow matching on latents that are there already: draw times and noise, forward and backward, clip the
gradient to norm 1, AdamW on float32 weights. Theirs is a Flux transformer with single-stream blocks only (like ours, one
sequence of condition and latents), on a GPU under bfloat16 autocast and torch.compile with the fused AdamW; ours is the
trainer's own step, with its feed-forward width set so that the parameters are as many. Fresh processes, ours and theirs in
turn; prints one JSON object on one line:

    throughput_ratio   their time / ours; goal 1.2 on a CPU, 1.15 on a GPU
    mfu                our model FLOPs (full S x S attention) over the device's peak; null where that is unknown; goal 0.5
    host_s             our time until the step is under way and Python goes on
"""

import argparse
import time
from typing import Any

import processes
from processes import in_turn, jax_platforms, machine, measure
from sampling import CHANNELS, config_of_size, flux


class Objective:
    """Flow matching of the DiT alone, as the trainer's step wants it."""

    frozen: tuple[()] = ()

    def __init__(self, config: Any, dtype: str, remat_name: str, mesh: Any):
        import jax.numpy as jnp
        from flax import nnx

        from unifusion_jax.dit import DiT
        from unifusion_jax.parallel.remat import remat
        from unifusion_jax.parallel.sharding import param_shardings

        self.metric_names: list[str] = []
        self._make = lambda rngs: DiT(config, dtype=jnp.dtype(dtype), rngs=rngs)
        abstract = nnx.eval_shape(lambda: self._make(nnx.Rngs(0)))
        self._graphdef, self.param_shardings = nnx.graphdef(abstract), param_shardings(abstract, mesh)
        self._remat = remat(remat_name)

    def init(self, key: Any) -> Any:
        """Makes random parameters."""
        from flax import nnx

        return nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key)), nnx.Param))

    def draw(self, batch: Any, key: Any, static: Any) -> Any:
        """The loss draws from the key."""
        return key

    def loss(self, params: Any, frozen: Any, batch: Any, key: Any, static: Any) -> Any:
        """Mean velocity error."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from unifusion_jax.dit import Condition
        from unifusion_jax.flow import flow_matching_loss

        model = nnx.merge(self._graphdef, params)
        latents, tokens = batch["latents"], batch["tokens"]
        condition = Condition(tokens, jnp.ones(tokens.shape[:2], bool))
        time_key, noise_key = jax.random.split(key)
        t = jax.nn.sigmoid(jax.random.normal(time_key, latents.shape[:1]))
        noise = jax.random.normal(noise_key, latents.shape)
        losses = flow_matching_loss(lambda x, t: model(x, t, condition, remat=self._remat), latents, noise, t)
        return losses.mean(), {}


def ours(
    width: int, layers: int, side: int, condition_tokens: int, batch: int, steps: int, repeats: int, parameters: int,
    dtype: str, remat: str,
) -> dict[str, Any]:  # fmt: skip
    """Takes steps of the trainer."""
    import jax

    from unifusion_jax.parallel.chips import peak_flops
    from unifusion_jax.parallel.host_memory import cpu_expected, keep_freed_blocks
    from unifusion_jax.parallel.mesh import MeshConfig, make_mesh
    from unifusion_jax.training.config import TrainConfig
    from unifusion_jax.training.flops import dit_flops
    from unifusion_jax.training.program import make_program

    if cpu_expected():
        keep_freed_blocks()
    model = config_of_size(width, layers, parameters)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config: Any = TrainConfig(ema_decay=0.0)
    objective: Any = Objective(model.dit, dtype, remat, mesh)
    program = make_program(objective, config, mesh)
    state = program.first_state(0)
    keys = jax.random.split(jax.random.key(1))
    data = {
        "latents": jax.random.normal(keys[0], (batch, side, side, CHANNELS)),
        "tokens": jax.random.normal(keys[1], (batch, condition_tokens, width)),
    }
    times_s, host_s = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(steps):
            called = time.perf_counter()
            state, _ = program.step(state, (), data, None)
            host_s.append(time.perf_counter() - called)
        jax.block_until_ready(state)
        times_s.append((time.perf_counter() - start) / steps)
    best, peak = min(times_s[1:]), peak_flops(jax.devices()[0])
    flops = 3 * batch * dit_flops(model, condition_tokens, side * side)
    return {
        "time_s": best,
        "host_s": sorted(host_s)[len(host_s) // 2],
        "compile_s": times_s[0] * steps - best * steps,
        "flops": flops,
        "mfu": flops / best / peak if peak else None,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "device": jax.devices()[0].device_kind,
    }


def theirs(
    width: int, layers: int, side: int, condition_tokens: int, batch: int, steps: int, repeats: int, device: str,
    compiled: bool,
) -> dict[str, Any]:  # fmt: skip
    """Takes steps of a plain torch loop."""
    import torch

    torch.manual_seed(0)
    place = torch.device("cuda" if device == "gpu" else "cpu")
    model: Any = flux(width, layers).to(place).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=device == "gpu")
    run = torch.compile(model) if compiled else model
    tokens = torch.randn(batch, condition_tokens, width, device=place)
    latents = torch.randn(batch, side * side, CHANNELS, device=place)
    pooled = torch.zeros(batch, 64, device=place)
    rows = torch.arange(side, device=place)
    image_ids = torch.zeros(side, side, 3, device=place)
    image_ids[..., 1], image_ids[..., 2] = rows[:, None], rows[None]
    ids = {"img_ids": image_ids.reshape(-1, 3), "txt_ids": torch.zeros(condition_tokens, 3, device=place)}

    def step() -> None:
        t = torch.sigmoid(torch.randn(batch, device=place))
        noise = torch.randn_like(latents)
        x = latents + t[:, None, None] * (noise - latents)
        with torch.autocast(place.type, torch.bfloat16, enabled=device == "gpu"):
            velocity = run(
                hidden_states=x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=t, **ids,
                return_dict=False,
            )[0]  # fmt: skip
        loss = torch.nn.functional.mse_loss(velocity.float(), noise - latents)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    times_s = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device == "gpu":
            torch.cuda.synchronize()
        times_s.append((time.perf_counter() - start) / steps)
    return {"time_s": min(times_s[1:]), "parameters": model.num_parameters()}


def count(width: int, layers: int) -> dict[str, Any]:
    """Counts the parameters of their transformer."""
    return {"parameters": flux(width, layers).num_parameters()}


TASKS = {"ours": ours, "theirs": theirs, "count": count}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures both sides and returns what is printed."""
    size = {"width": arguments.width, "layers": arguments.layers}
    names = ("side", "condition_tokens", "batch", "steps", "repeats")
    case = size | {name: getattr(arguments, name) for name in names}
    gpu = arguments.device == "gpu"
    mine = {"dtype": "bfloat16" if gpu else "float32", "remat": arguments.remat}
    settings = {
        "ours": case | mine | measure(__file__, "count", size),
        "theirs": case | {"device": arguments.device, "compiled": gpu or arguments.compile},
    }
    runs = in_turn(__file__, settings, arguments.rounds, platforms=jax_platforms(arguments.device))
    best = {side: min(found, key=lambda run: run["time_s"]) for side, found in runs.items()}
    return {
        "benchmark": "training",
        **case,
        "compiled_peer": settings["theirs"]["compiled"],
        "machine": machine() | {"device": best["ours"]["device"]},
        "throughput_ratio": round(best["theirs"]["time_s"] / best["ours"]["time_s"], 3),
        "mfu": best["ours"]["mfu"],
        "tflops": round(best["ours"]["flops"] / best["ours"]["time_s"] / 1e12, 3),
        "host_s": best["ours"]["host_s"],
        "parameters": {side: run["parameters"] for side, run in best.items()},
        "time_s": {side: round(run["time_s"], 4) for side, run in best.items()},
        "compile_s": round(best["ours"]["compile_s"], 2),
    }


def main() -> None:
    """Parses the command line and prints the result."""
    parser = processes.option_parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"], help="where both run (default cpu)")
    parser.add_argument("--width", type=int, default=512, help="of both transformers, a multiple of 64 (default 512)")
    parser.add_argument("--layers", type=int, default=8, help="blocks of both (default 8)")
    parser.add_argument("--side", type=int, default=16, help="latent tokens along a side of the picture (default 16)")
    parser.add_argument("--condition_tokens", type=int, default=64, help="of each picture (default 64)")
    parser.add_argument("--batch", type=int, default=4, help="pictures (default 4)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a measured run (default 5)")
    parser.add_argument("--remat", default="none", help="what our backward pass computes again (default none)")
    parser.add_argument("--compile", action="store_true", help="torch.compile their side on a CPU as well")
    processes.main(parser, TASKS, compare, repeats=3)


if __name__ == "__main__":
    main()
