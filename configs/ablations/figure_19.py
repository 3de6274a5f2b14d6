"""Figure 19 of the paper, one config a bar: rewriting on and off.

Command:  python -m unifusion_jax.train --config=configs/ablations/figure_19.py:with_verifi --workdir=runs/large
          python -m unifusion_jax.train --config=configs/ablations/figure_19.py:with_verifi,demo --workdir=runs/small
Hardware: the paper's size needs a TPU pod slice or several nodes of GPUs and was never run here; the demo's, 2 CPU cores.

Bars: without_verifi and with_verifi. Compared at 200k steps.
"""

import ml_collections

from unifusion_jax.training import ablations


def get_config(bar: str = "with_verifi") -> ml_collections.ConfigDict:
    """Returns the configuration of a bar; append ",demo" for the demo's size."""
    return ablations.get_config("figure_19", bar)
