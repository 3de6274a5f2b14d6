"""Figure 22 of the paper, one config a bar: the bidirectional refiner.

Command:  python -m unifusion_jax.train --config=configs/ablations/figure_22.py:lap_refiner --workdir=runs/large
          python -m unifusion_jax.train --config=configs/ablations/figure_22.py:lap_refiner,demo --workdir=runs/small
Hardware: the paper's size needs a TPU pod slice or several nodes of GPUs and was never run here; the demo's, 2 CPU cores.

Bars: t5, penultimate_refiner and lap_refiner. Compared at 250k steps.
"""

import ml_collections

from unifusion_jax.training import ablations


def get_config(bar: str = "lap_refiner") -> ml_collections.ConfigDict:
    """Returns the configuration of a bar; append ",demo" for the demo's size."""
    return ablations.get_config("figure_22", bar)
