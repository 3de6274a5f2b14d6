"""The paper's figures as functions of a checkpoint, one file a figure: a table and a picture each."""

from collections.abc import Callable

from unifusion_jax.analysis.figure import Figure as Figure
from unifusion_jax.analysis.figure import Options as Options
from unifusion_jax.analysis.layer_dropout import layer_dropout
from unifusion_jax.analysis.layer_similarity import layer_similarity
from unifusion_jax.analysis.pooling_weights import pooling_weights
from unifusion_jax.analysis.qk_norms import qk_norms
from unifusion_jax.analysis.refiner_effect import refiner_effect
from unifusion_jax.analysis.tile_scaling import tile_scaling
from unifusion_jax.analysis.verifi_effect import verifi_effect
from unifusion_jax.pipeline import UniFusion

FIGURES: dict[str, Callable[[UniFusion, Options], Figure]] = {
    "layer_similarity": layer_similarity,
    "pooling_weights": pooling_weights,
    "qk_norms": qk_norms,
    "layer_dropout": layer_dropout,
    "tile_scaling": tile_scaling,
    "verifi_effect": verifi_effect,
    "refiner_effect": refiner_effect,
}
