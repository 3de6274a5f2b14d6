"""The demo autoencoder: 8x with 2x2 packing (16x, 32 channels), trained on shapes and doodles.

Command:  python -m unifusion_jax.train --config=configs/demo_autoencoder.py --workdir=runs/demo_autoencoder
Hardware: 2 CPU cores.
"""

import ml_collections

from unifusion_jax.config import to_config_dict
from unifusion_jax.training.config import TrainConfig


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration."""
    config = to_config_dict(TrainConfig())
    config.task = "autoencoder"
    config.model = "demo"
    config.total_steps = 4500
    config.batch_size = 16
    config.log_every_steps = 50
    config.dtype = "float32"
    config.data.size_px = 96
    config.data.crop_px = 48
    config.data.sources = (
        {"name": "shapes", "task": "text_to_image", "weight": 0.8, "seed": 11},
        {"name": "doodles", "weight": 0.2, "seed": 12},
    )
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.optimizer.final_scale = 0.02
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every_steps = 500
    config.preview.every_steps = 500
    return config
