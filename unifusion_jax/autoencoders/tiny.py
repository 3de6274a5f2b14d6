"""AutoencoderTiny (TAESD, github.com/madebyollin/taesd): a distilled autoencoder for cheap previews.

It reads and writes the latents of the autoencoder that it was distilled from, so it takes that one's place for previews.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from unifusion_jax.autoencoders.blocks import Makers, Numbered
from unifusion_jax.autoencoders.latents import (
    PACK_KEY,
    LatentConfig,
    LatentModule,
    Statistics,
    default_pack,
    listed,
    read_fields,
)

CLASS_NAME = "AutoencoderTiny"
_ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "swish": jax.nn.silu, "mish": jax.nn.mish}
_FIXED = {"upsample_fn": "nearest", "upsampling_scaling_factor": 2}
# Of the round trip through bytes, tiled decoding in diffusers and its habit of listing widths twice.
_IGNORED_KEYS = frozenset({"latent_magnitude", "latent_shift", "force_upcast", "block_out_channels", *_FIXED})


@dataclasses.dataclass(frozen=True)
class AutoencoderTinyConfig(LatentConfig):
    """Plain convolutions with a short residual block, no norms, no attention, no posterior.

    Attributes:
      in_channels: channels of the images that go in.
      out_channels: channels of the images that come out.
      z_channels: channels of z, before packing (`latent_channels` in diffusers' files).
      encoder_block_out_channels: width of each encoder stage, finest first; all are equal.
      decoder_block_out_channels: width of each decoder stage, coarsest first; all are equal.
      num_encoder_blocks: residual blocks of each encoder stage; each stage but the first starts by halving the resolution.
      num_decoder_blocks: residual blocks of each decoder stage; each stage but the last ends by doubling it.
      act_fn: activation between convolutions.
      scaling_factor: latents are z times this.
      shift_factor: subtracted from z before scaling.
      pack: side in cells of the square of z cells that make one latent cell: 1 (none) or 2.
    """

    in_channels: int = 3
    out_channels: int = 3
    z_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    act_fn: str = "relu"
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    pack: int = 1

    def __post_init__(self):
        self.check_pack()
        if self.act_fn not in _ACTIVATIONS:
            raise ValueError(f"act_fn must be one of {sorted(_ACTIVATIONS)}, got {self.act_fn!r}.")
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor must be positive, got {self.scaling_factor}.")
        for side in ("encoder", "decoder"):
            widths, depths = getattr(self, f"{side}_block_out_channels"), getattr(self, f"num_{side}_blocks")
            if not widths or len(widths) != len(depths) or len(set(widths)) != 1:
                raise ValueError(
                    f"{side}_block_out_channels must hold one width, the same for each of the {len(depths)} stages of "
                    f"num_{side}_blocks, got {widths}."
                )
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise ValueError(
                "Encoder and decoder must have the same number of stages, got "
                f"{len(self.num_encoder_blocks)} and {len(self.num_decoder_blocks)}."
            )

    @property
    def image_channels(self) -> int:
        """Channels of the images that go in."""
        return self.in_channels

    @property
    def cell_px(self) -> int:
        """Side, in pixels, of the square that one cell of z stands for."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation by which z is normalised; as published none, for z is made normalised."""
        return (self.shift_factor,), (1.0 / self.scaling_factor,)

    def with_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "AutoencoderTinyConfig":
        """Always raises ValueError: these latents are those of another autoencoder, and config.json has no place for them."""
        raise ValueError(f"{CLASS_NAME} shares the latents of the autoencoder it was distilled from; measure that one.")

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], *, pack: int | None = None) -> "AutoencoderTinyConfig":
        """Reads the content of the `config.json` of an AutoencoderTiny.

        `pack` is 1 or 2; by default what the file says, else 2 where it makes the compression 16, like the autoencoders
        that it previews.

        Raises:
          ValueError: for values that do not fit.
        """
        for key, expected in _FIXED.items():
            if values.get(key, expected) != expected:
                raise ValueError(f"{key} must be {expected!r}, as in all published weights, got {values[key]!r}.")
        given = read_fields(cls, values, renamed={"latent_channels": "z_channels"}, ignored=_IGNORED_KEYS)
        config = cls(**given)
        return dataclasses.replace(config, pack=pack or values.get(PACK_KEY) or default_pack(config.cell_px))

    def to_diffusers(self) -> dict[str, Any]:
        """Returns the content of a `config.json` that diffusers' class of the same name loads."""
        values: dict[str, Any] = dataclasses.asdict(self) | {"_class_name": CLASS_NAME} | _FIXED
        values["latent_channels"] = values.pop("z_channels")
        pack = values.pop("pack")
        if pack != default_pack(self.cell_px):
            values[PACK_KEY] = pack
        return listed(values)

    @classmethod
    def taesd(cls, z_channels: int = 4) -> "AutoencoderTinyConfig":
        """TAESD for the latents of Stable Diffusion 1 and XL (4 channels), TAESD3 and TAEF1 for SD3 and FLUX.1 (16)."""
        return cls(z_channels=z_channels, pack=2)


