"""UniFusion in JAX: one frozen vision-language model conditions a latent diffusion transformer on text and images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unifusion_jax.pipeline import UniFusion as UniFusion
    from unifusion_jax.prompt import Prompt as Prompt

__version__ = "0.1.0"
__all__ = ["Prompt", "UniFusion"]


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that `--help` and data tools do not wait for jax.
    if name == "UniFusion":
        from unifusion_jax.pipeline import UniFusion

        return UniFusion
    if name == "Prompt":
        from unifusion_jax.prompt import Prompt

        return Prompt
    raise AttributeError(f"module 'unifusion_jax' has no attribute {name!r}")
