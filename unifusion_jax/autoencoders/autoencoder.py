"""The autoencoder as the rest of the project uses it: a parameter tree and two pure functions."""

import functools
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from unifusion_jax import weights
from unifusion_jax.autoencoders.config import AutoencoderKLConfig
from unifusion_jax.autoencoders.families import config_of, family_of
from unifusion_jax.autoencoders.latents import LatentConfig, LatentModule
from unifusion_jax.autoencoders.tiling import decode_within
from unifusion_jax.autoencoders.wan_config import AutoencoderKLWanConfig
from unifusion_jax.layers import ShapesOnly
from unifusion_jax.parallel.sharding import param_shardings

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

Params = dict[str, Any]


class Autoencoder:
    """Images to normalised latents and back. Make one with `load` or `Autoencoder.create`.

    `encode` and `decode` are for host code: they check sizes and are compiled. Inside a compiled step, use `encode_fn`
    and `decode_fn` with `params` passed as an argument, so that the weights do not become constants of the program.

    Attributes:
      config: the architecture.
      params: pure nested dict of arrays; for FLUX.2 with the stored latent statistics (`bn`), which get no gradient.
      graphdef: with which `nnx.merge(graphdef, params)` rebuilds the network.
      dtype: type of the activations.
    """

    def __init__(self, config: LatentConfig, params: Params, *, dtype: Any = "float32"):
        self.config = config
        self.params = params
        self.dtype = jnp.dtype(dtype)
        self.graphdef = nnx.graphdef(abstract_autoencoder(config, self.dtype))

    @classmethod
    def create(cls, config: LatentConfig, seed: int = 0) -> "Autoencoder":
        """Makes an autoencoder with random float32 weights, to be trained."""

        @jax.jit
        def init(key: jax.Array) -> Params:
            return nnx.to_pure_dict(nnx.state(family_of(config).module(config, rngs=nnx.Rngs(key))))

        return cls(config, init(jax.random.key(seed)))

    @property
    def downsample(self) -> int:
        """Side, in pixels, of the square that one latent cell stands for."""
        return self.config.downsample

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.config.latent_channels

    def module(self, params: Params | None = None) -> LatentModule:
        """Returns the network with these parameters (by default its own)."""
        return nnx.merge(self.graphdef, self.params if params is None else params)

    def with_params(self, params: Params) -> "Autoencoder":
        """Returns this autoencoder with other parameters, for example trained ones."""
        return type(self)(self.config, params, dtype=self.dtype)

    def encode_fn(self, params: Params, images: Float[Array, "B h w 3"]) -> Float[Array, "B h2 w2 c"]:
        """Pure function behind `encode`, for use in compiled code."""
        self._check_images(images)
        return _encode(self.graphdef, params, images)

    def decode_fn(
        self, params: Params, latents: Float[Array, "B h w c"], max_bytes: int | None = None
    ) -> Float[Array, "B h2 w2 3"]:
        """Pure function behind `decode`, for use in compiled code."""
        self._check_latents(latents)
        return _decode(self.graphdef, max_bytes, params, latents)

    def encode(self, images: Any) -> Float[Array, "B h2 w2 c"]:
        """Returns normalised float32 latents [B, h / downsample, w / downsample, latent_channels].

        They are those of the posterior's mean, where there is a posterior. `images` is a float array [B, h, w, 3] in [-1, 1].

        Raises:
          ValueError: for another rank or dtype, and for sides that `downsample` does not divide.
        """
        self._check_images(images)
        return _encode(self.graphdef, self.params, images)

    def decode(self, latents: Any, *, max_bytes: int | None = None) -> Float[Array, "B h2 w2 3"]:
        """Returns float32 images [B, h * downsample, w * downsample, 3], about [-1, 1]; Wan and Qwen-Image clip to it.

        With `max_bytes`, at most that much is held in activations (weights and the result not counted; an estimate with a
        margin, see `tiling.needed_bytes`). A batch that fits is decoded whole and is bit for bit what it is without
        `max_bytes`. Else images are decoded one by one, and an image that does not fit alone in overlapping tiles: a
        quarter of a tile is shared by neighbours and blended. Where a network looks at the whole image (group norm,
        attention), a tile sees less: on random weights, tiled images and the steps between their neighbouring pixels
        differ from whole ones by up to 7 % in the root mean square; AutoencoderTiny, which only convolves, by rounding.

        Raises:
          ValueError: when `latents` is not a float array [B, h, w, latent_channels], and when `max_bytes` is less than the
            smallest tile needs.
        """
        self._check_latents(latents)
        return _decode(self.graphdef, max_bytes, self.params, latents)

    def with_latent_statistics(self, batches: Iterable[Any]) -> "Autoencoder":
        """Returns this autoencoder with latents of zero mean and unit standard deviation per channel on `batches`.

        Call it once after training, with float image batches [B, h, w, 3] in [-1, 1] (a few thousand images). The
        measured values go where diffusers keeps them: `latents_mean` and `latents_std` of config.json with
        `scaling_factor` 1, or for FLUX.2 the stored running statistics.
        """
        config = self.config
        total, squares, cells = np.zeros(config.latent_channels), np.zeros(config.latent_channels), 0
        plain = config.with_statistics((0.0,) * config.z_channels, (1.0,) * config.z_channels)
        measured = type(self)(plain, {k: v for k, v in self.params.items() if k != "bn"}, dtype=self.dtype)
        for images in batches:
            latents = np.asarray(measured.encode(images), np.float64).reshape(-1, config.latent_channels)
            total, squares, cells = total + latents.sum(0), squares + np.square(latents).sum(0), cells + len(latents)
        if cells < 2:
            raise ValueError("Latent statistics need at least two latent cells, got none or one; pass some images.")
        mean = total / cells
        variance = np.maximum(squares / cells - np.square(mean), 1e-8)
        if isinstance(config, AutoencoderKLConfig) and config.batch_norm_eps is not None:
            bn = {"running_mean": jnp.asarray(mean, jnp.float32), "running_var": jnp.asarray(variance, jnp.float32)}
            return type(self)(config, self.params | {"bn": bn}, dtype=self.dtype)
        # one statistic per channel of z: average over the cells that are packed together
        mean, square = (x.reshape(config.z_channels, -1).mean(1) for x in (mean, squares / cells))
        std = np.sqrt(np.maximum(square - np.square(mean), 1e-8))
        fitted = config.with_statistics(tuple(mean.tolist()), tuple(std.tolist()))
        return type(self)(fitted, self.params, dtype=self.dtype)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that diffusers' class of the same name loads: config.json and one safetensors file.

        Of Wan and Qwen-Image only what acts on still images is known here. The rest of each kernel over time is written as
        zeros, with a warning: the folder serves still images, and videos no longer.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        family = family_of(self.config)
        tensors = weights.to_tensors(self.params, family.rules(self.params))
        for name, (shape, dtype) in family.stored(list(tensors)).items():
            tensors[name] = np.zeros(shape, dtype)
        if isinstance(self.config, AutoencoderKLWanConfig) and self.config.stores_time:
            warnings.warn(
                f"{folder} serves still images only: the parts of {self.config.class_name} that act over time were not "
                "kept, and zeros stand in their place. Do not overwrite a video autoencoder with it.",
                stacklevel=2,
            )
        weights.save(tensors, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config.to_diffusers(), indent=2) + "\n", encoding="utf-8")

    def _check_images(self, images: Any) -> None:
        _check_array("images", images, self.config.image_channels)
        height, width = images.shape[1:3]
        if height % self.downsample or width % self.downsample or not height or not width:
            raise ValueError(
                f"Image sides must be multiples of {self.downsample} px (the autoencoder's downsample), got {height} x "
                f"{width} px. Crop or resize the images, e.g. to {_nearest(height, self.downsample)} x "
                f"{_nearest(width, self.downsample)} px."
            )

    def _check_latents(self, latents: Any) -> None:
        _check_array("latents", latents, self.latent_channels)


