"""Architecture of the Wan and Qwen-Image autoencoders, read from and written to diffusers' `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from unifusion_jax.autoencoders import wan_statistics
from unifusion_jax.autoencoders.latents import (
    PACK_KEY,
    LatentConfig,
    Statistics,
    check_statistics,
    default_pack,
    listed,
    read_fields,
)

WAN, QWEN_IMAGE, QWEN_IMAGE21 = "AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21"

_RENAMED = {"z_dim": "z_channels", "temperal_downsample": "temporal_downsample"}
_IGNORED_KEYS = frozenset({"attn_scales", "dropout", "scale_factor_temporal", "scale_factor_spatial", "clip_output"})


@dataclasses.dataclass(frozen=True)
class AutoencoderKLWanConfig(LatentConfig):
    """A video autoencoder with causal convolutions, of which only the part that acts on a still image is kept.

    One class serves Wan 2.1, Wan 2.2, Qwen-Image and Qwen-Image 2.1. Causal convolutions see two frames of zeros before
    a single frame, so of each kernel only the last temporal slice acts, and the convolutions over time are never run.

    Attributes:
      class_name: diffusers' class, which says how config.json and the weights spell the same network.
      base_dim: unit of the encoder's widths.
      decoder_base_dim: unit of the decoder's widths where it differs.
      z_channels: channels of z (`z_dim` in diffusers' files).
      dim_mult: width of each resolution level in units, finest first; each level but the last halves the resolution.
      num_res_blocks: residual blocks per encoder level; the decoder has one more.
      temporal_downsample: which levels also halve the frame rate of videos. On a still image it decides the weights of
        the averaged shortcuts (`is_residual`) and which convolutions over time a file holds.
      is_residual: whether levels have parameter-free shortcuts (Wan 2.2, Qwen-Image 2.1).
      in_channels: channels that the encoder reads: 3 or, with alpha, 4 per pixel of a patch.
      out_channels: channels that the decoder writes.
      patch_size: side in pixels of the squares that are folded into channels before the encoder.
      latents_mean: mean of each channel of z.
      latents_std: standard deviation of each channel of z.
      pack: side in cells of the square of z cells that make one latent cell: 1 (none) or 2.
    """

    class_name: str = WAN
    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_channels: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    latents_mean: tuple[float, ...] = wan_statistics.WAN21_MEAN
    latents_std: tuple[float, ...] = wan_statistics.WAN21_STD
    pack: int = 1

    def __post_init__(self):
        if not self.dim_mult or min(self.dim_mult) < 1 or self.num_res_blocks < 1 or min(self.base_dims) < 1:
            raise ValueError(
                "An autoencoder needs at least one level, one residual block per level and positive widths, got "
                f"dim_mult={self.dim_mult}, num_res_blocks={self.num_res_blocks}, base_dim={self.base_dim}, "
                f"decoder_base_dim={self.decoder_base_dim}."
            )
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temperal_downsample must have {len(self.dim_mult) - 1} entries, one for each level of dim_mult but the "
                f"last; got {self.temporal_downsample}."
            )
        patch = (self.patch_size or 1) ** 2
        if self.in_channels != self.out_channels or self.in_channels not in (3 * patch, 4 * patch):
            raise ValueError(
                f"in_channels and out_channels must both be {3 * patch} (RGB) or {4 * patch} (RGBA) with patch_size="
                f"{self.patch_size}, got {self.in_channels} and {self.out_channels}."
            )
        if self.class_name == QWEN_IMAGE and (self.is_residual or self.decoder_base_dim or self.patch_size):
            raise ValueError(f"{QWEN_IMAGE} has neither is_residual nor decoder_base_dim nor patch_size; use {WAN}.")
        self.check_pack()
        check_statistics(self.latents_mean, self.latents_std, self.z_channels)
        self._check_widths()

    def _check_widths(self) -> None:
        if not self.is_residual:
            if odd := [width for width in self.decoder_widths[:-1] if width % 2]:
                raise ValueError(f"Decoder widths are halved with each level and must be even, got {odd}.")
            return
        encoder, decoder = self.encoder_widths, self.decoder_widths
        for index in range(len(self.dim_mult)):
            last = index == len(self.dim_mult) - 1
            before, after = encoder[index], encoder[index + 1]
            folded = before * (1 if last else 4 * self.frames(index))
            if folded % after:
                raise ValueError(f"The shortcut of encoder level {index} cannot average {folded} channels to {after}.")
            before, after = decoder[index], decoder[index + 1]
            if not last and after * 4 * self.frames(-1 - index) % before:
                raise ValueError(f"The shortcut of decoder level {index} cannot repeat {before} channels for {after}.")

    @property
    def base_dims(self) -> tuple[int, int]:
        """Units of the widths of encoder and decoder."""
        return self.base_dim, self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Width of the encoder's first convolution and then of each level, finest first."""
        return tuple(self.base_dims[0] * times for times in (1, *self.dim_mult))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Width of the decoder's first convolution and then of each level, coarsest first."""
        return tuple(self.base_dims[1] * times for times in (self.dim_mult[-1], *self.dim_mult[::-1]))

    def frames(self, change: int) -> int:
        """Frames that the `change`-th halving of the resolution joins (negative: counted from the coarsest)."""
        return 2 if self.temporal_downsample[change] else 1

    @property
    def cell_px(self) -> int:
        """Side, in pixels, of the square that one cell of z stands for."""
        return (self.patch_size or 1) * 2 ** (len(self.dim_mult) - 1)

    @property
    def has_alpha(self) -> bool:
        """Whether the network reads and writes RGBA; images are RGB all the same."""
        return self.in_channels == 4 * (self.patch_size or 1) ** 2

    @property
    def stores_time(self) -> bool:
        """Whether the files hold kernels over time."""
        return self.class_name != QWEN_IMAGE21

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel of z."""
        return self.latents_mean, self.latents_std

    def with_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "AutoencoderKLWanConfig":
        """Returns this config with other statistics, one per channel of z."""
        return dataclasses.replace(self, latents_mean=mean, latents_std=std)

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], *, pack: int | None = None) -> "AutoencoderKLWanConfig":
        """Reads the content of the `config.json` of an AutoencoderKLWan, -QwenImage or -QwenImage21.

        `pack` is 1 or 2; by default what the file says, else 2 where it makes the compression 16 (Wan 2.1, Qwen-Image).

        Raises:
          ValueError: for values that do not fit.
        """
        if values.get("attn_scales"):
            raise ValueError(
                "attn_scales must be empty, as in all published weights (diffusers' class cannot run others), got "
                f"{values['attn_scales']}."
            )
        name = values.get("_class_name", WAN)
        renamed = _RENAMED | ({"input_channels": "in_channels"} if name == QWEN_IMAGE else {})
        given = read_fields(cls, values, renamed=renamed, ignored=_IGNORED_KEYS)
        if name == QWEN_IMAGE and "in_channels" in given:
            given["out_channels"] = given["in_channels"]
        config = dataclasses.replace(_DEFAULTS[name](), **given, pack=1)
        return dataclasses.replace(config, pack=pack or values.get(PACK_KEY) or default_pack(config.cell_px))

    def to_diffusers(self) -> dict[str, Any]:
        """Returns the content of a `config.json` that diffusers' class of the same name loads."""
        values: dict[str, Any] = dataclasses.asdict(self)
        values |= {"_class_name": values.pop("class_name"), "attn_scales": []}
        for theirs, ours in _RENAMED.items():
            values[theirs] = values.pop(ours)
        pack = values.pop("pack")
        if pack != default_pack(self.cell_px):
            values[PACK_KEY] = pack
        if self.class_name == QWEN_IMAGE:
            values["input_channels"] = values["in_channels"]
            for key in ("in_channels", "out_channels", "is_residual", "decoder_base_dim", "patch_size"):
                del values[key]
        else:
            values["scale_factor_spatial"] = self.cell_px
            values["scale_factor_temporal"] = 2 ** sum(self.temporal_downsample)
        return listed(values)

    @classmethod
    def wan21(cls) -> "AutoencoderKLWanConfig":
        """Wan 2.1: 8x with 16 channels, packed to 16x with 64."""
        return cls(pack=2)

    @classmethod
    def qwen_image(cls) -> "AutoencoderKLWanConfig":
        """Qwen-Image: the network of Wan 2.1 under another name."""
        return cls(class_name=QWEN_IMAGE, pack=2)

    @classmethod
    def wan22(cls) -> "AutoencoderKLWanConfig":
        """Wan 2.2 (TI2V-5B): 16x with 48 channels."""
        return cls(
            base_dim=160,
            decoder_base_dim=256,
            z_channels=48,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            latents_mean=wan_statistics.WAN22_MEAN,
            latents_std=wan_statistics.WAN22_STD,
        )

    @classmethod
    def qwen_image21(cls) -> "AutoencoderKLWanConfig":
        """Qwen-Image 2.1: 16x with 64 channels; RGBA inside, with alpha 1 for the RGB images that it is given."""
        return cls(
            class_name=QWEN_IMAGE21,
            decoder_base_dim=144,
            z_channels=64,
            dim_mult=(1, 2, 4, 8, 8),
            temporal_downsample=(False, True, True, True),
            is_residual=True,
            in_channels=4,
            out_channels=4,
            latents_mean=wan_statistics.QWEN_IMAGE21_MEAN,
            latents_std=wan_statistics.QWEN_IMAGE21_STD,
        )


# What diffusers' classes assume where config.json is silent.
_DEFAULTS = {
    WAN: AutoencoderKLWanConfig,
    QWEN_IMAGE: AutoencoderKLWanConfig.qwen_image,
    QWEN_IMAGE21: AutoencoderKLWanConfig.qwen_image21,
}
