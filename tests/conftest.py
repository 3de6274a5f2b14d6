"""Eight fake CPU devices in every test, and no network."""

import os
import tempfile
import warnings

os.environ["JAX_PLATFORMS"] = os.environ.get("UNIFUSION_TEST_PLATFORM", "cpu")
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # A test compiles far more than it computes: LLVM's cheapest level halves the suite.
    "--xla_backend_optimization_level=0",
    # Eight devices on two busy cores may keep each other waiting for longer than the 40 s after which XLA gives up.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
)
if _FLAGS[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS))
# XLA's thread pools are as large as the machine has cores. A device that waits in a collective holds its thread, so
# with fewer threads than devices the last to arrive may never get one: a deadlock on machines of a few cores.
os.environ.setdefault("NPROC", "32")
os.environ["HF_HUB_OFFLINE"] = "1"
# Many tests compile the same step. What one compiled, the others, their subprocesses and pytest's workers read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="unifusion-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

import pytest  # noqa: E402  (the flags above must be set before jax is imported)


@pytest.fixture(scope="session")
def frozen(tmp_path_factory):
    """Folder with a tiny encoder and a tiny autoencoder."""
    from training_support import write_frozen

    folder = tmp_path_factory.mktemp("frozen")
    write_frozen(folder)
    return folder


def pytest_collection_modifyitems(config, items):
    """Leaves tests in a browser out, with a warning, where there is none; see `browser_support.left_out`."""
    import browser_support

    chosen = [item for item in items if item.get_closest_marker("browser")]
    if chosen and browser_support.left_out():
        config.hook.pytest_deselected(items=chosen)
        items[:] = [item for item in items if item not in chosen]
        warnings.warn(f"{len(chosen)} tests of the web page were left out. {browser_support.ABSENT}", stacklevel=1)
