"""The latent diffusion transformer: single stream, full self-attention over [condition ; latents]."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from unifusion_jax.dit.blocks import Block, modulate
from unifusion_jax.dit.condition import BlockCondition, Condition
from unifusion_jax.dit.rope import RopeConfig, joint_positions, rope_table
from unifusion_jax.layers import Remat, RMSNorm, Stack, linear, with_axes
from unifusion_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of the diffusion transformer.

    Attributes:
      latent_channels: channels of the autoencoder's latents.
      num_layers: blocks.
      hidden_size: model width D.
      num_heads: attention heads; D / num_heads is the head dimension.
      ffn_size: width of the SwiGLU layer.
      patch_size: latent cells per token side; 1 when the autoencoder already packs 2x2 cells.
      time_features: width of the sinusoidal embedding of t.
      rope_theta: base of the rotary frequencies.
    """

    latent_channels: int
    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    patch_size: int = 1
    time_features: int = 256
    rope_theta: float = 10_000.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"dit.{field.name} must be positive, got {getattr(self, field.name)}.")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"dit.hidden_size {self.hidden_size} is not a multiple of dit.num_heads {self.num_heads}.")
        if self.head_dim % 2 or self.head_dim < 16:
            raise ValueError(
                f"The head dimension must be even and at least 16 (three rotary axes), got {self.head_dim} = hidden_size "
                f"{self.hidden_size} / num_heads {self.num_heads}."
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def rope(self) -> RopeConfig:
        """The rotary embedding of the joint sequence."""
        return RopeConfig.for_head_dim(self.head_dim, self.rope_theta)

    @classmethod
    def dit_8b(cls, latent_channels: int = 128, patch_size: int = 1) -> "DiTConfig":
        """The final model's 8B transformer (paper, section 4)."""
        return cls(latent_channels, 40, 4096, 32, 10_752, patch_size)

    @classmethod
    def dit_5b(cls, latent_channels: int = 128, patch_size: int = 1) -> "DiTConfig":
        """The 5B transformer of the ablations (paper, section 2.2); its depth and heads match Llama-3.1-8B."""
        return cls(latent_channels, 32, 4096, 32, 6_912, patch_size)

    @classmethod
    def demo(cls, latent_channels: int = 32, patch_size: int = 1) -> "DiTConfig":
        """A size that trains in minutes on two CPU cores."""
        return cls(latent_channels, 6, 160, 5, 432, patch_size)


class DiT(nnx.Module):
    """Velocity of noised latents, given t and a condition sequence of width D.

    Blocks are modulated by adaLN from t: one projection shared by all blocks plus a learned table per block (as in
    PixArt-alpha's adaLN-single, Chen et al. 2023), so that modulation costs almost no parameters. Only latent tokens are
    read out.
    """

    def __init__(self, config: DiTConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        width, patch_features = config.hidden_size, config.latent_channels * config.patch_size**2
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        zeros = nnx.initializers.zeros_init()
        self.patch_in = linear(patch_features, width, (None, "embed"), bias=True, **options)
        self.time_in = linear(config.time_features, width, (None, "embed"), bias=True, **options)
        self.time_hidden = linear(width, width, ("embed", "embed_out"), bias=True, **options)
        self.time_modulation = linear(width, 6 * width, ("embed", "embed_out"), bias=True, kernel_init=zeros, **options)
        self.blocks = Stack(
            lambda rngs: ModulatedBlock(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_layers,
            rngs=rngs,
        )
        self.out_norm = RMSNorm(width, param_dtype=param_dtype)
        self.out_modulation = linear(width, 2 * width, ("embed", "embed_out"), bias=True, kernel_init=zeros, **options)
        self.patch_out = linear(width, patch_features, ("embed", None), bias=True, kernel_init=zeros, **options)

    def __call__(
        self,
        latents: Float[Array, "B h w c"],
        t: Float[Array, " B"],
        condition: Condition,
        *,
        remat: Remat | None = None,
    ) -> Float[Array, "B h w c"]:
        """Returns the float32 velocity v = noise - data.

        Args:
          latents: x_t, normalised latents; h and w are multiples of the patch size.
          t: times in [0, 1], float32; 0 is data, 1 is noise.
          condition: tokens of the input sequence, and what blocks get besides.
          remat: wraps one block, e.g. `jax.checkpoint`.
        """
        batch, height, width, _ = latents.shape
        patch = self.config.patch_size
        rows, columns = height // patch, width // patch
        tokens = self.patch_in(patchify(latents, patch).astype(self.dtype))
        num_condition = condition.tokens.shape[1]
        x = jnp.concatenate([condition.tokens.astype(self.dtype), tokens], axis=1)
        x = constrain(x, "batch", "length", None)
        masks = [condition.mask, jnp.ones((batch, rows * columns), bool)]
        if condition.kv_mask is not None:
            masks = [condition.kv_mask, *masks]
        mask = jnp.concatenate(masks, axis=1)
        rope = rope_table(joint_positions(num_condition, rows, columns), self.config.rope)

        time = self.time_in(time_embedding(t, self.config.time_features).astype(self.dtype))
        time = jax.nn.silu(self.time_hidden(jax.nn.silu(time)))
        shared = self.time_modulation(time).reshape(batch, 6, -1)

        def run(block: "ModulatedBlock", x: Array, own: BlockCondition) -> tuple[Array, None]:
            return constrain(block(x, mask, rope, shared, own), "batch", "length", None), None

        x, _ = self.blocks.scan(run, x, condition.by_block(), remat=remat)
        shift, scale = jnp.split(self.out_modulation(time)[:, None], 2, axis=-1)
        x = modulate(self.out_norm(x[:, num_condition:]), shift, scale)
        return unpatchify(self.patch_out(x).astype(jnp.float32), patch, rows, columns)


class ModulatedBlock(nnx.Module):
    """A transformer block with its own learned offset to the shared adaLN modulation."""

    def __init__(self, config: DiTConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.block = Block(
            config.hidden_size, config.num_heads, config.ffn_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        # Gates start at zero with the shared projection, so every block starts as the identity (adaLN-Zero).
        init = with_axes(nnx.initializers.zeros_init(), (None, "embed_out"))
        self.table = nnx.Param(init(rngs.params(), (6, config.hidden_size), param_dtype))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B M"],
        rope: tuple[Float[Array, "T F"], Float[Array, "T F"]],
        shared: Float[Array, "B 6 D"],
        condition: BlockCondition,
    ) -> Float[Array, "B T D"]:
        """Applies the block with its modulation, `shared` plus its own table, and its part of the condition."""
        if condition.added is not None:
            x = x.at[:, : condition.added.shape[1]].add(condition.added.astype(x.dtype))
        key, value = condition.key, condition.value
        fused = None if key is None or value is None else (key, value)
        modulation = shared + self.table[...].astype(shared.dtype)
        return self.block(x, mask=mask, rope=rope, modulation=modulation, fused=fused)


def time_embedding(t: Float[Array, " B"], features: int, max_period: float = 10_000.0) -> Float[Array, "B features"]:
    """Sinusoidal embedding of 1000 t in float32 (Vaswani et al. 2017, with the scale diffusion models use)."""
    half = features // 2
    frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = 1000.0 * t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle), jnp.zeros((t.shape[0], features % 2))], axis=-1)


def patchify(latents: Float[Array, "B h w c"], patch: int) -> Float[Array, "B L P"]:
    """Cuts latents into tokens in row-major order; channels within a token are ordered (row, column, channel)."""
    batch, height, width, channels = latents.shape
    if height % patch or width % patch:
        raise ValueError(f"Latents of {height}x{width} cells are not divisible into {patch}x{patch} patches.")
    x = latents.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: Float[Array, "B L P"], patch: int, rows: int, columns: int) -> Float[Array, "B h w c"]:
    """Inverse of `patchify` for a grid of rows x columns tokens."""
    batch, _, features = tokens.shape
    x = tokens.reshape(batch, rows, columns, patch, patch, features // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * patch, columns * patch, -1)