def read_config(path: str | os.PathLike[str], *, pack: int | None = None) -> LatentConfig:
    """Reads an autoencoder's sizes from its `config.json`, without its weights; see `load`."""
    folder = weights.resolve(path, subfolder="vae")
    return config_of(weights.read_json(folder / CONFIG_FILE), pack=pack)


def load(
    path: str | os.PathLike[str], *, dtype: Any = "float32", mesh: Mesh | None = None, pack: int | None = None
) -> Autoencoder:
    """Loads a diffusers autoencoder; `config.json` decides the class.

    Args:
      path: folder or hub id; of a whole pipeline's folder, the `vae` subfolder is taken. The weights may be named as in
        diffusers, old or new, and those of an AutoencoderKL also as in the original LDM, FLUX.1 and FLUX.2 files. Of the
        video autoencoders Wan and Qwen-Image, what acts on still images is taken.
      dtype: type of the weights and activations.
      mesh: the weights are spread over its devices where their channels divide; None for the default device.
      pack: side of the squares of z cells that make one latent cell, 1 or 2. By default what config.json says (a key of
        ours), else 2 where it brings the compression from 8 to 16.

    Raises:
      FileNotFoundError: where the folder, config.json or the weights are missing.
      ValueError: for an unsupported class, and for weights that are truncated or do not fit config.json.
    """
    folder = weights.resolve(path, subfolder="vae")
    config = read_config(folder, pack=pack)
    family = family_of(config)
    dtype = jnp.dtype(dtype)
    abstract = nnx.to_pure_dict(nnx.state(abstract_autoencoder(config, dtype)))
    # Each convolution gathers its kernel when it runs; what no axis divides is small.
    shardings = None if mesh is None else param_shardings(abstract_autoencoder(config, dtype), mesh)
    params = weights.load(
        abstract,
        weights.SafetensorsFolder(folder),
        family.rules(abstract),
        rename=family.rename,
        shardings=shardings,
    )
    return Autoencoder(config, params, dtype=dtype)


# Compiled once per architecture and shape, whatever the number of `Autoencoder`s.
@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: Any, params: Params, images: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
    return nnx.merge(graphdef, params).encode(images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
    graphdef: Any, max_bytes: int | None, params: Params, latents: Float[Array, "B h w c"]
) -> Float[Array, "B h2 w2 c2"]:
    decode = nnx.merge(graphdef, params).decode
    return decode(latents) if max_bytes is None else decode_within(decode, latents, max_bytes)


@functools.cache
def abstract_autoencoder(config: LatentConfig, dtype: Any) -> LatentModule:
    """Returns the network with shapes in the place of parameters."""
    # Latent statistics stay float32: they are 128 numbers, and bfloat16 would shift every latent.
    module = family_of(config).module
    return nnx.eval_shape(lambda: module(config, dtype=dtype, param_dtype=dtype, rngs=ShapesOnly()))


def _check_array(name: str, value: Any, channels: int) -> None:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None or len(shape) != 4 or shape[-1] != channels:
        raise ValueError(f"{name} must be an array [batch, height, width, {channels}], got shape {shape}.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating point ({dtype} given); bring 8-bit images to [-1, 1] by x / 127.5 - 1."
        )


def _nearest(side: int, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
