"""Training the model itself: conditioning and DiT on frozen encoder states and autoencoder latents, by flow matching."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jax.sharding import Mesh

from unifusion_jax import exported
from unifusion_jax.data.buckets import Bucket
from unifusion_jax.data.images import to_pixels
from unifusion_jax.data.pipeline import BatchIterator
from unifusion_jax.data.records import Record
from unifusion_jax.encoders import EncoderBatch
from unifusion_jax.encoders.processor import Row
from unifusion_jax.evaluation.shapes import Drawing, evaluate_prompts
from unifusion_jax.frozen import load_frozen
from unifusion_jax.images import grid
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.prompt import Prompt
from unifusion_jax.training.config import EncoderRef, TrainConfig
from unifusion_jax.training.flops import training_flops
from unifusion_jax.training.objective import FlowMatching
from unifusion_jax.training.state import Params
from unifusion_jax.training.tasks.streams import open_batches, open_mixture
from unifusion_jax.verifi import SYSTEM_PROMPTS, prompt_of

_PREVIEW_COLUMNS = 4


class UniFusionTask(FlowMatching):
    """`FlowMatching` with the networks and the data that a config names."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        encoder, autoencoder = load_frozen(config, mesh)
        patch = config.dit.patch_size
        self.mixture = open_mixture(config, multiple_of_px=autoencoder.downsample * patch)
        super().__init__(config, mesh, encoder, autoencoder, [bucket.task for bucket in self.mixture.buckets])
        self.flops_per_sample: float | None = training_flops(
            self.model_config, self.mixture, autoencoder.downsample, config.flow.timesteps_per_sample
        )
        self._pipeline: UniFusion | None = None

    def batches(self) -> BatchIterator:
        """Opens images with their prepared prompts."""
        processor = self.encoder.processor
        tiles = self.config.data.tiles_per_image
        build = functools.partial(_build_row, processor=processor, asked=self.config.encoder, tiles_per_image=tiles)
        collate = functools.partial(_collate, processor=processor)
        return open_batches(self.config, self.mixture, build, collate, self.mesh)

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
