"""What every autoencoder shares: the packing of z into latents, their normalisation, and reading config.json.

z is what the network itself makes; latents are z packed (2x2 cells into channels where that brings the compression to 16)
and normalised. Letters: B batch, h and w height and width (pixels for images, cells for z and latents), c channels.
"""

import abc
import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

# Our own key in config.json, written only where the packing differs from the default; diffusers ignores it.
PACK_KEY = "unifusion_pack"
_LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution


class Moments(NamedTuple):
    """Gaussian posterior of z: its mean and the logarithm of its variance, before normalisation and packing."""

    mean: Float[Array, "B h w c"]
    logvar: Float[Array, "B h w c"]

    @classmethod
    def split(cls, moments: Float[Array, "B h w c"]) -> "Moments":
        """Takes mean and log-variance, side by side in the channels, apart; float32, the log-variance clipped."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, *_LOGVAR_RANGE))

    def sample(self, key: PRNGKeyArray) -> Float[Array, "B h w c"]:
        """Draws z."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


def pack_cells(z: Float[Array, "B h w c"], side: int) -> Float[Array, "B h2 w2 c2"]:
    """Folds squares of side x side cells into channels, ordered (channel, row, column) as `torch.pixel_unshuffle`."""
    batch, height, width, channels = z.shape
    z = z.reshape(batch, height // side, side, width // side, side, channels)
    return z.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // side, width // side, channels * side**2)


def unpack_cells(latents: Float[Array, "B h w c"], side: int) -> Float[Array, "B h2 w2 c2"]:
    """The inverse of `pack_cells`."""
    batch, height, width, channels = latents.shape
    latents = latents.reshape(batch, height, width, channels // side**2, side, side)
    return latents.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * side, width * side, channels // side**2)


class LatentConfig(abc.ABC):
    """What the rest of the project asks of any autoencoder's architecture; each is a frozen dataclass.

    Attributes:
      z_channels: channels of z, before packing.
      pack: side in cells of the square of z cells that make one latent cell: 1 (none) or 2.
    """

    z_channels: int
    pack: int

    @property
    @abc.abstractmethod
    def cell_px(self) -> int:
        """Side, in pixels, of the square that one cell of z stands for."""

    @property
    def image_channels(self) -> int:
        """Channels of the images that go in and come out."""
        return 3

    @property
    def downsample(self) -> int:
        """Side, in pixels, of the square that one latent cell stands for, packing included."""
        return self.pack * self.cell_px

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that `encode` returns, packing included."""
        return self.z_channels * self.pack**2

    @property
    @abc.abstractmethod
    def statistics(self) -> Statistics:
        """Mean and standard deviation by which z is normalised: one entry, or one per channel of z."""

    @abc.abstractmethod
    def with_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "LatentConfig":
        """Returns this config with other statistics, one per channel of z."""

    @classmethod
    @abc.abstractmethod
    def from_diffusers(cls, values: Mapping[str, Any], *, pack: int | None = None) -> "LatentConfig":
        """Reads the content of a diffusers `config.json`; `pack` None takes what the file says, else `default_pack`."""

    @abc.abstractmethod
    def to_diffusers(self) -> dict[str, Any]:
        """Returns the content of a `config.json` that diffusers' class of the same name loads."""

    def check_pack(self) -> None:
        """Raises ValueError for a packing that does not exist."""
        if self.pack not in (1, 2):
            raise ValueError(f"pack must be 1 (none) or 2 (2x2 cells), got {self.pack}.")


def check_statistics(mean: tuple[float, ...], std: tuple[float, ...], z_channels: int) -> None:
    """Raises ValueError unless there is one mean and one positive standard deviation per channel of z."""
    lengths = (len(mean), len(std))
    if lengths != (z_channels, z_channels) or min(std) <= 0:
        raise ValueError(
            f"latents_mean and latents_std need {z_channels} entries, one per channel, and positive standard "
            f"deviations; got {lengths[0]} and {lengths[1]} entries, latents_std={std}."
        )


def default_pack(cell_px: int) -> int:
    """Packs 2x2 where that makes the compression 16, the paper's."""
    return 2 if cell_px == 8 else 1


def read_fields(
    cls: type, values: Mapping[str, Any], *, renamed: Mapping[str, str], ignored: Collection[str]
) -> dict[str, Any]:
    """Returns what `values` (a config.json) holds for the fields of the dataclass `cls`, lists as tuples.

    `renamed` maps the file's spelling of a field to ours. Keys that are neither fields nor in `ignored` are warned about.
    """
    fields = {field.name for field in dataclasses.fields(cls)} - set(renamed.values()) - {"pack"}
    known = {name: name for name in fields} | dict(renamed)
    unknown = sorted(key for key in values if not key.startswith("_") and key not in {*known, *ignored, PACK_KEY})
    if unknown:
        name = values.get("_class_name", cls.__name__)
        warnings.warn(f"config.json has keys that {name} does not know and that are left out: {unknown}", stacklevel=3)
    return {
        known[key]: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known
    }


def listed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config's values as JSON holds them: sorted by key, tuples as lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(values.items())}


class LatentModule(nnx.Module):
    """A network with `encode_z` and `decode_z`, and the packing and normalisation around them that `config` says.

    Images are float in [-1, 1]; latents are normalised and packed. `dtype` is the type of the activations; statistics
    of the norms and the softmax are float32 in any case.
    """

    config: LatentConfig
    dtype: Any

    def encode_z(self, images: Float[Array, "B h w 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B h2 w2 c"]:
        """Returns float32 z: the posterior's mean, or a sample of it when a key is given."""
        raise NotImplementedError

    def decode_z(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns float32 images from z as it is before normalisation and packing."""
        raise NotImplementedError

    def encode(self, images: Float[Array, "B h w 3"], key: PRNGKeyArray | None = None) -> Float[Array, "B h2 w2 c"]:
        """Returns normalised float32 latents: of the posterior mean, or of a sample when a key is given."""
        return self.normalise(self.encode_z(images, key))

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 3"]:
        """Returns float32 images from normalised latents."""
        return self.decode_z(self.denormalise(latents))

    def normalise(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Packs z and brings it to zero mean and unit standard deviation."""
        latents = pack_cells(z.astype(jnp.float32), self.config.pack)
        mean, std = self._statistics()
        return (latents - mean) / std

    def denormalise(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """The inverse of `normalise`."""
        mean, std = self._statistics()
        return unpack_cells(latents.astype(jnp.float32) * std + mean, self.config.pack)

    def _statistics(self) -> tuple[Float[Array, "#c"], Float[Array, "#c"]]:
        """Mean and standard deviation by which packed latents are normalised."""
        # packed channels are ordered (channel, row, column), so each statistic repeats for the cells of the square
        mean, std = (
            jnp.repeat(jnp.array(values), self.config.pack**2) if len(values) > 1 else jnp.array(values)
            for values in self.config.statistics
        )
        return mean, std
