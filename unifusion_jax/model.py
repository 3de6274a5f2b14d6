"""The trainable stack: conditioning (LAP, refiner), the null condition and the DiT, assembled from a config."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from unifusion_jax.conditioning import ConditioningConfig, LAPConditioner
from unifusion_jax.dit import DiT, DiTConfig
from unifusion_jax.layers import Remat, with_axes


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes of the trainable parameters.

    Attributes:
      num_layers: layers N that the encoder exports.
      encoder_size: encoder width H.
      conditioning: how they become condition tokens.
      dit: the diffusion transformer.
    """

    num_layers: int
    encoder_size: int
    conditioning: ConditioningConfig
    dit: DiTConfig

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
        self.conditioner = LAPConditioner(
            config.conditioning,
            num_layers=config.num_layers,
            encoder_size=config.encoder_size,
            model_size=config.dit.hidden_size,
            **options,
        )
        init = with_axes(nnx.initializers.normal(1.0), ("embed_out",))
        self.null_token = nnx.Param(init(rngs.params(), (config.dit.hidden_size,), param_dtype))
        self.dit = DiT(config.dit, **options)

    def condition(
        self,
        states: Float[Array, "B C N H"],
        mask: Bool[Array, "B C"],
        *,
        drop: Bool[Array, " B"] | None = None,
        remat: Remat | None = None,
    ) -> tuple[Float[Array, "B C D"], Bool[Array, "B C"]]:
        """Returns condition tokens and their mask.

        Rows marked by `drop`, and rows without any token, become the one learned null token (for classifier-free guidance).
        """
        tokens = self.conditioner(states, mask, remat=remat)
        empty = ~mask.any(axis=1)
        dropped = empty if drop is None else empty | drop
        null, null_mask = self.null_condition(*mask.shape)
        tokens = jnp.where(dropped[:, None, None], null.astype(tokens.dtype), tokens)
        return tokens, jnp.where(dropped[:, None], null_mask, mask)

    def null_condition(self, batch: int, tokens: int) -> tuple[Float[Array, "B C D"], Bool[Array, "B C"]]:
        """The unconditional input: the null token first, the other positions masked."""
        null = jnp.broadcast_to(self.null_token[...], (batch, tokens, self.config.dit.hidden_size))
        return null, jnp.broadcast_to(jnp.arange(tokens) == 0, (batch, tokens))

    def velocity(
        self,
        latents: Float[Array, "B h w c"],
        t: Float[Array, " B"],
        condition: Float[Array, "B C D"],
        condition_mask: Bool[Array, "B C"],
        *,
        remat: Remat | None = None,
    ) -> Float[Array, "B h w c"]:
        """Returns the float32 velocity at (x_t, t)."""
        return self.dit(latents, t, condition, condition_mask, remat=remat)
