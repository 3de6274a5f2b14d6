"""Figure 23 of the paper, one config a bar: from scratch, or continued from T5.

Command:  python -m unifusion_jax.train --config=configs/ablations/figure_23.py:continued --workdir=runs/large
          python -m unifusion_jax.train --config=configs/ablations/figure_23.py:continued,demo --workdir=runs/small
Hardware: the paper's size needs a TPU pod slice or several nodes of GPUs and was never run here; the demo's, 2 CPU cores.

Bars: t5, from_scratch and continued. Compared at 250k steps.

The continued run begins with T5 and swaps encoder and conditioning at 100k steps; it is one command like the others.
"""

import ml_collections

from unifusion_jax.training import ablations


def get_config(bar: str = "continued") -> ml_collections.ConfigDict:
    """Returns the configuration of a bar; append ",demo" for the demo's size."""
    return ablations.get_config("figure_23", bar)
