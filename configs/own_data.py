"""Your own pictures with the demo stack, on a data set made by `prepare`.

Command:  python -m unifusion_jax.prepare --input=photos/ --output=data/photos
          python -m unifusion_jax.train --config=configs/own_data.py:data/photos --workdir=runs/photos
Hardware: 2 CPU cores.

Set --config.init_from to an exported model to go on from it, with a lower rate.
"""

import ml_collections

from unifusion_jax.training import presets


def get_config(folder: str = "data/photos") -> ml_collections.ConfigDict:
    """Returns the configuration; `folder` is the prepared data set."""
    config = presets.demo()
    config.total_steps = 2000
    config.data.sources = ({"name": "records", "path": folder},)
    config.data.budgets = {
        "text_to_image": {"max_tokens": 144, "max_tiles": 0, "max_kept_tokens": 64},
        "edit": {"max_tokens": 192, "max_tiles": 10, "max_kept_tokens": 104},
    }
    config.optimizer.learning_rate = 6e-3
    return config
