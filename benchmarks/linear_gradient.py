"""Forward and backward of a transformer's feed-forward stack: `layers.linear` against XLA's automatic gradient.

Prints one JSON line: the best time of each in milliseconds, and their ratio (above 1: `layers.linear` is faster).

    python benchmarks/linear_gradient.py
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
from flax import nnx

from unifusion_jax.layers import RMSNorm, Stack, linear


class FeedForward(nnx.Module):
    """A pre-norm SwiGLU block whose maps come from `make`."""

    def __init__(self, make, width: int, hidden: int, rngs: nnx.Rngs):
        self.norm = RMSNorm(width)
        self.gate, self.up, self.down = make(width, hidden, rngs), make(width, hidden, rngs), make(hidden, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds the block's output to x."""
        y = self.norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


def gradient_of(make, options: argparse.Namespace):
    """Returns a compiled gradient of the mean square of the stack's output, and its arguments."""
    stack = Stack(lambda rngs: FeedForward(make, options.width, options.hidden, rngs), options.depth, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(stack)
    x = jax.random.normal(jax.random.key(1), (options.batch, options.tokens, options.width))

    def loss(params, x):
        y, _ = nnx.merge(graphdef, params).scan(lambda block, y, _: (block(y), None), x)
        return jnp.mean(jnp.square(y))

    return jax.jit(jax.grad(loss, argnums=(0, 1))), (params, x)


def main() -> None:
    """Measures both in turns, so that a busy machine slows both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"batch": 32, "tokens": 112, "width": 128, "hidden": 320, "depth": 10, "repeats": 30}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    options = parser.parse_args()
    variants = {
        "layers_linear": lambda n, m, rngs: linear(n, m, ("embed", "mlp"), rngs=rngs),
        "nnx_linear": lambda n, m, rngs: nnx.Linear(n, m, use_bias=False, rngs=rngs),
    }
    compiled = {name: gradient_of(make, options) for name, make in variants.items()}
    best_ms = dict.fromkeys(variants, float("inf"))
    for repeat in range(options.repeats + 2):
        for name, (run, arguments) in compiled.items():
            started = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            if repeat >= 2:
                best_ms[name] = min(best_ms[name], 1e3 * (time.perf_counter() - started))
    print(
        json.dumps(
            best_ms | {"ratio": best_ms["nnx_linear"] / best_ms["layers_linear"], "device": str(jax.devices()[0])}
        )
    )


if __name__ == "__main__":
    main()
