"""The trainable stack: a conditioning strategy, the null condition and the DiT, assembled from a config."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from unifusion_jax.conditioning import CONDITIONERS, ConditioningConfig
from unifusion_jax.dit import Condition, DiT, DiTConfig
from unifusion_jax.layers import Remat, with_axes


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes of the trainable parameters.

    Attributes:
      num_layers: layers N that the encoder exports.
      encoder_size: length H of what it exports of a layer: its width, or that of all keys and values.
      conditioning: how they become what the DiT is told.
      dit: the diffusion transformer.
      kv_heads: key-value heads in an exported layer; 0 where states are exported.

    Raises:
      ValueError: the strategy cannot connect these sizes; says what would fit.
    """

    num_layers: int
    encoder_size: int
    conditioning: ConditioningConfig
    dit: DiTConfig
    kv_heads: int = 0

    def __post_init__(self):
        self.conditioning.check_sizes(self.num_layers, self.encoder_size, self.kv_heads, self.dit)

    @classmethod
    def final_8b(cls) -> "ModelConfig":
        """The paper's final model: InternVL3-8B (layers 1, 4, ..., 28, width 3584) and the 8B DiT on FLUX.2 latents."""
        return cls(10, 3584, ConditioningConfig(), DiTConfig.dit_8b())


class UniFusionModel(nnx.Module):
    """Conditioning and DiT. The frozen encoder and autoencoder are not part of it."""

    def __init__(
        self, config: ModelConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conditioner = CONDITIONERS[config.conditioning.strategy](
            config.conditioning,
            num_layers=config.num_layers,
            encoder_size=config.encoder_size,
            dit=config.dit,
            **options,
        )
        if config.conditioning.has_tokens:
            init = with_axes(nnx.initializers.normal(1.0), ("embed_out",))
            self.null_token = nnx.Param(init(rngs.params(), (config.dit.hidden_size,), param_dtype))
        else:
            self.null_token = nnx.data(None)
        self.dit = DiT(config.dit, **options)

    def condition(
        self,
        states: Float[Array, "B C N H"],
        mask: Bool[Array, "B C"],
        *,
        drop: Bool[Array, " B"] | None = None,
        remat: Remat | None = None,
    ) -> Condition:
        """Returns what the DiT is told of exported states.

        Rows marked by `drop`, and rows without any token, get the null condition (for classifier-free guidance).
        """
        condition = self.conditioner(states, mask, remat=remat)
        empty = ~mask.any(axis=1)
        dropped = empty if drop is None else empty | drop
        return condition.where(dropped, self.null_condition(condition))

    def null_condition(self, like: Condition) -> Condition:
        """The unconditional input, in the shapes of `like`: the one learned null token, nothing added, no fused keys."""
        null: Condition = jax.tree.map(jnp.zeros_like, like)
        if self.null_token is None:
            return null
        first = jnp.broadcast_to(jnp.arange(like.mask.shape[1]) == 0, like.mask.shape)
        tokens = jnp.broadcast_to(self.null_token[...], like.tokens.shape)
        return dataclasses.replace(null, tokens=tokens, mask=first)

    def velocity(
        self,
        latents: Float[Array, "B h w c"],
        t: Float[Array, " B"],
        condition: Condition,
        *,
        remat: Remat | None = None,
    ) -> Float[Array, "B h w c"]:
        """Returns the float32 velocity at (x_t, t)."""
        return self.dit(latents, t, condition, remat=remat)
