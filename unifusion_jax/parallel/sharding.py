"""The one table from logical axis names to mesh axes, and the shardings of parameters, activations and batches that follow.

Mesh axes: "slice" and "data" replicate parameters, "fsdp" shards parameters and the batch, "tensor" shards heads and
feed-forward widths, "sequence" shards tokens.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from unifusion_jax.parallel import target

# An abstract mesh has sizes but no devices: enough to say where things would lie.
AnyMesh = Mesh | AbstractMesh

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("slice", "data", "fsdp"),
    "rows": ("slice", "data", "fsdp", "sequence"),  # tokens of all samples, where each is worked on alone
    "length": "sequence",
    "embed": "fsdp",
    "embed_out": None,
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "conv_out": "fsdp",
    "conv_in": None,
    "layers": None,
    "norm": None,
    "pool": None,
}

# Dimensions that stay whole where their mesh axes do not divide them: channels of published convolutions, which nobody who
# chooses a mesh can change, and the tokens of pictures of any aspect ratio.
WHOLE_WHERE_UNEVEN = frozenset({"conv_out", "length", "rows"})

# What is loaded and saved of a network; the second are an autoencoder's latent statistics.
_STORED = nnx.Any(nnx.Param, nnx.BatchStat)


def spec_of(
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    mesh: AnyMesh,
    *,
    whole: Collection[str] = WHOLE_WHERE_UNEVEN,
) -> PartitionSpec:
    """Returns the partition of one array whose dimensions are named `axes`.

    Mesh axes of size 1 are left out; dimensions named in `whole` stay whole where their mesh axes do not divide them. Raises
    ValueError, naming the parameter, its shape and the axis, for an unknown logical name, for one mesh axis used twice, and
    for any other dimension that its mesh axes do not divide.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name} has shape {shape} but {len(axes)} axis names {axes}; name every dimension.")
    used: dict[str, str] = {}
    entries: list[str | tuple[str, ...] | None] = []
    for size, logical in zip(shape, axes, strict=True):
        if logical is not None and logical not in RULES:
            raise ValueError(f"{name}: unknown logical axis {logical!r}; known ones: {sorted(RULES)}.")
        rule = RULES[logical] if logical is not None else None
        wanted = () if rule is None else (rule,) if isinstance(rule, str) else rule
        mesh_axes = tuple(axis for axis in wanted if mesh.shape.get(axis, 1) > 1)
        ways = int(np.prod([mesh.shape[axis] for axis in mesh_axes]))
        if size % ways and logical in whole:
            mesh_axes, ways = (), 1
        for axis in mesh_axes:
            if axis in used:
                raise ValueError(
                    f"{name} with shape {shape}: logical axes {used[axis]!r} and {logical!r} both map to mesh axis {axis!r}."
                )
            used[axis] = str(logical)
        if size % ways:
            raise ValueError(
                f"{name} with shape {shape}: axis {logical!r} of size {size} is not divisible by {ways} (mesh axes "
                f"{mesh_axes}). Use a smaller mesh axis or a width that it divides."
            )
        entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def activation_spec(
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    mesh: AnyMesh,
    *,
    whole: Collection[str] = (),
) -> PartitionSpec:
    """Returns the partition of an activation, an entry for each dimension; see `spec_of` for the arguments and errors."""
    spec = spec_of(name, shape, axes, mesh, whole=WHOLE_WHERE_UNEVEN | frozenset(whole))
    return PartitionSpec(*spec, *(None,) * (len(shape) - len(spec)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says how an activation whose dimensions are named `axes` lies on the mesh that is compiled for, if there is one.

    Without it XLA is free to split the widths of activations as their weights are split, and to copy the batch.
    """
    mesh = target.current().mesh
    if mesh is None or mesh.size == 1:
        return x
    spec = activation_spec("an activation", x.shape, axes, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def param_axes(module: nnx.Module) -> dict[str, tuple[str | None, ...]]:
    """Returns dotted parameter path -> logical axis names, as tagged where the parameters are made."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, _STORED)):
        name = ".".join(map(str, path))
        axes = variable.get_metadata().get("axes")
        found[name] = axes if axes is not None else (None,) * len(variable.shape)
    return found


def param_shardings(module: nnx.Module, mesh: AnyMesh) -> dict[str, Any]:
    """Returns the tree of NamedShardings of a module's parameters; the module may be abstract (`nnx.eval_shape`)."""
    axes = param_axes(module)
    flat = {
        ".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(nnx.state(module, _STORED))
    }
    return traverse_util.unflatten_dict(
        {name: NamedSharding(mesh, spec_of(name, tuple(shape), axes[name], mesh)) for name, shape in flat.items()},
        sep=".",
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a global batch: its first axis over all data axes."""
    wanted = RULES["batch"] or ()
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in wanted if axis in mesh.shape)))


def host_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns which rows of a global batch this host loads: those that its devices work on.

    Hosts whose devices split one sample between them load the same rows.

    Raises:
      ValueError: the batch does not divide evenly over the devices.
    """
    sharding = batch_sharding(mesh)
    ways = int(np.prod([mesh.shape[axis] for axis in sharding.spec[0]]))
    if batch_size % ways:
        raise ValueError(
            f"batch_size={batch_size} is the rows of all hosts together and cannot be shared equally by {ways} devices (mesh "
            f"axes {sharding.spec[0]}); use a multiple of {ways}."
        )
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in slices for row in range(*part.indices(batch_size))})


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """Assembles each host's rows of a batch (numpy leaves, see `host_rows`) into global arrays sharded over the batch axes."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)
