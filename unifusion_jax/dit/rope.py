"""Rotary position embedding over three axes: condition index, row, column."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How the head dimension is shared between the three axes.

    Attributes:
      dims: even number of channels for (condition index, row, column); their sum is the head dimension.
      theta: base of the frequencies (Su et al. 2021, equation 15).
    """

    dims: tuple[int, int, int]
    theta: float = 10_000.0

    def __post_init__(self):
        if len(self.dims) != 3 or any(dim < 2 or dim % 2 for dim in self.dims):
            raise ValueError(f"rope dims must be three even numbers >= 2, got {self.dims}.")

    @classmethod
    def for_head_dim(cls, head_dim: int, theta: float = 10_000.0) -> "RopeConfig":
        """Shares a head dimension out: a quarter to the condition index, the rest to row and column in equal parts."""
        spatial = 2 * (head_dim * 3 // 16)
        return cls((head_dim - 2 * spatial, spatial, spatial), theta)


def joint_positions(num_condition: int, height: int, width: int) -> Int[Array, "T 3"]:
    """Positions of the sequence [condition tokens ; latent tokens in row-major order].

    Condition token i sits at (i + 1, 0, 0); the latent token of row r and column c at (0, r, c). So only the condition moves
    along the first axis, and only the picture along the other two.
    """
    index = jnp.arange(1, num_condition + 1)
    condition = jnp.stack([index, jnp.zeros_like(index), jnp.zeros_like(index)], axis=-1)
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    latent = jnp.stack([jnp.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3)
    return jnp.concatenate([condition, latent])


def sequence_positions(num_tokens: int) -> Int[Array, "T 3"]:
    """Positions of a plain sequence: token i at (i + 1, 0, 0), as the condition has them in `joint_positions`."""
    return joint_positions(num_tokens, 0, 0)


def rope_table(positions: Int[Array, "T 3"], config: RopeConfig) -> tuple[Float[Array, "T F"], Float[Array, "T F"]]:
    """Returns cosines and sines, float32, F = half the head dimension: one angle for each rotated pair of channels."""
    angles = []
    for axis, dim in enumerate(config.dims):
        frequency = config.theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        angles.append(positions[:, axis, None].astype(jnp.float32) * frequency)
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, "B T A E"], table: tuple[Float[Array, "T F"], Float[Array, "T F"]]
) -> Float[Array, "B T A E"]:
    """Rotates channel pairs (i, i + E/2) by the table's angles, in float32."""
    cos, sin = (part[None, :, None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
