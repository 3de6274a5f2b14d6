"""What the C allocator does with freed blocks, which on CPU decides about half of a training step's time."""

import ctypes
import platform

# malloc.h of glibc; the values of its options are C ints.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TRIM_THRESHOLD_BYTES = 2**31 - 1
_TOP_PAD_BYTES = 2**28


def keep_freed_blocks() -> bool:
    """Makes glibc keep freed memory for the next allocation. Returns whether it could be told to.

    XLA's CPU backend allocates its temporary buffers with malloc in every step. By default glibc maps blocks of 32 MiB and
    more afresh each time and gives them back when they are freed, so every step waits for the kernel to clear the same
    pages again. The price is that the process keeps the most memory it ever needed. Call it before the first large
    allocation; only CPU training gains.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = {_M_MMAP_MAX: 0, _M_TOP_PAD: _TOP_PAD_BYTES, _M_TRIM_THRESHOLD: _TRIM_THRESHOLD_BYTES}
    return all(mallopt(name, value) == 1 for name, value in options.items())
