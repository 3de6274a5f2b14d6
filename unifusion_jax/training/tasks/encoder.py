"""Training a small InternVL from scratch to describe scenes, rewrite prompts and think edits through."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from unifusion_jax import encoders
from unifusion_jax.data.buckets import Bucket
from unifusion_jax.data.images import to_pixels
from unifusion_jax.data.pipeline import BatchIterator
from unifusion_jax.data.records import Record
from unifusion_jax.data.shapes.source import ShapesSource
from unifusion_jax.encoders import Encoder, InternVLConfig, train_tokenizer
from unifusion_jax.encoders.batch import EncoderBatch
from unifusion_jax.encoders.internvl import InternVL
from unifusion_jax.encoders.lm_loss import next_token_loss
from unifusion_jax.encoders.processor import Row
from unifusion_jax.parallel.remat import remat
from unifusion_jax.parallel.sharding import param_shardings
from unifusion_jax.prompt import Prompt
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.state import Params
from unifusion_jax.training.step import Sums
from unifusion_jax.training.tasks.streams import open_batches, open_mixture
from unifusion_jax.verifi import SYSTEM_PROMPTS, SystemPrompts

DESCRIBE_PROMPT = "Describe this image."
_VOCAB_SIZE = 1536
_TOKENIZER_RECORDS = 600
_EVALUATED_TASKS = ("text_to_image", "reconstruction", "edit", "multi_reference")


class EncoderTask:
    """Next-token loss on target descriptions, over all tasks of the data."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config = config
        self.prompts = SYSTEM_PROMPTS[config.encoder.system_prompts]
        start = encoders.load(config.init_from, dtype="float32") if config.init_from else None
        named = getattr(InternVLConfig, config.model or "demo")
        self.model_config: InternVLConfig = named(_VOCAB_SIZE) if start is None else start.config
        if not isinstance(self.model_config, InternVLConfig):
            raise ValueError(
                f"init_from={config.init_from!r} is no InternVL model, the only kind of encoder that is trained here; its "
                f"configuration is {type(self.model_config).__name__}. Other encoders are used frozen, as encoder.path."
            )
        self.mixture = open_mixture(config, multiple_of_px=self.model_config.vision.image_px)
        self.frozen = {}
        self.flops_per_sample: float | None = None
        self.metric_names = ["token_accuracy", *(f"loss_{bucket.task}" for bucket in self.mixture.buckets)]
        abstract = nnx.eval_shape(lambda: InternVL(self.model_config, rngs=nnx.Rngs(0)))
        self.graphdef = nnx.graphdef(abstract)
        self.param_shardings = param_shardings(abstract, mesh)
        self.encoder = start or Encoder.create(
            self.model_config,
            train_tokenizer(self._texts(), _VOCAB_SIZE),
            config.seed,
            system=self.prompts.text_to_image,
        )

    def _texts(self) -> list[str]:
        """What the tokenizer is trained on: the words of all sources and the system prompts."""
        texts = [*dataclasses.astuple(self.prompts), DESCRIBE_PROMPT]
        for stream in self.mixture.streams:
            for index in range(min(_TOKENIZER_RECORDS, len(stream.indices))):
                record = stream.source[int(stream.indices[index])]
                texts += [record.prompt, record.target or ""]
        return texts

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes random parameters, or takes those of `config.init_from`."""
        if self.config.init_from:
            return self.encoder.params
        return nnx.to_pure_dict(nnx.state(InternVL(self.model_config, rngs=nnx.Rngs(key)), nnx.Param))

    def loss(
        self, params: Params, frozen: Any, batch: EncoderBatch, key: Key[Array, ""], static: str
    ) -> tuple[Float[Array, ""], Sums]:
        """Mean cross-entropy over target tokens, in nats."""
        loss, parts = next_token_loss(nnx.merge(self.graphdef, params), batch, remat=remat(self.config.remat))
        count = parts["target_tokens"]
        return loss, {
            "token_accuracy": (parts["token_accuracy"] * count, count),
            f"loss_{static}": (loss * count, count),
        }

    def static(self, bucket: Bucket) -> str:
        """The task, under whose name the loss is logged."""
        return bucket.task

    def batches(self) -> BatchIterator:
        """Opens prompts with their target descriptions."""
        processor = self.encoder.processor
        build = functools.partial(_build_row, processor=processor, prompts=self.prompts)
        return open_batches(self.config, self.mixture, build, functools.partial(_collate, processor=processor))

    def preview(self, params: Params) -> PIL.Image.Image | None:
        """A language model draws nothing."""
        return None

    def evaluate(self, params: Params, count: int | None = None) -> dict[str, float]:
        """Share of held-out records of each task whose decoded description is right.

        With pictures the description must be the target word for word. A short prompt leaves things open, so there every
        fact that it states must hold in the description.
        """
        count = self.config.evaluation.prompts if count is None else count
        encoder = self.encoder.with_params(params)
        scores = {}
        for task in _EVALUATED_TASKS:
            records = ShapesSource(task, split="held_out", seed=1)
            chosen = [records[index] for index in range(count)]
            texts = []
            for start in range(0, count, 64):
                asked = [target_prompt(record, self.prompts) for record in chosen[start : start + 64]]
                texts += encoder.rewrite(asked, max_new_tokens=80).texts
            right = [_is_right(text, record, self.prompts) for text, record in zip(texts, chosen, strict=True)]
            if right:
                scores[f"{task}_right"] = float(np.mean(right))
        return scores

    def export(self, params: Params, folder: Path) -> None:
        """Writes a transformers folder in bfloat16."""
        halved = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), params)
        self.encoder.with_params(halved).save(folder)


def target_prompt(record: Record, prompts: SystemPrompts) -> Prompt:
    """Returns the prompt that asks for a record's description, with the description as its target."""
    images = [PIL.Image.fromarray(to_pixels(image)) for image in record.images]
    system = prompts.of(record.task)
    if record.task == "reconstruction":  # the picture conditions the DiT alone, but the encoder learns to see from it
        return Prompt(DESCRIBE_PROMPT, images, target=record.facts["scene"], system=system)
    return Prompt(record.prompt, images, target=record.target, system=system)


def _build_row(record: Record, bucket: Bucket, *, processor: Any, prompts: SystemPrompts) -> Row:
    # Mostly the full 10 tiles, sometimes 5 or 1: all must be readable. The record's id decides, so a restart agrees.
    roll = zlib.crc32(record.id.encode()) % 10
    tiles = 9 if roll < 7 else 4 if roll < 9 else 1
    row = processor.prepare_row(target_prompt(record, prompts), max_tiles=tiles)
    processor.check_row(row, **_limits(bucket))  # here, where whoever catches it can name the record
    return row


def _limits(bucket: Bucket) -> dict[str, int]:
    return {"max_tokens": bucket.max_tokens, "row_tiles": bucket.max_tiles}


def _collate(rows: Sequence[Row], bucket: Bucket, *, processor: Any) -> EncoderBatch:
    return processor.collate(rows, **_limits(bucket))


def _is_right(text: str, record: Record, prompts: SystemPrompts) -> bool:
    from unifusion_jax.data.shapes.detector import detect
    from unifusion_jax.data.shapes.language import Fact, parse_description
    from unifusion_jax.data.shapes.render import render
    from unifusion_jax.data.shapes.scoring import score

    if record.task != "text_to_image":
        return text == target_prompt(record, prompts).target
    try:
        scene = parse_description(text)
    except ValueError:
        return False
    stated = [Fact(**entry) for entry in record.facts["stated"]]
    return score(stated, detect(render(scene))).all_correct
