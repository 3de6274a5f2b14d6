"""Attention as this project computes it against `jax.nn.dot_product_attention`, same inputs, same process.

Prints one JSON line. `python benchmarks/attention.py [--batch 64 --tokens 84 --heads 5 --head_dim 32]`
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unifusion_jax.parallel.attention import attention


def seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 10) -> float:
    """Median wall time of a compiled call."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def main() -> None:
    """Times forward and gradient of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("batch", 64), ("tokens", 84), ("heads", 5), ("head_dim", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    shape = (options.batch, options.tokens, options.heads, options.head_dim)
    query, key, value = jax.random.normal(jax.random.key(0), (3, *shape))
    mask = jnp.ones(shape[:2], bool)

    def ours(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention(query, key, value, kv_mask=mask)

    def peer(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])

    def gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
        return jax.grad(lambda *arguments: jnp.sum(function(*arguments) ** 2), argnums=(0, 1, 2))

    forward = [seconds(function, query, key, value) for function in (ours, peer)]
    backward = [seconds(gradient(function), query, key, value) for function in (ours, peer)]
    print(
        json.dumps(
            {
                "benchmark": "attention",
                "shape": shape,
                "device": jax.devices()[0].device_kind,
                "forward_ms": [round(1e3 * value, 2) for value in forward],
                "gradient_ms": [round(1e3 * value, 2) for value in backward],
                "forward_ratio": round(forward[1] / forward[0], 2),
                "gradient_ratio": round(backward[1] / backward[0], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
