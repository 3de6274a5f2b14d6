"""Figure 8: what pictures lose when layers are dropped from the pooling at inference."""

from collections.abc import Sequence

import numpy as np

from unifusion_jax.analysis.figure import Figure, Options
from unifusion_jax.flow import SamplingConfig
from unifusion_jax.images import grid
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.weights import Params


def without_layers(params: Params, dropped: Sequence[int]) -> Params:
    """Returns parameters whose pooling gives these layers (places among the exported ones) no weight."""
    conditioner = params["conditioner"]
    pool = conditioner["lap"]["pool"]
    kernel = pool["kernel"].at[np.asarray(dropped, int)].set(0)
    lap = conditioner["lap"] | {"pool": pool | {"kernel": kernel}}
    return params | {"conditioner": conditioner | {"lap": lap}}


def thirds(count: int) -> dict[str, list[int]]:
    """Returns the places of the first, middle and last third of `count` layers."""
    edges = [round(count * part / 3) for part in range(4)]
    return {name: list(range(edges[i], edges[i + 1])) for i, name in enumerate(("first", "middle", "last"))}


def layer_dropout(model: UniFusion, options: Options) -> Figure:
    """Draws each prompt with all layers and without a third of them: rows of the grid are variants, columns are prompts."""
    strategy = model.model_config.conditioning.strategy
    if strategy != "lap":
        raise ValueError(f"layer_dropout drops layers of LAP; this checkpoint's conditioning.strategy is {strategy!r}.")
    prompts = options.chosen_prompts()
    variants = {"none": [], **thirds(len(model.encoder.layers))}
    condition = model.condition(prompts)
    sampling = SamplingConfig(options.steps, guidance=options.guidance)
    pictures, rows, whole = [], [], None
    for name, dropped in variants.items():
        other = model.with_params(without_layers(model.params, dropped))
        drawn = other.sample(condition, seed=options.seed, sampling=sampling)
        pixels = [np.asarray(picture, np.float64) for picture in drawn]
        whole = whole or pixels
        pictures += drawn
        layers = " ".join(str(model.encoder.layers[place]) for place in dropped)
        for number, (before, after) in enumerate(zip(whole, pixels, strict=True)):
            changed = float(np.abs(after - before).mean())
            rows.append(
                {"dropped": name, "layers": layers, "prompt": prompts[number], "mean_difference_levels": changed}
            )
    return Figure(rows, image=grid(pictures, columns=len(prompts)))
