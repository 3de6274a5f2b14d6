"""Figure 21 of the paper, one config a bar: one LAP for the input, or one for every block.

Command:  python -m unifusion_jax.train --config=configs/ablations/figure_21.py:with_injection --workdir=runs/large
          python -m unifusion_jax.train --config=configs/ablations/figure_21.py:with_injection,demo --workdir=runs/small
Hardware: the paper's size needs a TPU pod slice or several nodes of GPUs and was never run here; the demo's, 2 CPU cores.

Bars: with_injection and without_injection. Compared at 200k steps.
"""

import ml_collections

from unifusion_jax.training import ablations


def get_config(bar: str = "with_injection") -> ml_collections.ConfigDict:
    """Returns the configuration of a bar; append ",demo" for the demo's size."""
    return ablations.get_config("figure_21", bar)
