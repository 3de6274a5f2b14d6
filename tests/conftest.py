"""Eight fake CPU devices in every test, and no network."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("UNIFUSION_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
