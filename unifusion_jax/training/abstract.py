"""A training run without data, weights or devices: shapes and shardings of everything one step takes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from unifusion_jax import autoencoders, encoders
from unifusion_jax.autoencoders import Autoencoder, AutoencoderKLConfig
from unifusion_jax.autoencoders.autoencoder import abstract_autoencoder
from unifusion_jax.config import from_mapping
from unifusion_jax.data.buckets import Bucket, Buckets, Budget
from unifusion_jax.encoders import Encoder, EncoderBatch, InternVLConfig
from unifusion_jax.encoders.encoder import abstract_model
from unifusion_jax.encoders.quantization import quantizer
from unifusion_jax.frozen import selection_of
from unifusion_jax.parallel.mesh import make_mesh
from unifusion_jax.parallel.sharding import AnyMesh, batch_sharding, param_shardings
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.objective import FlowMatching
from unifusion_jax.training.program import make_program
from unifusion_jax.training.state import TrainState

# Sizes of published networks, so that a plan needs no download. Other names are read from their config.json.
_ENCODERS = {
    "OpenGVLab/InternVL3-1B": InternVLConfig.internvl3_1b,
    "OpenGVLab/InternVL3-2B": InternVLConfig.internvl3_2b,
    "OpenGVLab/InternVL3-8B": InternVLConfig.internvl3_8b,
}
_AUTOENCODERS = {"black-forest-labs/FLUX.2-dev": AutoencoderKLConfig.flux2}


def abstract_objective(config: TrainConfig, mesh: AnyMesh, tasks: Sequence[str]) -> FlowMatching:
    """Returns what a run of the model trains, with shapes and shardings in the place of the frozen weights."""
    chosen = config.encoder
    sizes = _ENCODERS[chosen.path]() if chosen.path in _ENCODERS else encoders.read_config(chosen.path)
    model = abstract_model(sizes, chosen.dtype)
    selection = selection_of(config, sizes)
    encoder = Encoder(
        sizes,
        _quantized(_placed(model, mesh), quantizer(model, chosen.quantize)),
        _no_processor,
        layers=selection.layers,
        form=selection.form,
    )
    path = config.autoencoder.path
    latents = _AUTOENCODERS[path]() if path in _AUTOENCODERS else autoencoders.read_config(path)
    network = abstract_autoencoder(latents, jnp.dtype(config.autoencoder.dtype))
    autoencoder = Autoencoder(latents, _placed(network, mesh), dtype=config.autoencoder.dtype)
    return FlowMatching(config, mesh, encoder, autoencoder, tasks)


def _no_processor() -> Any:
    raise ValueError("A plan reads no prompts.")


def _placed(module: nnx.Module, mesh: AnyMesh) -> Any:
    shapes = nnx.to_pure_dict(nnx.state(module))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        param_shardings(module, mesh),
    )


def _quantized(params: Any, finish: Any) -> Any:
    if finish is None:
        return params

    def keep(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        made = jax.eval_shape(lambda value: finish(".".join(key.key for key in path), value), leaf)
        return jax.tree.map(lambda part: _like(part, leaf), made)

    return jax.tree_util.tree_map_with_path(keep, params)


def _like(part: jax.ShapeDtypeStruct, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Places what a leaf became: of its shape as the leaf was, scales of its channels by the channels alone."""
    sharding: Any = leaf.sharding
    spec = [*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec))]
    spec = [entry if size == whole else None for entry, size, whole in zip(spec, part.shape, leaf.shape, strict=True)]
    placed = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=placed)


def buckets_of(config: TrainConfig, multiple_of_px: int) -> list[Bucket]:
    """Returns the square bucket of each task that the sources name (of each with a budget, where they name none)."""
    named = {task for source in config.data.sources for key in ("tasks", "derive") for task in source.get(key) or {}}
    budgets = {
        task: from_mapping(Budget, given, f"config.data.budgets.{task}") for task, given in config.data.budgets.items()
    }
    missing = sorted(named - set(budgets))
    if missing or not budgets:
        raise ValueError(
            f"config.data.budgets has no budget for {missing or 'any task'}: a step has no shape without it."
        )
    size = config.data.size_px
    chosen = Buckets(budgets, area_px=size * size, multiple_of_px=multiple_of_px, max_aspect=1.0)
    return [chosen.assign(task, size, size) for task in sorted(named or budgets)]


