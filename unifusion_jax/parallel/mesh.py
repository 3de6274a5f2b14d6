"""The device mesh: a named grid over all devices of all hosts."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that the others leave.

    Attributes:
      slice: TPU slices, or other groups of devices with slow links between them; each holds a copy of the parameters.
      data: copies of the parameters in a slice, each working on its part of the batch.
      fsdp: devices that share one copy of the parameters (and also split the batch).
      sequence: devices that split the tokens of one sample.
      tensor: devices that split attention heads and feed-forward widths.
    """

    slice: int = 1
    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = self.sizes
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"Mesh sizes must be positive, at most one of them -1, got {dataclasses.asdict(self)}.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Axis sizes as given, in mesh order."""
        return dataclasses.astuple(self)

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Axis names in mesh order."""
        return tuple(field.name for field in dataclasses.fields(self))


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over `devices` (all by default). Raises ValueError when the sizes do not fit their number."""
    config = config or MeshConfig()
    devices = list(jax.devices() if devices is None else devices)
    known = math.prod(size for size in config.sizes if size != -1)
    sizes = tuple(len(devices) // known if size == -1 else size for size in config.sizes)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"A mesh of {dict(zip(config.axis_names, config.sizes, strict=True))} does not fit {len(devices)} devices. "
            "Set one axis to -1, or make the product of the sizes equal the number of devices."
        )
    if devices[0].platform == "tpu" and sizes[0] > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *sizes[1:]), (sizes[0], *(1,) * (len(sizes) - 1)), devices=devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu" and len(devices) > 1:
        grid = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, config.axis_names)
