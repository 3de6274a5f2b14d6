"""Sampling: the compiled loop against a diffusers pipeline with a transformer of equal parameters and tokens.

    python benchmarks/sampling.py                                       # CPU, float32
    python benchmarks/sampling.py --width=128 --layers=2 --steps=5       # quick

Theirs is `FluxPipeline` with single-stream blocks only (like ours, one sequence of condition and latents) and a conditional and
an unconditional pass a step; ours the loop of `UniFusion.sample`, with its feed-forward width set so that the parameters are as
many. Both start from condition tokens and noise and end with latents: 30 Euler steps, guidance on. Random weights, all of them
non-zero. Fresh processes, ours and theirs in turn; prints one JSON object on one line:

    throughput_ratio   their time / ours; goal 1.2 on a CPU
    chunked_ratio      our time with the host waiting after every step / our time in one loop: what the host costs
    parameters         of both transformers

Ours runs the unconditional pass with its one null token instead of as many as the condition has. That is part of what is
compared; `--condition_tokens` says how many there are.
"""

import argparse
import time
from typing import Any

import processes
from processes import in_turn, machine, measure

CHANNELS = 64


def _config(width: int, layers: int, ffn_size: int) -> Any:
    from unifusion_jax.conditioning import ConditioningConfig
    from unifusion_jax.dit import DiTConfig
    from unifusion_jax.model import ModelConfig

    conditioning = ConditioningConfig(lap_blocks=1, lap_heads=1, refiner_blocks=0)
    return ModelConfig(1, 64, conditioning, DiTConfig(CHANNELS, layers, width, width // 64, ffn_size))


def _dit_parameters(config: Any) -> int:
    import jax

    from unifusion_jax.exported import abstract_params

    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)["dit"]))


def ours(
    width: int, layers: int, side: int, condition_tokens: int, batch: int, steps: int, repeats: int, parameters: int
) -> dict[str, Any]:
    """Runs the compiled loop, in one stretch and in single steps."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from unifusion_jax import sampler
    from unifusion_jax.encoders import LayerStates
    from unifusion_jax.exported import abstract_params
    from unifusion_jax.flow import SamplingConfig

    one, two = (_dit_parameters(_config(width, layers, ffn)) for ffn in (width, 2 * width))
    config = _config(width, layers, max(16, round(width * (1 + (parameters - one) / (two - one)))))

    @jax.jit
    def initialise(key: jax.Array) -> Any:
        shapes, tree = jax.tree.flatten(abstract_params(config))
        keys = jax.random.split(key, len(shapes))
        return tree.unflatten([0.02 * jax.random.normal(k, s.shape) for k, s in zip(keys, shapes, strict=True)])

    params = initialise(jax.random.key(0))
    rng = np.random.default_rng(0)
    states = LayerStates(
        rng.normal(size=(batch, condition_tokens, 1, 64)).astype(np.float32),
        np.ones((batch, condition_tokens), bool),
        np.zeros((batch, condition_tokens), bool),
    )
    keys = jnp.stack([jax.random.key(row) for row in range(batch)])
    sampling = SamplingConfig(steps, guidance=4.0)

    def draw(chunk: int) -> Any:
        latents, conditions = sampler.begin(params, (states,), keys, model=config, cells=(side, side))
        for start in range(0, steps, chunk):
            latents = jax.block_until_ready(
                sampler.denoise(params, latents, conditions, sampling, start, min(start + chunk, steps), model=config)
            )
        return latents

    found = {}
    for name, chunk in (("time_s", steps), ("chunked_s", 1)):
        times_s = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            draw(chunk)
            times_s.append(time.perf_counter() - start)
        found[name] = min(times_s[1:])
        found.setdefault("compile_s", times_s[0] - found[name])
    return {**found, "parameters": _dit_parameters(config), "ffn_size": config.dit.ffn_size}


def _flux(width: int, layers: int) -> Any:
    import diffusers

    return diffusers.FluxTransformer2DModel(  # pyright: ignore[reportAttributeAccessIssue]
        in_channels=CHANNELS, num_layers=0, num_single_layers=layers, attention_head_dim=64,
        num_attention_heads=width // 64, joint_attention_dim=width, pooled_projection_dim=64, guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


def theirs(
    width: int, layers: int, side: int, condition_tokens: int, batch: int, steps: int, repeats: int
) -> dict[str, Any]:
    """Runs the pipeline without its text encoders and autoencoder."""
    import diffusers
    import torch

    torch.manual_seed(0)
    transformer = _flux(width, layers).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(std=0.02)
    pipeline = diffusers.FluxPipeline(  # pyright: ignore[reportAttributeAccessIssue]
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),  # pyright: ignore[reportAttributeAccessIssue]
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    condition = {
        "prompt_embeds": torch.randn(batch, condition_tokens, width),
        "pooled_prompt_embeds": torch.randn(batch, 64),
    }
    negative = {f"negative_{name}": torch.zeros_like(value) for name, value in condition.items()}
    latents = torch.randn(batch, side * side, CHANNELS)
    times_s = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        pipeline(
            **condition, **negative, true_cfg_scale=4.0, height=16 * side, width=16 * side, num_inference_steps=steps,
            latents=latents.clone(), output_type="latent",
        )  # fmt: skip
        times_s.append(time.perf_counter() - start)
    return {"time_s": min(times_s[1:]), "parameters": transformer.num_parameters()}


def count(width: int, layers: int) -> dict[str, Any]:
    """Counts the parameters of their transformer."""
    return {"parameters": _flux(width, layers).num_parameters()}


TASKS = {"ours": ours, "theirs": theirs, "count": count}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures both sides and returns what is printed."""
    size = {"width": arguments.width, "layers": arguments.layers}
    names = ("side", "condition_tokens", "batch", "steps", "repeats")
    case = size | {name: getattr(arguments, name) for name in names}
    wanted = measure(__file__, "count", size)
    runs = in_turn(__file__, {"ours": case | wanted, "theirs": case}, arguments.rounds)
    seconds = {side: min(run["time_s"] for run in found) for side, found in runs.items()}
    return {
        "benchmark": "sampling",
        **case,
        "machine": machine(),
        "throughput_ratio": round(seconds["theirs"] / seconds["ours"], 3),
        "chunked_ratio": round(min(run["chunked_s"] for run in runs["ours"]) / seconds["ours"], 3),
        "parameters": {side: found[0]["parameters"] for side, found in runs.items()},
        "time_s": {side: round(value, 3) for side, value in seconds.items()},
        "compile_s": round(min(run["compile_s"] for run in runs["ours"]), 2),
    }


def main() -> None:
    """Parses the command line and prints the result."""
    parser = processes.option_parser(__doc__)
    parser.add_argument("--width", type=int, default=512, help="of both transformers, a multiple of 64 (default 512)")
    parser.add_argument("--layers", type=int, default=8, help="blocks of both (default 8)")
    parser.add_argument("--side", type=int, default=16, help="latent tokens along a side of the picture (default 16)")
    parser.add_argument("--condition_tokens", type=int, default=64, help="of each prompt (default 64)")
    parser.add_argument("--batch", type=int, default=2, help="pictures (default 2)")
    parser.add_argument("--steps", type=int, default=30, help="Euler steps (default 30)")
    processes.main(parser, TASKS, compare, repeats=2)


if __name__ == "__main__":
    main()
