"""Figure 4 of the paper, one config a bar: ways to condition the DiT.

Command:  python -m unifusion_jax.train --config=configs/ablations/figure_4.py:lap --workdir=runs/large
          python -m unifusion_jax.train --config=configs/ablations/figure_4.py:lap,demo --workdir=runs/small
Hardware: the paper's size needs a TPU pod slice or several nodes of GPUs and was never run here; the demo's, 2 CPU cores.

Bars: t5, last_layer, kv_fusion, hidden_state_injection (all of Llama 3.1 8B but the first) and lap. Compared at 200k steps.
"""

import ml_collections

from unifusion_jax.training import ablations


def get_config(bar: str = "lap") -> ml_collections.ConfigDict:
    """Returns the configuration of a bar; append ",demo" for the demo's size."""
    return ablations.get_config("figure_4", bar)
