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

_TASKS = {"text_to_image": 0.84, "reconstruction": 0.03, "joint": 0.03, "edit": 0.1}


def get_config(length: str = "short") -> ml_collections.ConfigDict:
    """Returns the configuration; `length` is "short" (minutes) or "long" (an hour)."""
    if length not in ("short", "long"):
        raise ValueError(f"configs/demo.py takes 'short' or 'long', got {length!r}.")
    config = presets.demo()
    source = {"name": "shapes", "seed": 31}
    if length == "short":
        config.total_steps = 1350
        config.batch_size = 8
        config.ema_decay = 0.99
        config.optimizer.learning_rate = 1.2e-2
        config.data.sources = (source | {"num_objects": (1, 2), "tasks": {"text_to_image": 1.0}},)
        # Two objects take fewer words than the three that `presets.SHAPES_BUDGETS` has room for.
        config.data.budgets = {"text_to_image": {"max_tokens": 96, "max_tiles": 0, "max_kept_tokens": 36}}
    else:
        config.total_steps = 4000
        config.batch_size = 8
        config.optimizer.learning_rate = 1e-2
        config.data.sources = (source | {"tasks": _TASKS},)
        config.data.budgets = dict(presets.SHAPES_BUDGETS)
    config.evaluation.prompts = 128
    return config
