"""What the refiner does: how far it moves tokens by their position, and prompt following with and without it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from unifusion_jax.analysis.figure import Figure, Options
from unifusion_jax.analysis.verifi_effect import draw_pairs, score_rows
from unifusion_jax.evaluation.shapes import Drawing, evaluate_prompts
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.weights import Params

# Maps that write to the residual stream; at zero a block hands its input on.
_WRITERS = ("['out']['kernel']", "['down']['kernel']")
PARTS = 4


def without_refiner(params: Params) -> Params:
    """Returns parameters whose refiner hands its input on unchanged. Raises ValueError where there is none."""
    refiner = params["conditioner"].get("refiner")
    if not refiner:
        raise ValueError("This checkpoint has no refiner (conditioning.refiner_blocks is 0, or kv_fusion).")
    still = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if jax.tree_util.keystr(path).endswith(_WRITERS) else leaf, refiner
    )
    return params | {"conditioner": params["conditioner"] | {"refiner": still}}


def change_by_position(
    before: Float[np.ndarray, "B C D"], after: Float[np.ndarray, "B C D"], mask: Bool[np.ndarray, "B C"]
) -> Float[np.ndarray, " parts"]:
    """Returns 1 - cosine between tokens before and after, averaged over each quarter of the rows' lengths."""
    unit = [x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30) for x in (before, after)]
    change = 1 - np.sum(unit[0] * unit[1], axis=-1)
    place = np.arange(mask.shape[1]) / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    part = np.minimum((place * PARTS).astype(int), PARTS - 1)
    return np.array([change[mask & (part == index)].mean() for index in range(PARTS)], np.float64)


def refiner_effect(model: UniFusion, options: Options) -> Figure:
    """Compares the checkpoint with itself, its refiner bypassed: tokens by position, and scores of held-out prompts.

    What training without a refiner gives instead is another checkpoint: configs/ablations/figure_22.py.
    """
    bypassed = model.with_params(without_refiner(model.params))
    condition = model.condition(options.chosen_prompts())
    states, mask = jnp.asarray(condition.states.states, jnp.float32), np.asarray(condition.states.mask)
    tokens = [np.asarray(which.module().conditioner(states, jnp.asarray(mask)).tokens) for which in (bypassed, model)]
    rows: list[dict[str, Any]] = []
    for index, change in enumerate(change_by_position(tokens[0], tokens[1], mask)):
        name = f"token change, quarter {index + 1}"
        rows.append({"refiner": True, "score": name, "share": float(change), "standard_error": 0.0})
    for refined, which in ((False, bypassed), (True, model)):
        drawing = Drawing(options.steps, options.guidance, seed=options.seed)
        scores = evaluate_prompts(which, drawing, count=options.count, pairs=("seen",))
        rows += score_rows(scores, options.count, refiner=refined)
    return Figure(rows, lambda axes: draw_pairs(axes, rows, "refiner", "The refiner at work and bypassed"))