def heaviest(buckets: Sequence[Bucket]) -> Bucket:
    """Returns the bucket whose step takes the most memory: the most condition tokens, then the longest prompts."""
    return max(buckets, key=lambda bucket: (bucket.max_kept_tokens, bucket.max_tokens, bucket.max_tiles))


def abstract_batch(objective: FlowMatching, bucket: Bucket) -> dict[str, Any]:
    """Returns the shapes of a global batch of a bucket, spread over the mesh."""
    rows, length, sharding = objective.config.batch_size, bucket.max_tokens, batch_sharding(objective.mesh)
    ways = math.prod(objective.mesh.shape[axis] for axis in sharding.spec[0])
    if rows % (ways * objective.config.accumulate_steps):
        raise ValueError(
            f"batch_size={rows} is not divisible by {ways} devices (mesh axes {sharding.spec[0]}) times accumulate_steps="
            f"{objective.config.accumulate_steps}."
        )

    def leaf(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    vision = getattr(objective.encoder.config, "vision", None)
    side = getattr(vision, "image_px", None)
    if bucket.max_tiles and side is None:
        raise ValueError(
            f"The tiles of {objective.config.encoder.path} have no fixed size in its configuration; plan a task without "
            "pictures, e.g. --task=text_to_image."
        )
    marks = [leaf(np.bool_, length) for _ in range(3)]
    prompt = EncoderBatch(
        leaf(np.int32, length),
        *marks,
        pixels=leaf(np.float32, bucket.max_tiles, side, side, 3) if bucket.max_tiles and side else None,
        is_target=leaf(np.bool_, length),
    )
    return {"image": leaf(np.uint8, bucket.height_px, bucket.width_px, 3), "prompt": prompt}


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step with the shapes it is compiled for."""

    objective: FlowMatching
    bucket: Bucket
    state: TrainState
    batch: Any
    function: Any

    def lower(self) -> Any:
        """Traces the step."""
        return self.function.lower(self.state, self.objective.frozen, self.batch, self.objective.static(self.bucket))


def abstract_step(config: TrainConfig, devices: Sequence[jax.Device], task: str = "") -> Step:
    """Prepares the step of a task, of the heaviest by default. Raises ValueError where the config cannot run."""
    if config.task != "unifusion":
        raise ValueError(f"Only runs of the model are planned, got task={config.task!r}.")
    mesh = make_mesh(config.mesh, devices)
    fresh = dataclasses.replace(config, init_from="")  # what a run starts from changes no shape
    objective = abstract_objective(fresh, mesh, sorted(config.data.budgets))
    buckets = buckets_of(config, objective.autoencoder.downsample * config.dit.patch_size)
    if task and task not in {bucket.task for bucket in buckets}:
        raise ValueError(f"task={task!r} is none of this config's: {', '.join(bucket.task for bucket in buckets)}.")
    bucket = heaviest([bucket for bucket in buckets if not task or bucket.task == task])
    program = make_program(objective, fresh, mesh)
    return Step(objective, bucket, program.placed(), abstract_batch(objective, bucket), program.step)


def sharding_table(config: TrainConfig) -> str:
    """Returns a line for each parameter, trained and frozen: its name, shape and partition over `config.mesh`.

    Raises ValueError where a parameter cannot be split, and for a mesh whose sizes are not all given.
    """
    if -1 in config.mesh.sizes:
        raise ValueError(
            f"Give every size of the mesh, got {dataclasses.asdict(config.mesh)}: there are no devices here."
        )
    mesh = AbstractMesh(config.mesh.sizes, config.mesh.axis_names)
    objective = abstract_objective(dataclasses.replace(config, init_from=""), mesh, ())
    params = jax.eval_shape(objective.init, jax.random.key(0))
    trained = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), params, objective.param_shardings
    )
    lines = [f"mesh {dict(zip(config.mesh.axis_names, config.mesh.sizes, strict=True))}"]
    for part, tree in {"trained": trained, **objective.frozen}.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = ".".join([part, *(str(getattr(key, "key", key)) for key in path)])
            lines.append(f"{name} {leaf.dtype}{list(leaf.shape)} {tuple(leaf.sharding.spec)}")
    return "\n".join(lines)
