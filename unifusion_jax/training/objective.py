"""What one step of training the model computes: shapes, shardings and the loss, without data and without weights.

The training task adds data to it; `unifusion_jax.plan` compiles it for chips that are not here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from unifusion_jax import exported, weights
from unifusion_jax.autoencoders import Autoencoder
from unifusion_jax.data.buckets import Bucket
from unifusion_jax.encoders import Encoder
from unifusion_jax.flow import flow_matching_loss, loss_by_bin, sample_timesteps
from unifusion_jax.frozen import model_config_of
from unifusion_jax.images import to_float
from unifusion_jax.model import UniFusionModel
from unifusion_jax.parallel.remat import remat as block_remat
from unifusion_jax.parallel.sharding import AnyMesh, constrain, param_shardings
from unifusion_jax.parallel.target import compiling_for
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.state import Params
from unifusion_jax.training.task import Sums


class Static(NamedTuple):
    """What one compiled step is specialised to."""

    task: str
    max_kept_tokens: int


class FlowMatching:
    """Flow matching on the latents of target images, conditioned on the encoder's layer states.

    Attributes:
      config: of the run.
      encoder: frozen; its parameters may be shapes.
      autoencoder: likewise.
      mesh: the devices, here or described.
      model_config: sizes of what is trained.
      param_shardings: tree of shardings of the trained parameters.
      frozen: the frozen parameters.
      metric_names: metrics that `loss` returns.
    """

    def __init__(
        self, config: TrainConfig, mesh: AnyMesh, encoder: Encoder, autoencoder: Autoencoder, tasks: Sequence[str]
    ):
        self.config = config
        self.mesh: Any = mesh
        self.encoder, self.autoencoder = encoder, autoencoder
        self.model_config = model_config_of(config, encoder.config)
        abstract = nnx.eval_shape(lambda: self._module(nnx.Rngs(0)))
        self.graphdef = nnx.graphdef(abstract)
        self.param_shardings = param_shardings(abstract, mesh)
        self.frozen: Any = {"encoder": encoder.params, "autoencoder": autoencoder.params}
        bins = range(config.flow.loss_bins)
        self.metric_names = [*(f"loss_t{index}" for index in bins), *(f"loss_{task}" for task in sorted(set(tasks)))]

    def _module(self, rngs: nnx.Rngs) -> UniFusionModel:
        return UniFusionModel(self.model_config, dtype=jnp.dtype(self.config.dtype), rngs=rngs)

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes random parameters, or reads those of `config.init_from`."""
        if self.config.init_from:
            return exported.read_params(weights.resolve(self.config.init_from), self.model_config)
        return nnx.to_pure_dict(nnx.state(self._module(nnx.Rngs(key)), nnx.Param))

    def draw(self, batch: dict[str, Any], key: Key[Array, ""], static: Static) -> dict[str, Array]:
        """Draws times, noise and dropped conditions of a batch: {"t": [B, R], "noise": [B, R, h, w, c], "drop": [B]}.

        R are `flow.timesteps_per_sample`. They are drawn for a whole batch and cut with it where gradients are accumulated,
        so the parts of a batch see what the batch would.
        """
        flow = self.config.flow
        rows, height_px, width_px, _ = batch["image"].shape
        down, repeats = self.autoencoder.downsample, flow.timesteps_per_sample
        height, width = height_px // down, width_px // down
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        t = sample_timesteps(time_key, rows * repeats, flow, height * width)
        noise = jax.random.normal(
            noise_key, (rows * repeats, height, width, self.autoencoder.latent_channels), jnp.float32
        )
        with compiling_for(self.mesh):
            noise = constrain(noise.reshape(rows, repeats, *noise.shape[1:]), "batch", *(None,) * 4)
        return {
            "t": t.reshape(rows, repeats),
            "noise": noise,
            "drop": jax.random.bernoulli(drop_key, flow.condition_dropout, (rows,)),
        }

    def loss(
        self, params: Params, frozen: Any, batch: dict[str, Any], draws: dict[str, Array], static: Static
    ) -> tuple[Float[Array, ""], Sums]:
        """Mean velocity error of a batch {"image": uint8 [B, h, w, 3], "prompt": EncoderBatch} with its draws."""
        with compiling_for(self.mesh, kernel=self.config.attention):
            return self._loss(params, frozen, batch, draws, static)

    def _loss(
        self, params: Params, frozen: Any, batch: dict[str, Any], draws: dict[str, Array], static: Static
    ) -> tuple[Float[Array, ""], Sums]:
        flow = self.config.flow
        model = nnx.merge(self.graphdef, params)
        states = self.encoder.export_fn(frozen["encoder"], batch["prompt"], static.max_kept_tokens)
        images = constrain(to_float(batch["image"]), "batch", None, None, None)
        latents = self.autoencoder.encode_fn(frozen["autoencoder"], images).astype(jnp.float32)

        remat = block_remat(self.config.remat)
        condition = model.condition(states.states, states.mask, drop=draws["drop"], remat=remat)
        condition, latents = jax.tree.map(
            lambda x: jnp.repeat(x, flow.timesteps_per_sample, axis=0), (condition, latents)
        )
        t, noise = draws["t"].reshape(-1), draws["noise"].reshape(latents.shape)
        losses = flow_matching_loss(lambda x, t: model.velocity(x, t, condition, remat=remat), latents, noise, t)
        sums, counts = loss_by_bin(losses, t, flow.loss_bins)
        by_bin = {f"loss_t{index}": (sums[index], counts[index]) for index in range(flow.loss_bins)}
        loss = losses.mean()
        return loss, by_bin | {f"loss_{static.task}": (loss, jnp.ones(()))}

    def static(self, bucket: Bucket) -> Static:
        """Task and condition length; image sizes are array shapes."""
        return Static(bucket.task, bucket.max_kept_tokens)
