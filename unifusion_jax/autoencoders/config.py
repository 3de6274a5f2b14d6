"""Architecture of an AutoencoderKL, read from and written to diffusers' `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from unifusion_jax.autoencoders.latents import (
    PACK_KEY,
    LatentConfig,
    Statistics,
    check_statistics,
    default_pack,
    listed,
    read_fields,
)

PLAIN_DOWN, ATTENTION_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
PLAIN_UP, ATTENTION_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"

CLASS_NAME, FLUX2_CLASS_NAME = "AutoencoderKL", "AutoencoderKLFlux2"

_IGNORED_KEYS = frozenset({"act_fn", "sample_size", "force_upcast", "batch_norm_momentum", "patch_size"})


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(LatentConfig):
    """An image autoencoder with a Gaussian posterior: Stable Diffusion, SD3, FLUX.1, FLUX.2, LDM's kl-f16, VA-VAE.

    The latents that leave it are normalised: `(z - mean) / std`. Where mean and std come from, first match:
    `batch_norm_eps` is set (FLUX.2: running statistics stored among the weights, over the packed channels);
    `latents_mean`, `latents_std` (per channel of z, divided by `scaling_factor` as diffusers' pipelines do);
    `shift_factor` and `1 / scaling_factor`.

    Attributes:
      z_channels: channels of z, before packing (`latent_channels` in diffusers' files).
      block_out_channels: width of each resolution level, finest first; each level but the last halves the resolution.
      decoder_block_out_channels: the decoder's widths where they differ from the encoder's.
      layers_per_block: residual blocks per encoder level; the decoder has one more.
      norm_num_groups: groups of every group norm.
      mid_block_add_attention: whether the coarsest level has single-head self-attention between its residual blocks.
      use_quant_conv: whether a 1x1 convolution follows the encoder.
      use_post_quant_conv: whether a 1x1 convolution precedes the decoder.
      down_block_types: diffusers' class names of the encoder levels; all without attention when empty.
      up_block_types: likewise for the decoder, coarsest level first.
      scaling_factor: latents are z times this; None only with `batch_norm_eps`.
      shift_factor: subtracted from z before scaling.
      latents_mean: mean of each channel of z; goes with `latents_std`, excludes `shift_factor`.
      latents_std: standard deviation of each channel of z.
      pack: side in cells of the square of z cells that make one latent cell: 1 (none) or 2.
      batch_norm_eps: added to the stored variance; None for autoencoders without stored statistics.
    """

    in_channels: int = 3
    out_channels: int = 3
    z_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    pack: int = 1
    batch_norm_eps: float | None = None

    def __post_init__(self):
        levels = len(self.block_out_channels)
        if not self.down_block_types:
            object.__setattr__(self, "down_block_types", (PLAIN_DOWN,) * levels)
        if not self.up_block_types:
            object.__setattr__(self, "up_block_types", (PLAIN_UP,) * levels)
        self._check_levels(levels)
        self._check_normalisation()

    def _check_levels(self, levels: int) -> None:
        if levels < 1 or self.layers_per_block < 1:
            raise ValueError(
                f"An autoencoder needs at least one level and one layer per level, got block_out_channels="
                f"{self.block_out_channels} and layers_per_block={self.layers_per_block}."
            )
        for name, types, known in (
            ("down_block_types", self.down_block_types, (PLAIN_DOWN, ATTENTION_DOWN)),
            ("up_block_types", self.up_block_types, (PLAIN_UP, ATTENTION_UP)),
        ):
            if len(types) != levels:
                raise ValueError(
                    f"{name} must name {levels} levels like block_out_channels, got {len(types)}: {types}."
                )
            if unknown := sorted(set(types) - set(known)):
                raise ValueError(f"{name} has unsupported blocks {unknown}; supported: {list(known)}.")
        if len(self.decoder_widths) != levels:
            raise ValueError(
                f"decoder_block_out_channels must have {levels} levels like block_out_channels, got "
                f"{self.decoder_widths}."
            )
        odd = [width for width in (*self.block_out_channels, *self.decoder_widths) if width % self.norm_num_groups]
        if odd:
            raise ValueError(f"norm_num_groups={self.norm_num_groups} must divide every width, got widths {odd}.")

    def _check_normalisation(self) -> None:
        self.check_pack()
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor must be positive, got {self.scaling_factor}.")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std go together; give both or neither.")
        if self.latents_mean is None or self.latents_std is None:
            return
        if self.shift_factor is not None:
            raise ValueError("shift_factor and latents_mean both shift the latents; give one of them.")
        check_statistics(self.latents_mean, self.latents_std, self.z_channels)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Width of each decoder level, finest first."""
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def image_channels(self) -> int:
        """Channels of the images that go in."""
        return self.in_channels

    @property
    def cell_px(self) -> int:
        """Side, in pixels, of the square that one cell of z stands for."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation of z, where they are not among the weights."""
        if self.latents_mean is not None and self.latents_std is not None:
            return self.latents_mean, tuple(std / self.scaling_factor for std in self.latents_std)
        return (self.shift_factor or 0.0,), (1.0 / self.scaling_factor,)

    def with_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "AutoencoderKLConfig":
        """Returns this config with other statistics in config.json, one per channel of z."""
        return dataclasses.replace(
            self, scaling_factor=1.0, shift_factor=None, latents_mean=mean, latents_std=std, batch_norm_eps=None
        )

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], *, pack: int | None = None) -> "AutoencoderKLConfig":
        """Reads the content of the `config.json` of an AutoencoderKL or AutoencoderKLFlux2.

        Args:
          values: the JSON object.
          pack: 1 or 2; by default what the file says, else 2 where it makes the compression 16 (levels that halve the
            resolution three times, and FLUX.2), else 1.

        Raises:
          ValueError: for values that do not fit.
        """
        if values.get("act_fn", "silu") != "silu":
            raise ValueError(
                f"act_fn must be 'silu', the only activation of published weights, got {values['act_fn']!r}."
            )
        flux2 = values.get("_class_name") == FLUX2_CLASS_NAME
        given = read_fields(cls, values, renamed={"latent_channels": "z_channels"}, ignored=_IGNORED_KEYS)
        given = (_FLUX2_DEFAULTS if flux2 else _DIFFUSERS_DEFAULTS) | given
        usual_pack = _patch_side(values) if flux2 else default_pack(2 ** (len(given["block_out_channels"]) - 1))
        return cls(**given, pack=pack or values.get(PACK_KEY) or usual_pack)

    def to_diffusers(self) -> dict[str, Any]:
        """Returns the content of a `config.json` that diffusers' class of the same name loads."""
        values: dict[str, Any] = dataclasses.asdict(self)
        values["latent_channels"] = values.pop("z_channels")
        pack = values.pop("pack")
        values |= {"_class_name": FLUX2_CLASS_NAME if self.batch_norm_eps else CLASS_NAME, "act_fn": "silu"}
        if self.batch_norm_eps:
            values["patch_size"] = (pack, pack)
            for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
                del values[key]
        else:
            for key in ("batch_norm_eps", "decoder_block_out_channels"):
                del values[key]
            if pack != default_pack(self.cell_px):
                values[PACK_KEY] = pack
        return listed(values)

    @classmethod
    def flux2(cls) -> "AutoencoderKLConfig":
        """FLUX.2 (Apache-2.0): 8x with 32 channels, packed to 16x with 128; stored batch-norm statistics."""
        return cls(z_channels=32, pack=2, batch_norm_eps=1e-4)

    @classmethod
    def sd1(cls) -> "AutoencoderKLConfig":
        """Stable Diffusion 1: 8x with 4 channels, packed to 16x with 16."""
        return cls(scaling_factor=0.18215, pack=2)

    @classmethod
    def sd3(cls) -> "AutoencoderKLConfig":
        """Stable Diffusion 3: 8x with 16 channels, packed to 16x with 64."""
        return cls(
            z_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            pack=2,
        )

    @classmethod
    def flux1(cls) -> "AutoencoderKLConfig":
        """FLUX.1: the graph of SD3 with its own latent statistics."""
        return dataclasses.replace(cls.sd3(), scaling_factor=0.3611, shift_factor=0.1159)

    @classmethod
    def kl_f16(cls, z_channels: int = 16) -> "AutoencoderKLConfig":
        """LDM's kl-f16 (16 channels) and VA-VAE (32): 16x without packing, attention at the coarsest level."""
        return cls(
            z_channels=z_channels,
            block_out_channels=(128, 128, 256, 256, 512),
            down_block_types=(PLAIN_DOWN,) * 4 + (ATTENTION_DOWN,),
            up_block_types=(ATTENTION_UP,) + (PLAIN_UP,) * 4,
        )

    @classmethod
    def demo(cls) -> "AutoencoderKLConfig":
        """The bundled autoencoder: 8x with 2x2 packing, so 16x and 32 channels, small enough to train on two CPU cores."""
        return cls(z_channels=8, block_out_channels=(8, 24, 48, 64), layers_per_block=1, norm_num_groups=1, pack=2)


# What diffusers' classes assume where config.json is silent, in so far as it differs from our defaults.
_DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "scaling_factor": 0.18215,
}
_FLUX2_DEFAULTS: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "z_channels": 32, "batch_norm_eps": 1e-4}


def _patch_side(values: Mapping[str, Any]) -> int:
    patch = tuple(values.get("patch_size", (2, 2)))
    if len(set(patch)) != 1 or math.prod(patch) not in (1, 4):
        raise ValueError(f"patch_size must be [2, 2] or [1, 1], got {list(patch)}.")
    return patch[0]
