"""What the C allocator does with freed blocks, which on CPU decides about half of a training step's time."""

import ctypes
import importlib.metadata
import importlib.util
import platform

import jax

# malloc.h of glibc; the values of its options are C ints.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_TRIM_THRESHOLD_BYTES = 2**31 - 1
_TOP_PAD_BYTES = 2**28


def keep_freed_blocks() -> bool:
    """Makes glibc keep freed memory for the next allocation. Returns whether it could be told to.

    XLA's CPU backend allocates its temporary buffers with malloc in every step. By default glibc maps blocks of 32 MiB and
    more afresh each time and gives them back when they are freed, and so it does with the arenas of threads, so every step
    waits for the kernel to clear the same pages again. The price is that the process keeps the most memory it ever needed.
    Call it before JAX starts its threads: a thread that has allocated keeps the arena it got.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TOP_PAD: _TOP_PAD_BYTES, _M_TRIM_THRESHOLD: _TRIM_THRESHOLD_BYTES}
    return all(mallopt(name, value) == 1 for name, value in options.items())


def cpu_expected() -> bool:
    """Whether JAX will run on CPU, as far as can be told before it starts: asked to, or nothing else is installed."""
    platforms = jax.config.read("jax_platforms")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and all(importlib.util.find_spec(name) is None for name in ("libtpu", "jax_plugins"))
