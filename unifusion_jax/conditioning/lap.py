"""Layerwise Attention Pooling: attention over the exported layers of one token, then one map over the layer axis."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from unifusion_jax.dit.blocks import Block
from unifusion_jax.layers import Remat, RMSNorm, Stack, linear, with_axes
from unifusion_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class LAPConfig:
    """Sizes of the pooling module (paper, sections 2.1 and 4).

    Attributes:
      num_layers: exported encoder layers N.
      encoder_size: encoder width H.
      num_heads: attention heads over H.
      ffn_size: width of the SwiGLU layers.
      num_blocks: transformer blocks over the layer axis; the paper has two.
      layer_embedding: adds a learned vector per layer, which tells the blocks apart what attention alone cannot order.
      chunk_tokens: tokens of a sample pooled at a time; 0 pools all at once. LAP works on N vectors a token, so of long
        conditions its intermediate results are the largest of all; in chunks, only those of one chunk are held.
    """

    num_layers: int
    encoder_size: int
    num_heads: int
    ffn_size: int
    num_blocks: int = 2
    layer_embedding: bool = True
    chunk_tokens: int = 0

    def __post_init__(self):
        if self.chunk_tokens < 0:
            raise ValueError(f"LAP pools chunk_tokens at a time, 0 for all at once; got {self.chunk_tokens}.")
        if self.num_layers < 1 or self.num_blocks < 1:
            raise ValueError(
                f"LAP needs at least one layer and one block, got {self.num_layers} and {self.num_blocks}."
            )
        if self.encoder_size % self.num_heads:
            raise ValueError(
                f"LAP attends over the encoder width: {self.encoder_size} is not a multiple of num_heads {self.num_heads}."
            )


class LAP(nnx.Module):
    """Pools the states of N encoder layers into one vector per token.

    Each state is RMS-normalised, (B, S, N, H) is reshaped to (B*S, N, H), two transformer blocks attend over the N layers of
    ONE token, and one linear map N -> 1 pools them. The map's weights are the paper's figure 7.
    """

    def __init__(self, config: LAPConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        self.norm = RMSNorm(config.encoder_size, param_dtype=param_dtype)
        if config.layer_embedding:
            init = with_axes(nnx.initializers.normal(0.02), (None, "embed_out"))
            self.layer_embedding = nnx.Param(init(rngs.params(), (config.num_layers, config.encoder_size), param_dtype))
        else:
            self.layer_embedding = nnx.data(None)
        self.blocks = Stack(
            lambda rngs: Block(
                config.encoder_size, config.num_heads, config.ffn_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            ),
            config.num_blocks,
            rngs=rngs,
        )
        # Starts as the mean over layers; the learned weights are then read as deviations from equal use.
        mean = nnx.initializers.constant(1.0 / config.num_layers)
        self.pool = linear(
            config.num_layers,
            1,
            (None, None),
            bias=True,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=mean,
            rngs=rngs,
        )

    def __call__(self, states: Float[Array, "B S N H"], *, remat: Remat | None = None) -> Float[Array, "B S H"]:
        """Returns pooled states in the compute dtype. Raises ValueError when N or H differ from the config."""
        tokens, layers, width = states.shape[1:]
        if (layers, width) != (self.config.num_layers, self.config.encoder_size):
            raise ValueError(
                f"LAP was built for {self.config.num_layers} layers of width {self.config.encoder_size}, got {layers} of "
                f"{width}. The encoder or encoder.layers differ from the checkpoint's."
            )
        if not 0 < self.config.chunk_tokens < tokens:
            return self._pooled(states, remat)
        size = self.config.chunk_tokens

        # No token sees another here. With `remat`, the backward pass computes whole chunks again, not their blocks besides; they
        # are cut out inside, so that the states are not kept a second time.
        def chunk_of(length: int) -> Callable[[int | jax.Array], jax.Array]:
            def chunk(states: jax.Array, start: int | jax.Array) -> jax.Array:
                return self._pooled(jax.lax.dynamic_slice_in_dim(states, start, length, axis=1), None)

            return functools.partial(remat(chunk) if remat else chunk, states)

        chunks = jax.lax.map(chunk_of(size), size * jnp.arange(tokens // size))
        parts = [jnp.moveaxis(chunks, 0, 1).reshape(states.shape[0], -1, width)]
        if tokens % size:
            parts.append(chunk_of(tokens % size)(tokens - tokens % size))
        return jnp.concatenate(parts, axis=1)

    def _pooled(self, states: Float[Array, "B S N H"], remat: Remat | None) -> Float[Array, "B S H"]:
        batch, tokens, layers, width = states.shape
        x = self.norm(states.astype(self.dtype)).reshape(batch * tokens, layers, width)
        if self.layer_embedding is not None:
            x = x + self.layer_embedding[...].astype(self.dtype)

        def run(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return constrain(block(x), "rows", None, None), None

        x, _ = self.blocks.scan(run, constrain(x, "rows", None, None), remat=remat)
        return self.pool(x.swapaxes(1, 2))[..., 0].reshape(batch, tokens, width)
