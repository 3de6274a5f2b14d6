"""The demo: LAP, refiner and DiT from scratch on the built-in world, with the demo encoder and autoencoder.

Command:  python -m unifusion_jax.train --config=configs/demo.py --workdir=runs/demo
          python -m unifusion_jax.train --config=configs/demo.py:long --workdir=runs/demo_long \
              --config.init_from=runs/demo/export
Hardware: 2 CPU cores.

The short run learns pictures of one or two objects. The long one goes on from it, with three objects, edits and
reconstruction.
"""

import ml_collections

from unifusion_jax.training import presets

_TASKS = {"text_to_image": 0.72, "reconstruction": 0.04, "joint": 0.04, "edit": 0.2}


def get_config(length: str = "short") -> ml_collections.ConfigDict:
    """Returns the configuration; `length` is "short" (minutes) or "long" (an hour)."""
    if length not in ("short", "long"):
        raise ValueError(f"configs/demo.py takes 'short' or 'long', got {length!r}.")
    config = presets.demo()
    source = {"name": "shapes", "seed": 31}
    # Token budgets are the longest of each task and no more: what pads a batch costs as much as what fills it.
    if length == "short":
        config.total_steps = 600
        config.ema_decay = 0.99
        config.optimizer.learning_rate = 1.2e-2
        config.data.sources = (source | {"num_objects": (1, 2), "tasks": {"text_to_image": 1.0}},)
        config.data.budgets = {"text_to_image": {"max_tokens": 96, "max_tiles": 0, "max_kept_tokens": 36}}
    else:
        config.total_steps = 2000
        config.optimizer.learning_rate = 6e-3
        config.data.sources = (source | {"tasks": _TASKS},)
        config.data.budgets = {
            "text_to_image": {"max_tokens": 112, "max_tiles": 0, "max_kept_tokens": 48},
            "reconstruction": {"max_tokens": 72, "max_tiles": 10, "max_kept_tokens": 40},
            "joint": {"max_tokens": 152, "max_tiles": 10, "max_kept_tokens": 88},
            "edit": {"max_tokens": 144, "max_tiles": 10, "max_kept_tokens": 88},
        }
    config.evaluation.prompts = 128
    return config
