"""Figures 7 and 20: the weights with which LAP's last map pools the layers, of the one LAP or of every block's."""

from typing import Any

import numpy as np
from jaxtyping import Float

from unifusion_jax.analysis.figure import Figure, Options, heatmap
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.weights import Params


def pooling_kernels(params: Params, strategy: str) -> Float[np.ndarray, "laps N"]:
    """Returns the pooling weights of every LAP of a model. Raises ValueError for strategies without one."""
    conditioner = params["conditioner"]
    if strategy == "lap":
        kernel = np.asarray(conditioner["lap"]["pool"]["kernel"])[None]
    elif strategy == "lap_injection":
        kernel = np.asarray(conditioner["laps"]["blocks"]["lap"]["pool"]["kernel"])
    else:
        raise ValueError(
            f"Only lap and lap_injection pool layers; this checkpoint's conditioning.strategy is {strategy!r}."
        )
    return kernel[..., 0].astype(np.float32)


def pooling_weights(model: UniFusion, options: Options) -> Figure:
    """Lists each layer's weight, and its share of the weights' magnitudes."""
    kernels = pooling_kernels(model.params, model.model_config.conditioning.strategy)
    shares = np.abs(kernels) / np.abs(kernels).sum(axis=1, keepdims=True)
    layers = model.encoder.layers
    rows = [
        {"block": block, "layer": layer, "weight": float(kernels[block, n]), "share": float(shares[block, n])}
        for block in range(len(kernels))
        for n, layer in enumerate(layers)
    ]

    def draw(axes: Any) -> None:
        if len(kernels) == 1:
            axes.bar(range(len(layers)), np.abs(kernels[0]))
            axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
            axes.set(xlabel="encoder layer", ylabel="|weight|", title="Pooling weights of LAP")
            return
        blocks = range(1, len(kernels) + 1)
        title = "Pooling weights of each block's LAP, magnitudes"
        heatmap(
            axes,
            np.abs(kernels),
            row_labels=blocks,
            column_labels=layers,
            x="encoder layer",
            y="DiT block",
            title=title,
        )

    return Figure(rows, draw)
