"""Randomness is `fold_in(seed, stream, step)`: a restart needs nothing saved."""

import zlib

import jax
from jaxtyping import Array, Int, Key


def stream_key(seed: int, stream: str, step: int | Int[Array, ""] = 0) -> Key[Array, ""]:
    """Returns the key of a named stream at a step. Streams are independent of each other and of their order of use."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode())), step)