class _Activation(nnx.Module):
    def __init__(self, name: str):
        self.name = name

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        return _ACTIVATIONS[self.name](x)


class _Doubled(nnx.Module):
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c"]:
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Sequence(nnx.Module):
    """Modules run in turn, under `layers`; those without weights hold a number too, as in diffusers' files."""

    def __init__(self, modules: list[nnx.Module]):
        self.layers = Numbered(modules)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Runs them."""
        for module in self.layers:
            x = module(x)
        return x


class TinyBlock(nnx.Module):
    """Three convolutions, added to their input and rectified."""

    def __init__(self, channels: int, act_fn: str, make: Makers):
        convs = [make.conv(channels, channels, 3) for _ in range(3)]
        self.conv = Numbered([convs[0], _Activation(act_fn), convs[1], _Activation(act_fn), convs[2]])

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Keeps resolution and width."""
        y = x
        for module in self.conv:
            y = module(y)
        return jax.nn.relu(x + y)


class AutoencoderTiny(LatentModule):
    """Encoder and decoder as `config` says."""

    def __init__(
        self, config: AutoencoderTinyConfig, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        self.dtype = dtype
        make = Makers(dtype, param_dtype, rngs)
        width = config.encoder_block_out_channels[0]
        layers: list[nnx.Module] = []
        for stage, depth in enumerate(config.num_encoder_blocks):
            if stage == 0:
                layers.append(make.conv(config.in_channels, width, 3))
            else:  # zeros on every side, unlike the halving of the other autoencoders
                layers.append(make.conv(width, width, 3, stride_px=2, padding=((1, 1), (1, 1)), bias=False))
            layers += [TinyBlock(width, config.act_fn, make) for _ in range(depth)]
        self.encoder = Sequence([*layers, make.conv(width, config.z_channels, 3)])

        width = config.decoder_block_out_channels[0]
        layers = [make.conv(config.z_channels, width, 3), _Activation(config.act_fn)]
        for depth in config.num_decoder_blocks[:-1]:
            layers += [TinyBlock(width, config.act_fn, make) for _ in range(depth)]
            layers += [_Doubled(), make.conv(width, width, 3, bias=False)]
        layers += [TinyBlock(width, config.act_fn, make) for _ in range(config.num_decoder_blocks[-1])]
        self.decoder = Sequence([*layers, make.conv(width, config.out_channels, 3)])

    def encode_z(self, images: Float[Array, "B h w c"], key: PRNGKeyArray | None = None) -> Float[Array, "B h2 w2 c2"]:
        """Returns float32 z. There is no posterior: a key changes nothing."""
        return self.encoder((images.astype(self.dtype) + 1.0) / 2.0).astype(jnp.float32)

    def decode_z(self, z: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 c2"]:
        """Returns float32 images, not clipped, from z softly limited to [-3, 3]."""
        z = z.astype(self.dtype)
        return self.decoder(jnp.tanh(z / 3.0) * 3.0).astype(jnp.float32) * 2.0 - 1.0
