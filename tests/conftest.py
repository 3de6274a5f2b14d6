"""Eight fake CPU devices in every test, and no network."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = os.environ.get("UNIFUSION_TEST_PLATFORM", "cpu")
_DEVICES = "--xla_force_host_platform_device_count=8"
# Eight devices on two busy cores may keep each other waiting for longer than the 40 s after which XLA gives up.
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES} {_PATIENCE}"
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
