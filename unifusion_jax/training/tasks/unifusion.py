"""Training the model itself: conditioning and DiT on frozen encoder states and autoencoder latents, by flow matching."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from unifusion_jax import exported, weights
from unifusion_jax.data.buckets import Bucket
from unifusion_jax.data.images import to_pixels
from unifusion_jax.data.pipeline import BatchIterator
from unifusion_jax.data.records import Record
from unifusion_jax.encoders import EncoderBatch
from unifusion_jax.encoders.processor import Row
from unifusion_jax.evaluation.shapes import Drawing, evaluate_prompts
from unifusion_jax.flow import flow_matching_loss, loss_by_bin, sample_timesteps
from unifusion_jax.frozen import load_frozen, model_config_of
from unifusion_jax.images import grid, to_float
from unifusion_jax.model import UniFusionModel
from unifusion_jax.parallel.remat import remat as block_remat
from unifusion_jax.parallel.sharding import param_shardings
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.prompt import Prompt
from unifusion_jax.training.config import EncoderRef, TrainConfig
from unifusion_jax.training.flops import training_flops
from unifusion_jax.training.state import Params
from unifusion_jax.training.step import Sums
from unifusion_jax.training.tasks.streams import open_batches, open_mixture
from unifusion_jax.verifi import SYSTEM_PROMPTS, prompt_of

_PREVIEW_COLUMNS = 4


class Static(NamedTuple):
    """What one compiled step is specialised to."""

    task: str
    max_kept_tokens: int


class UniFusionTask:
    """Flow matching on the latents of target images, conditioned on the encoder's layer states."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config = config
        self.encoder, self.autoencoder = load_frozen(config, mesh)
        self.model_config = model_config_of(config, self.encoder.config)
        abstract = nnx.eval_shape(lambda: self._module(nnx.Rngs(0)))
        self.graphdef = nnx.graphdef(abstract)
        self.param_shardings = param_shardings(abstract, mesh)
        self.mixture = open_mixture(
            config, multiple_of_px=self.autoencoder.downsample * self.model_config.dit.patch_size
        )
        self.frozen = {"encoder": self.encoder.params, "autoencoder": self.autoencoder.params}
        tasks = sorted({bucket.task for bucket in self.mixture.buckets})
        bins = range(config.flow.loss_bins)
        self.metric_names = [*(f"loss_t{index}" for index in bins), *(f"loss_{task}" for task in tasks)]
        self.flops_per_sample: float | None = training_flops(
            self.model_config, self.mixture, self.autoencoder.downsample, config.flow.timesteps_per_sample
        )
        self._pipeline: UniFusion | None = None

    def _module(self, rngs: nnx.Rngs) -> UniFusionModel:
        return UniFusionModel(self.model_config, dtype=jnp.dtype(self.config.dtype), rngs=rngs)

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes random parameters, or reads those of `config.init_from`."""
        if self.config.init_from:
            return exported.read_params(weights.resolve(self.config.init_from), self.model_config)
        return nnx.to_pure_dict(nnx.state(self._module(nnx.Rngs(key)), nnx.Param))

    def loss(
        self, params: Params, frozen: Any, batch: dict[str, Any], key: Key[Array, ""], static: Static
    ) -> tuple[Float[Array, ""], Sums]:
        """Mean velocity error of a batch {"image": uint8 [B, h, w, 3], "prompt": EncoderBatch}."""
        flow = self.config.flow
        model = nnx.merge(self.graphdef, params)
        states = self.encoder.export_fn(frozen["encoder"], batch["prompt"], static.max_kept_tokens)
        latents = self.autoencoder.encode_fn(frozen["autoencoder"], to_float(batch["image"])).astype(jnp.float32)
        rows = latents.shape[0]
        time_key, noise_key, drop_key = jax.random.split(key, 3)

        remat = block_remat(self.config.remat)
        drop = jax.random.bernoulli(drop_key, flow.condition_dropout, (rows,))
        condition = model.condition(states.states, states.mask, drop=drop, remat=remat)
        condition, latents = jax.tree.map(
            lambda x: jnp.repeat(x, flow.timesteps_per_sample, axis=0), (condition, latents)
        )

        cells = latents.shape[1] * latents.shape[2]
        t = sample_timesteps(time_key, latents.shape[0], flow, cells)
        noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
        losses = flow_matching_loss(lambda x, t: model.velocity(x, t, condition, remat=remat), latents, noise, t)
        sums, counts = loss_by_bin(losses, t, flow.loss_bins)
        by_bin = {f"loss_t{index}": (sums[index], counts[index]) for index in range(flow.loss_bins)}
        loss = losses.mean()
        return loss, by_bin | {f"loss_{static.task}": (loss, jnp.ones(()))}

    def static(self, bucket: Bucket) -> Static:
        """Task and condition length; image sizes are array shapes."""
        return Static(bucket.task, bucket.max_kept_tokens)

    def batches(self) -> BatchIterator:
        """Opens images with their prepared prompts."""
        processor = self.encoder.processor
        tiles = self.config.data.tiles_per_image
        build = functools.partial(_build_row, processor=processor, asked=self.config.encoder, tiles_per_image=tiles)
        return open_batches(self.config, self.mixture, build, functools.partial(_collate, processor=processor))

    def pipeline(self, params: Params) -> UniFusion:
        """The inference path around these parameters."""
        if self._pipeline is None:
            self._pipeline = UniFusion(self.encoder, self.autoencoder, self.config, self.model_config, params)
        return self._pipeline.with_params(params)

    def preview(self, params: Params) -> PIL.Image.Image:
        """Draws the configured prompts, or prompts of the data, through the inference path."""
        preview = self.config.preview
        prompts: list[Prompt | str] = list(preview.prompts) or self._data_prompts(2 * _PREVIEW_COLUMNS)
        images = self.pipeline(params).generate(prompts, steps=preview.steps, guidance=preview.guidance)
        return grid(images, columns=_PREVIEW_COLUMNS)

    def _data_prompts(self, count: int) -> list[Prompt | str]:
        """Prompts of the mixture's largest stream, with their stored targets."""
        stream = max(self.mixture.streams, key=lambda stream: stream.weight)
        records = [stream.source[int(stream.indices[index % len(stream.indices)])] for index in range(count)]
        return [_prompt_of(record, self.config.encoder) for record in records]

    def evaluate(self, params: Params) -> dict[str, float]:
        """Scores held-out prompts of the built-in world, where the config asks for it."""
        evaluation = self.config.evaluation
        if not evaluation.prompts:
            return {}
        drawing = Drawing(evaluation.steps, evaluation.guidance)
        return evaluate_prompts(self.pipeline(params), drawing, count=evaluation.prompts)

    def export(self, params: Params, folder: Path) -> None:
        """Writes a folder that `UniFusion.load` reads."""
        exported.write(folder, self.config, self.model_config, params)


def _prompt_of(record: Record, asked: EncoderRef) -> Prompt:
    return prompt_of(record, SYSTEM_PROMPTS[asked.system_prompts], verifi=asked.verifi)


def _build_row(
    record: Record, bucket: Bucket, *, processor: Any, asked: EncoderRef, tiles_per_image: int
) -> tuple[np.ndarray, Row]:
    row = processor.prepare_row(_prompt_of(record, asked), max_tiles=tiles_per_image)
    processor.check_row(row, **_limits(bucket))  # here, where whoever catches it can name the record
    return to_pixels(record.image), row


def _limits(bucket: Bucket) -> dict[str, int]:
    return {"max_tokens": bucket.max_tokens, "row_tiles": bucket.max_tiles, "max_kept": bucket.max_kept_tokens}


def _collate(rows: Sequence[tuple[np.ndarray, Row]], bucket: Bucket, *, processor: Any) -> dict[str, Any]:
    prompt: EncoderBatch = processor.collate([row for _, row in rows], **_limits(bucket))
    return {"image": np.stack([image for image, _ in rows]), "prompt": prompt}
