"""What a program is being compiled for: its mesh, and which attention kernels it may use.

Both are the same for every layer of a network, so they are set once around the function that is traced, not passed through
every call. They are read while it is traced and are no part of jit's cache key: set them inside the function that is compiled
(as the training tasks do), or around one that is traced only there.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
from jax.sharding import Mesh

KernelName = Literal["auto", "splash", "cudnn", "xla"]

# Up to this many tokens a row, of which there are then many, accelerators attend without matrix products.
FEW_TOKENS = 32
# The kernel of such rows reads heads of whole vector registers.
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a program is compiled for, and its attention kernels.

    Attributes:
      mesh: the devices, which need not be of this machine; None: the default device, or what jit finds by itself.
      kernel: for attention over whole sequences: "auto" takes the platform's own ("splash" on TPU, "cudnn" on NVIDIA GPUs, "xla"
        elsewhere).
      few_tokens: rows of up to this many tokens are attended to without matrix products; None leaves it to the platform.
    """

    mesh: Mesh | None = None
    kernel: KernelName = "auto"
    few_tokens: int | None = None

    @property
    def device(self) -> jax.Device:
        """One of the devices; all are of a kind."""
        return jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def num_devices(self) -> int:
        """Devices that one program runs on, as far as is known."""
        return jax.device_count() if self.mesh is None else self.mesh.size

    @property
    def chosen_kernel(self) -> Literal["splash", "cudnn", "xla"]:
        """The kernel of whole sequences."""
        if self.kernel != "auto":
            return self.kernel
        if self.mesh is None and self.num_devices > 1:
            return "xla"  # a kernel has to be told how it is split over devices; XLA's own operations need not
        if self.device.platform == "tpu":
            return "splash"
        return "cudnn" if self.device.platform == "gpu" and "NVIDIA" in self.device.device_kind else "xla"

    @property
    def few_tokens_limit(self) -> int:
        """Longest row that is attended to without matrix products: on CPU none, where products are the faster way."""
        if self.few_tokens is not None:
            return self.few_tokens
        return 0 if self.device.platform == "cpu" else FEW_TOKENS

    def has_row_kernel(self, num_tokens: int, head_dim: int) -> bool:
        """Whether rows of so many tokens go to the kernel of `unifusion_jax.parallel.row_attention`, which is for TPU."""
        return self.chosen_kernel == "splash" and num_tokens <= self.few_tokens_limit and head_dim % _LANES == 0


_CURRENT: contextvars.ContextVar[Target] = contextvars.ContextVar("unifusion_jax_target")


def current() -> Target:
    """Returns what is being compiled for; by default the default device."""
    return _CURRENT.get(Target())


@contextlib.contextmanager
def compiling_for(
    mesh: Mesh | None = None, *, kernel: KernelName = "auto", few_tokens: int | None = None
) -> Iterator[Target]:
    """Sets the target of what is traced inside; see `Target` for the arguments."""
    token = _CURRENT.set(Target(mesh, kernel, few_tokens))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)
