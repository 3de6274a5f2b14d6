"""What the backward pass keeps of every block and what it computes again."""

import functools
from typing import Literal

import jax

from unifusion_jax.layers import Remat

RematName = Literal["none", "dots", "full"]


def remat(name: RematName) -> Remat | None:
    """Returns what wraps a scanned block in training.

    "none" keeps every intermediate result: no work is done twice, at the most memory. "dots" keeps the results of linear
    maps and computes norms, activations and attention weights again. "full" keeps the input of each block alone and
    computes the block again, a third more work.
    """
    if name == "none":
        return None
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if name == "dots" else None
    # Blocks are scanned, and a loop's body cannot be merged with the backward loop's, so no barrier is needed.
    return functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
