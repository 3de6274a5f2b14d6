"""Figure 5: how much of a picture its image tokens hold, by the number of tiles it is cut into."""

from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from unifusion_jax.analysis.figure import Figure, Options
from unifusion_jax.flow import SamplingConfig
from unifusion_jax.images import grid
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.prompt import Prompt

# In all; a grid of more than one has a thumbnail beside it.
TILES = (1, 5, 10)


def psnr(a: UInt8[np.ndarray, "h w 3"], b: UInt8[np.ndarray, "h w 3"]) -> float:
    """Returns the peak signal-to-noise ratio in dB; infinite for equal pictures."""
    error = float(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64))))
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(a: UInt8[np.ndarray, "h w 3"], b: UInt8[np.ndarray, "h w 3"]) -> float:
    """Returns the structural similarity (Wang et al. 2004) by scikit-image."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("SSIM is scikit-image's: pip install 'unifusion_jax[analysis]'.") from error
    return float(structural_similarity(a, b, channel_axis=2, data_range=255))  # pyright: ignore[reportArgumentType]


def tile_scaling(model: UniFusion, options: Options) -> Figure:
    """Reconstructs pictures from 1, 5 and 10 tiles; rows of the grid are the pictures, then each number of tiles.

    A perceptual distance (LPIPS) is not computed: its published weights are torch files of a host that is not among this
    package's sources.
    """
    size_px = model.config.data.size_px
    sources = options.chosen_images(size_px)
    sampling = SamplingConfig(options.steps, guidance=options.guidance)
    pictures, rows = list(sources), []
    for tiles in TILES:
        prompts = [Prompt("", [source], target="") for source in sources]
        condition = model.condition(prompts, tiles=tiles)
        drawn = model.sample(condition, seed=options.seed, size=size_px, sampling=sampling)
        pictures += drawn
        for number, (source, picture) in enumerate(zip(sources, drawn, strict=True)):
            rows.append({"tiles": tiles, "image": number, **scores(source, picture)})
    return Figure(rows, image=grid(pictures, columns=len(sources)))


def scores(source: PIL.Image.Image, picture: PIL.Image.Image) -> dict[str, Any]:
    """Returns PSNR in dB and SSIM of a picture against its source."""
    a, b = np.asarray(source), np.asarray(picture)
    return {"psnr_db": psnr(a, b), "ssim": ssim(a, b)}
