"""What LAP costs: its share of a training step, and its attention over the layer axis both ways. Prints JSON lines.

python benchmarks/lap.py                      (FLOPs and compiled bytes of the final config; nothing is run at that size)
python benchmarks/lap.py --run                (also times both ways at --tokens of --width, forward and backward)
"""

import argparse
import functools
import json
import runpy
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unifusion_jax.conditioning import LAP, LAPConfig
from unifusion_jax.config import from_mapping
from unifusion_jax.data.buckets import Budget
from unifusion_jax.model import ModelConfig
from unifusion_jax.parallel import attention as kernels
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.flops import condition_flops, dit_flops, lap_flops, refiner_flops

WAYS = {"matrix products": 0, "elementwise": kernels.FEW_TOKENS}


def shares(config: TrainConfig, model: ModelConfig, latent_tokens: int) -> None:
    """Prints the FLOPs of LAP and refiner as shares of a sample's forward pass, for each task's condition length."""
    lap = model.conditioning.lap(model.num_layers, model.encoder_size)
    for task, given in config.data.budgets.items():
        tokens = from_mapping(Budget, given).max_kept_tokens
        whole = condition_flops(model, tokens) + dit_flops(model, tokens, latent_tokens)
        print(
            json.dumps(
                {
                    "task": task,
                    "condition_tokens": tokens,
                    "latent_tokens": latent_tokens,
                    "tflop_forward": whole / 1e12,
                    "lap_share": lap_flops(lap, tokens) / whole,
                    "refiner_share": refiner_flops(model, tokens) / whole,
                }
            )
        )


def compiled_bytes(config: LAPConfig, tokens: int) -> dict[str, float]:
    """Returns bytes that the compiled LAP reads and writes, forward and backward, by this backend's own count."""
    abstract = nnx.eval_shape(lambda: LAP(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)
    states = jax.ShapeDtypeStruct((1, tokens, config.num_layers, config.encoder_size), jnp.bfloat16)

    def loss(params, states):
        return jnp.sum(nnx.merge(graphdef, params)(states).astype(jnp.float32))

    found = {}
    for way, limit in WAYS.items():
        with mock.patch.object(kernels, "FEW_TOKENS", limit):
            # A new function each time: jit would hand out the program of the other way.
            gradient = jax.jit(jax.grad(functools.partial(loss)))
            cost = gradient.lower(params, states).compile().cost_analysis()
        found[way] = cost["bytes accessed"]
    return found


def times(tokens: int, layers: int, heads: int, head_dim: int, repeats: int) -> dict[str, dict[str, float]]:
    """Returns the best times of the attention alone, forward and with its gradient, in seconds; both ways must agree."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, (tokens, layers, heads, head_dim), jnp.float32) for key in keys]
    found, results = {}, []
    for way, limit in WAYS.items():
        with mock.patch.object(kernels, "FEW_TOKENS", limit):
            forward = jax.jit(lambda *parts: kernels.attention(*parts))
            both = jax.jit(jax.grad(lambda *parts: jnp.sum(jnp.square(kernels.attention(*parts))), argnums=(0, 1, 2)))
            results.append((forward(*inputs), *both(*inputs)))
            found[way] = {"forward_s": _best(forward, inputs, repeats), "gradient_s": _best(both, inputs, repeats)}
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    return found


def _best(function, inputs, repeats: int) -> float:
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        spent.append(time.perf_counter() - started)
    return min(spent)


def main() -> None:
    """Prints what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/final.py", help="config file whose budgets are counted")
    parser.add_argument("--bytes_tokens", type=int, default=512, help="tokens for the compiled bytes (default 512)")
    parser.add_argument("--run", action="store_true", help="time the attention both ways")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of --run (default 512)")
    parser.add_argument("--layers", type=int, default=10, help="layers of --run (default 10)")
    parser.add_argument("--heads", type=int, default=28, help="heads of --run (default 28)")
    parser.add_argument("--head_dim", type=int, default=128, help="head dimension of --run (default 128)")
    parser.add_argument("--repeats", type=int, default=10, help="runs of which the best counts (default 10)")
    options = parser.parse_args()
    config = from_mapping(TrainConfig, runpy.run_path(options.config)["get_config"]())
    model = ModelConfig.final_8b()
    # 16x compression and patches of one cell.
    shares(config, model, (config.data.size_px // 16) ** 2)
    lap = model.conditioning.lap(model.num_layers, model.encoder_size)
    device = str(jax.devices()[0])
    moved = compiled_bytes(lap, options.bytes_tokens)
    print(json.dumps({"lap_bytes": moved, "tokens": options.bytes_tokens, "device": device}))
    if options.run:
        sizes = (options.tokens, options.layers, options.heads, options.head_dim)
        print(json.dumps({"attention": times(*sizes, options.repeats), "sizes": sizes, "device": device}))


if __name__ == "__main__":
    main()
