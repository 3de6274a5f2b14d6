"""Figure 6: how alike the encoder's layers are."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from unifusion_jax.analysis.figure import Figure, Options, heatmap
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.prompt import Prompt


def cosine_similarity(states: Float[np.ndarray, "B S N H"], mask: Bool[np.ndarray, "B S"]) -> Float[np.ndarray, "N N"]:
    """Returns the cosine between the states of two layers of one token, averaged over the tokens of `mask`."""
    tokens = np.asarray(states, np.float64)[np.asarray(mask)]
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-30)
    return np.einsum("tnh,tmh->nm", unit, unit) / len(unit)


def layer_similarity(model: UniFusion, options: Options) -> Figure:
    """Compares all layers of the encoder, the embeddings (0) included, on the kept tokens of prompts."""
    encoder = model.encoder
    layers = range(encoder.config.num_layers + 1)
    batch = encoder.prepare([Prompt(words, system="") for words in options.chosen_prompts()])
    states = np.asarray(encoder.layer_states(batch, layers=layers), np.float32)
    similarity = cosine_similarity(states, batch.keep & batch.mask)
    rows = [{"layer": a, "other_layer": b, "cosine": round(float(similarity[a, b]), 6)} for a in layers for b in layers]

    def draw(axes: Any) -> None:
        names = list(layers)
        title = "Cosine similarity of encoder layers"
        heatmap(axes, similarity, row_labels=names, column_labels=names, x="layer", y="layer", title=title)

    return Figure(rows, draw, size_inches=(6.0, 5.0))
