"""What the backward pass keeps of every block and what it computes again."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

from unifusion_jax.layers import BLOCK_INPUT, Remat

RematName = Literal["none", "dots", "full", "offload"]


def remat(name: RematName) -> Remat | None:
    """Returns what wraps a scanned block in training.

    "none" keeps every intermediate result: no work is done twice, at the most memory. "dots" keeps the results of linear
    maps and computes norms, activations and attention weights again. "full" keeps the input of each block alone and
    computes the block again, a third more work. "offload" does as "full" and keeps those inputs in the host's memory, for
    devices that have one of their own.
    """
    if name == "none":
        return None
    # Blocks are scanned, and a loop's body cannot be merged with the backward loop's, so no barrier is needed.
    return functools.partial(jax.checkpoint, policy=_policy(name), prevent_cse=False)


def _policy(name: RematName) -> Callable[..., Any] | None:
    if name == "dots":
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if name == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return None
