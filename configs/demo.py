"""The demo: LAP, refiner and DiT from scratch on the built-in world, with the demo encoder and autoencoder.

Command:  python -m unifusion_jax.train --config=configs/demo.py --workdir=runs/demo
          python -m unifusion_jax.train --config=configs/demo.py:long --workdir=runs/demo_long     (the longer run)
Hardware: 2 CPU cores.
"""

import ml_collections

from unifusion_jax.conditioning import ConditioningConfig
from unifusion_jax.config import to_config_dict
from unifusion_jax.dit import DiTConfig
from unifusion_jax.training.config import TrainConfig


def get_config(length: str = "short") -> ml_collections.ConfigDict:
    """Returns the configuration; `length` is "short" (minutes) or "long" (hours)."""
    if length not in ("short", "long"):
        raise ValueError(f"configs/demo.py takes 'short' or 'long', got {length!r}.")
    config = to_config_dict(
        TrainConfig(
            dit=DiTConfig.demo(),
            conditioning=ConditioningConfig(lap_heads=4, refiner_heads=5, lap_ffn_ratio=2.0, refiner_ffn_ratio=2.0),
        )
    )
    config.total_steps = 1500 if length == "short" else 9000
    config.batch_size = 16
    config.log_every_steps = 50
    config.dtype = "float32"
    config.ema_decay = 0.995
    config.encoder.system_prompts = "short"
    config.encoder.dtype = "float32"
    config.data.size_px = 96
    config.data.sources = (
        {"name": "shapes", "seed": 31, "num_objects": (1, 2), "tasks": {"text_to_image": 1.0}}
        if length == "short"
        else {
            "name": "shapes",
            "seed": 31,
            "tasks": {"text_to_image": 0.7, "reconstruction": 0.05, "joint": 0.05, "edit": 0.2},
        },
    )
    config.data.budgets = {
        "text_to_image": {"max_tokens": 96, "max_tiles": 0, "max_kept_tokens": 36}
        if length == "short"
        else {"max_tokens": 112, "max_tiles": 0, "max_kept_tokens": 48},
        "reconstruction": {"max_tokens": 72, "max_tiles": 10, "max_kept_tokens": 40},
        "joint": {"max_tokens": 152, "max_tiles": 10, "max_kept_tokens": 88},
        "edit": {"max_tokens": 144, "max_tiles": 10, "max_kept_tokens": 88},
    }
    config.flow.timesteps_per_sample = 4
    config.flow.base_cells = 36
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.optimizer.final_scale = 0.05
    config.optimizer.weight_decay = 0.01
    config.checkpoint.every_steps = 500
    config.preview.every_steps = 500
    config.evaluation.prompts = 128
    return config
