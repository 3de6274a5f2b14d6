"""8-bit weights of a frozen encoder, and what they do to its states."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from unifusion_jax.layers import Linear, quantize_int8


def quantizer(model: nnx.Module, kind: str) -> Callable[[str, jax.Array], Any] | None:
    """Returns what turns a parameter, given by its dotted path, into what is kept; None where all stay as they are.

    The model may be abstract. Only kernels of `layers.Linear` are quantised; each as it is loaded, on the devices, so that a
    sharded kernel gets the scale of its whole channel.

    Raises:
      ValueError: for an unknown kind.
    """
    if kind == "none":
        return None
    if kind != "int8":
        raise ValueError(f"quantize={kind!r} is not known; expected 'none' or 'int8'.")
    kernels = {
        ".".join(map(str, (*path, "kernel"))) for path, part in nnx.iter_graph(model) if isinstance(part, Linear)
    }
    return lambda name, value: quantize_int8(value) if name in kernels else value


def state_errors(
    states: Float[Any, "B S N H"], reference: Float[Any, "B S N H"], mask: Bool[Any, "B S"]
) -> dict[str, list[float]]:
    """Compares layer states with those of the unquantised encoder on existing tokens.

    Returns:
      For each of the N layers: `cosine`, the mean over tokens of the cosine between the two states, `worst_cosine`, the
      smallest, and `relative_rms`, the root mean square of the difference over that of the reference.
    """
    ours, theirs = (np.asarray(value)[np.asarray(mask)].astype(np.float64) for value in (states, reference))
    cosine = (ours * theirs).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1))
    error = np.sqrt(np.square(ours - theirs).mean((0, 2)) / np.square(theirs).mean((0, 2)))
    return {
        "cosine": cosine.mean(0).tolist(),
        "worst_cosine": cosine.min(0).tolist(),
        "relative_rms": error.tolist(),
    }
