"""What LAP costs: its share of a training step, and its attention over the layer axis every way. Prints JSON lines.

python benchmarks/lap.py              (FLOPs of the final config, and bytes of its compiled blocks; nothing is run)
python benchmarks/lap.py --run        (also times the attention both ways, forward and with its gradient)

Bytes are the compiler's own count, of one block, forward and backward, nothing recomputed. --topology=v5p-8 compiles for one
chip of a TPU that need not be here (see `unifusion_jax.plan`), with the kernels that it would use; on CPU the DiT's attention
writes its scores.
"""

import argparse
import json
import runpy
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unifusion_jax.config import from_mapping
from unifusion_jax.data.buckets import Budget
from unifusion_jax.dit.blocks import Block
from unifusion_jax.model import ModelConfig
from unifusion_jax.parallel import attention as kernels
from unifusion_jax.parallel.chips import described_devices
from unifusion_jax.parallel.target import FEW_TOKENS, compiling_for
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.flops import condition_flops, dit_flops, lap_flops, refiner_flops

# How the layers of a token attend: settings of `compiling_for`. The kernel is for TPU, and does the block's QK-norm besides.
WAYS = {"matrix products": {"few_tokens": 0}, "elementwise": {"kernel": "xla", "few_tokens": FEW_TOKENS}}
TPU_WAYS = WAYS | {"kernel": {"kernel": "splash", "few_tokens": FEW_TOKENS}}


def flop_shares(config: TrainConfig, model: ModelConfig, latent_tokens: int) -> list[dict[str, float | str]]:
    """Returns LAP's and the refiner's shares of the FLOPs of a sample, for each task's condition length."""
    lap = model.conditioning.lap(model.num_layers, model.encoder_size)
    found = []
    for task, given in config.data.budgets.items():
        tokens = from_mapping(Budget, given).max_kept_tokens
        whole = condition_flops(model, tokens) + dit_flops(model, tokens, latent_tokens)
        found.append(
            {
                "task": task,
                "condition_tokens": tokens,
                "latent_tokens": latent_tokens,
                "tflop_forward": whole / 1e12,
                "lap_share": lap_flops(lap, tokens) / whole,
                "refiner_share": refiner_flops(model, tokens) / whole,
            }
        )
    return found


def block_bytes(width: int, heads: int, ffn_size: int, rows: int, tokens: int, mesh: Mesh) -> float:
    """Returns the bytes that a compiled block moves, forward and backward, in bfloat16."""
    block = nnx.eval_shape(
        lambda: Block(width, heads, ffn_size, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    graphdef, params = nnx.split(block, nnx.Param)
    x = jax.ShapeDtypeStruct((rows, tokens, width), jnp.bfloat16)
    place = NamedSharding(mesh, PartitionSpec())
    params, x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), (params, x))
    # Made here, so that each call is traced anew.
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(nnx.merge(graphdef, params)(x), dtype=jnp.float32), (0, 1)))
    return gradient.lower(params, x).compile().cost_analysis()["bytes accessed"]


def byte_shares(model: ModelConfig, condition_tokens: int, latent_tokens: int, mesh: Mesh) -> dict[str, float]:
    """Returns bytes in GB of a block of LAP, every way, of the refiner and of the DiT, for one sample on one device."""
    lap = model.conditioning.lap(model.num_layers, model.encoder_size)
    refiner, dit = model.conditioning.refiner(model.encoder_size, model.dit.hidden_size), model.dit
    found = {}
    ways = TPU_WAYS if mesh.devices.flat[0].platform == "tpu" else WAYS
    for way, settings in ways.items():
        with compiling_for(mesh, **settings):
            sizes = (lap.encoder_size, lap.num_heads, lap.ffn_size, condition_tokens, lap.num_layers)
            found[f"lap_block_gb, {way}"] = block_bytes(*sizes, mesh) / 1e9
    sizes = (refiner.hidden_size, refiner.num_heads, refiner.ffn_size, 1, condition_tokens)
    with compiling_for(mesh):
        found["refiner_block_gb"] = block_bytes(*sizes, mesh) / 1e9
        sizes = (dit.hidden_size, dit.num_heads, dit.ffn_size, 1, condition_tokens + latent_tokens)
        found["dit_block_gb"] = block_bytes(*sizes, mesh) / 1e9
    whole = dit.num_layers * found["dit_block_gb"] + refiner.num_blocks * found["refiner_block_gb"]
    for way in ways:
        part = lap.num_blocks * found[f"lap_block_gb, {way}"]
        found[f"lap_share, {way}"] = part / (part + whole)
    return found


def times(tokens: int, layers: int, heads: int, head_dim: int, repeats: int) -> dict[str, dict[str, float]]:
    """Returns the best times of the attention alone, in seconds; both ways must agree."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, (tokens, layers, heads, head_dim), jnp.float32) for key in keys]
    found, results = {}, []
    for way, settings in WAYS.items():
        with compiling_for(**settings):
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
    parser.add_argument("--bytes_tokens", type=int, default=512, help="condition tokens of the compiled blocks")
    parser.add_argument("--topology", default="local", help="TPU to compile for, e.g. v5p-8 (default: this machine)")
    parser.add_argument("--run", action="store_true", help="time the attention both ways")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of --run (default 512)")
    parser.add_argument("--layers", type=int, default=10, help="layers of --run (default 10)")
    parser.add_argument("--heads", type=int, default=28, help="heads of --run (default 28)")
    parser.add_argument("--head_dim", type=int, default=128, help="head dimension of --run (default 128)")
    parser.add_argument("--repeats", type=int, default=10, help="runs of which the best counts (default 10)")
    options = parser.parse_args()
    config = from_mapping(TrainConfig, runpy.run_path(options.config)["get_config"]())
    model, device = ModelConfig.final_8b(), str(jax.devices()[0])
    latent_tokens = (config.data.size_px // 16) ** 2  # 16x compression, patches of one cell
    for line in flop_shares(config, model, latent_tokens):
        print(json.dumps(line))
    mesh = Mesh(np.asarray(described_devices(options.topology)[:1]), ("data",))
    moved = byte_shares(model, options.bytes_tokens, latent_tokens, mesh)
    compiled_for = mesh.devices.flat[0].device_kind
    print(json.dumps({"condition_tokens": options.bytes_tokens, **moved, "compiled_for": compiled_for}))
    if options.run:
        sizes = (options.tokens, options.layers, options.heads, options.head_dim)
        print(json.dumps({"attention": times(*sizes, options.repeats), "sizes": sizes, "device": device}))


if __name__ == "__main__":
    main()
