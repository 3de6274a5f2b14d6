"""Accelerators and their limits, from the vendors' data sheets, and descriptions of machines that are not here."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one chip.

    Attributes:
      flops: bf16 peak, FLOP/s.
      memory_gib: what a program may take of its memory, as the compiler counts it.
      memory_bytes_per_s: of its memory.
      link_bytes_per_s: all its links to other chips together, one way.
    """

    flops: float
    memory_gib: float
    memory_bytes_per_s: float
    link_bytes_per_s: float


# By the beginning of `jax.Device.device_kind`; the longest that fits counts.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "TPU v4": Chip(275e12, 30.75, 1228e9, 300e9),
        "TPU v5 lite": Chip(197e12, 15.75, 819e9, 200e9),
        "TPU v5": Chip(459e12, 95.74, 2765e9, 600e9),
        "TPU v6 lite": Chip(918e12, 31.25, 1640e9, 448e9),
        "NVIDIA A100": Chip(312e12, 79.1, 2039e9, 300e9),
        "NVIDIA H100": Chip(989e12, 79.1, 3350e9, 450e9),
        "NVIDIA H200": Chip(989e12, 139.8, 4800e9, 450e9),
    }
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """A kind of TPU slice: how libtpu calls its topology, and how many of a name's units make a chip."""

    prefix: str
    cores_per_chip: int
    dimensions: int


_SLICES = {"v4": Slice("v4", 2, 3), "v5p": Slice("v5", 2, 3), "v5e": Slice("v5e", 1, 2), "v6e": Slice("v6e", 1, 2)}


def chip_of(device: jax.Device) -> Chip | None:
    """Returns the limits of a device; None where they are unknown, as on CPUs."""
    matches = [name for name in CHIPS if device.device_kind.startswith(name)]
    return CHIPS[max(matches, key=len)] if matches else None


def peak_flops(device: jax.Device) -> float | None:
    """Returns a device's bf16 peak in FLOP/s; None where it is unknown."""
    chip = chip_of(device)
    return None if chip is None else chip.flops


def memory_gib(device: jax.Device) -> float | None:
    """Returns what a program may take of a device's memory: what the device says, or the table; None where neither does."""
    try:
        stats = device.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        stats = {}  # a device that is only described has none
    limit = stats.get("bytes_limit")
    chip = chip_of(device)
    return limit / _GIB if limit else None if chip is None else chip.memory_gib


def slice_shape(chips: int, dimensions: int) -> tuple[int, ...]:
    """Returns the grid of a slice: powers of two, as even as they can be, the smaller ones first."""
    power = chips.bit_length() - 1
    if chips != 1 << power:
        raise ValueError(f"A slice has a power of two chips, got {chips}.")
    if dimensions == 3 and chips == 4:
        return (2, 2, 1)
    low, rest = divmod(power, dimensions)
    return tuple(1 << (low + (axis >= dimensions - rest)) for axis in range(dimensions))


def described_devices(topology: str) -> Sequence[jax.Device]:
    """Returns the devices of a topology: "local", or a TPU slice by its product name such as "v5p-256" or "2xv6e-256".

    v4 and v5p are named by their cores, two of which make a chip. The devices of slices can be compiled for, but not run on.

    Raises:
      ValueError: an unknown name.
      RuntimeError: libtpu, which describes them, is not installed.
    """
    if topology == "local":
        return jax.devices()
    match = re.fullmatch(r"(?:(\d+)x)?(v4|v5p|v5e|v6e)-(\d+)", topology)
    if match is None:
        raise ValueError(
            f"topology={topology!r} is not known: give 'local', or a TPU slice such as 'v5p-256', 'v5e-256', 'v6e-256' or, "
            "for two slices, '2xv6e-256'."
        )
    count, kind, units = int(match[1] or 1), _SLICES[match[2]], int(match[3])
    chips = max(1, units // kind.cores_per_chip)
    shape = slice_shape(chips, kind.dimensions)
    bounds = [min(2, side) for side in shape[:2]] + [1] * (kind.dimensions - 2)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{kind.prefix}:{'x'.join(map(str, shape))}",
            chips_per_host_bounds=[*bounds, *[1] * (3 - len(bounds))],
            num_slices=count,
        )
    except (RuntimeError, ImportError, FileNotFoundError) as error:
        raise RuntimeError(
            f"{topology} could not be described ({error}). TPU slices are described by libtpu: pip install "
            "'unifusion_jax[tpu]', and set TPU_SKIP_MDS_QUERY=1 where there is no TPU."
        ) from error
    if len(found.devices) != count * math.prod(shape):
        raise RuntimeError(f"{topology} has {count * math.prod(shape)} chips, libtpu describes {len(found.devices)}.")
    return found.devices
