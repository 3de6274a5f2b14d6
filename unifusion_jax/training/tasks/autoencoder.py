"""Training an autoencoder from scratch, as the bundled demo one was."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from unifusion_jax import autoencoders
from unifusion_jax.autoencoders import Autoencoder, AutoencoderKLConfig
from unifusion_jax.autoencoders.kl import AutoencoderKL
from unifusion_jax.autoencoders.loss import autoencoder_loss
from unifusion_jax.data.buckets import Bucket, Budget
from unifusion_jax.data.pipeline import BatchIterator
from unifusion_jax.data.records import TASKS, Record
from unifusion_jax.images import grid, to_float, to_pil
from unifusion_jax.parallel.hosts import to_host
from unifusion_jax.parallel.sharding import param_shardings
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.rng import stream_key
from unifusion_jax.training.state import Params
from unifusion_jax.training.task import Sums
from unifusion_jax.training.tasks.streams import open_batches, open_mixture

_NAMES = ["l1", "l2", "gradient", "kl", "psnr_db", "latent_std"]
_STATISTICS_BATCHES = 32


class AutoencoderTask:
    """Reconstruction of pictures; see `unifusion_jax.autoencoders.loss`."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self._start = autoencoders.load(config.init_from) if config.init_from else None
        named = getattr(AutoencoderKLConfig, config.model or "demo")
        model_config = named() if self._start is None else self._start.config
        if not isinstance(model_config, AutoencoderKLConfig):
            raise ValueError(
                f"init_from={config.init_from!r} is no AutoencoderKL, the only kind that is trained here; its configuration is "
                f"{type(model_config).__name__}. Other autoencoders are used frozen, as autoencoder.path."
            )
        self.model_config = model_config
        self.metric_names = list(_NAMES)
        self.frozen = {}
        self.flops_per_sample: float | None = None
        abstract = nnx.eval_shape(lambda: AutoencoderKL(self.model_config, rngs=nnx.Rngs(0)))
        self.graphdef = nnx.graphdef(abstract)
        self.param_shardings = param_shardings(abstract, mesh)
        # No prompt is read here, so the token budget is the least there is.
        budgets = {task: Budget(max_tokens=1, max_tiles=0, max_kept_tokens=1) for task in TASKS}
        self.mixture = open_mixture(config, multiple_of_px=self.model_config.downsample, budgets=budgets)

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes random parameters, or takes those of `config.init_from`."""
        if self._start is not None:
            return self._start.params
        return nnx.to_pure_dict(nnx.state(AutoencoderKL(self.model_config, rngs=nnx.Rngs(key)), nnx.Param))

    def draw(self, batch: Any, key: Key[Array, ""], static: Any) -> Key[Array, ""]:
        """The loss draws as it goes, where it draws at all."""
        return key

    def loss(
        self, params: Params, frozen: Any, batch: Any, draws: Key[Array, ""], static: None
    ) -> tuple[Float[Array, ""], Sums]:
        """Reconstruction loss of uint8 images [B, h, w, 3]."""
        loss, parts = autoencoder_loss(nnx.merge(self.graphdef, params), to_float(batch), draws)
        return loss, {name: (parts[name], jnp.ones(())) for name in _NAMES}

    def static(self, bucket: Bucket) -> None:
        """Array shapes say all there is to know."""

    def batches(self) -> BatchIterator:
        """Opens the pictures."""
        crop = functools.partial(_crop_of, crop_px=self.config.data.crop_px)
        build = crop if self.config.data.crop_px else _image_of
        return open_batches(self.config, self.mixture, build, _stack, self.mesh)

    def preview(self, params: Params) -> PIL.Image.Image:
        """Draws pictures above their reconstructions."""
        with open_batches(self.config, self.mixture, _image_of, _stack) as batches:
            images = next(batches).data[:8]
        decoded = self._autoencoder(params)
        restored = decoded.decode(decoded.encode(to_float(images)))
        return grid([*to_pil(images), *to_pil(restored)], columns=len(images))

    def evaluate(self, params: Params) -> dict[str, float]:
        """Peak signal-to-noise ratio of unseen pictures, through the posterior mean, in decibels."""
        autoencoder = self._autoencoder(params)
        errors = []
        with self._unseen() as batches:
            for _ in range(4):
                images = to_float(next(batches).data)
                errors.append(
                    np.square(to_host(autoencoder.decode(autoencoder.encode(images)) - images)).mean((1, 2, 3))
                )
        return {"psnr_db": float(np.mean(10 * np.log10(4.0 / np.concatenate(errors))))}

    def export(self, params: Params, folder: Path) -> None:
        """Measures the latents' statistics and writes a diffusers folder in bfloat16."""
        with self._unseen() as batches:
            images = [np.asarray(to_float(next(batches).data)) for _ in range(_STATISTICS_BATCHES)]
        measured = self._autoencoder(params).with_latent_statistics(images)
        measured.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), measured.params)).save(folder)

    def _autoencoder(self, params: Params) -> Autoencoder:
        return Autoencoder(self.model_config, params)

    def _unseen(self) -> BatchIterator:
        """A stream under another seed: of endless sources, pictures that training does not see."""
        seed = int(jax.random.bits(stream_key(self.config.seed, "evaluation"), dtype=jnp.uint16))
        return open_batches(dataclasses.replace(self.config, seed=seed), self.mixture, _image_of, _stack)


def _image_of(record: Record, bucket: Bucket) -> np.ndarray:
    return record.image


def _crop_of(record: Record, bucket: Bucket, *, crop_px: int) -> np.ndarray:
    image = record.image
    rows, columns = (side - crop_px + 1 for side in image.shape[:2])
    place = zlib.crc32(record.id.encode())  # the record decides, so a restart cuts the same
    top, left = place % rows, place // rows % columns
    return image[top : top + crop_px, left : left + crop_px]


def _stack(rows: Sequence[np.ndarray], bucket: Bucket) -> np.ndarray:
    return np.stack(rows)
