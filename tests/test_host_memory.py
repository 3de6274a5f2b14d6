import platform
import subprocess
import sys

import pytest

# Frees and allocates a block above glibc's mmap threshold again and again, and prints how many pages had to be mapped.
_CHURN = """
import resource, sys
import numpy as np
from unifusion_jax.parallel.host_memory import keep_freed_blocks
if sys.argv[1] == "keep":
    assert keep_freed_blocks()
np.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", _CHURN, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_blocks_are_used_again_without_a_page_fault():
    assert faults("keep") * 20 < faults("default")
