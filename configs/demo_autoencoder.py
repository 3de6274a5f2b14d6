"""The demo autoencoder: 8x with 2x2 packing (16x, 32 channels), trained on shapes and doodles.

Crops first, which are many and cheap; then whole pictures, whose group norms see what they will see in use.

Command:  python -m unifusion_jax.train --config=configs/demo_autoencoder.py:crops --workdir=runs/autoencoder_crops
          python -m unifusion_jax.train --config=configs/demo_autoencoder.py:whole --workdir=runs/autoencoder \
              --config.init_from=runs/autoencoder_crops/export
Hardware: 2 CPU cores.
"""

import ml_collections

from unifusion_jax.config import to_config_dict
from unifusion_jax.training.config import TrainConfig


def get_config(stage: str = "crops") -> ml_collections.ConfigDict:
    """Returns the configuration; `stage` is "crops" or "whole"."""
    if stage not in ("crops", "whole"):
        raise ValueError(f"configs/demo_autoencoder.py takes 'crops' or 'whole', got {stage!r}.")
    crops = stage == "crops"
    config = to_config_dict(TrainConfig())
    config.task = "autoencoder"
    config.model = "demo"
    config.seed = 0 if crops else 1
    config.total_steps = 2500 if crops else 1800
    config.batch_size = 16 if crops else 8
    config.log_every_steps = 50
    config.dtype = "float32"
    config.data.size_px = 96
    config.data.crop_px = 48 if crops else 0
    config.data.sources = (
        {"name": "shapes", "task": "text_to_image", "weight": 0.8, "seed": 11},
        {"name": "doodles", "weight": 0.2, "seed": 12},
    )
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3 if crops else 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.schedule = "cosine"
    config.optimizer.final_scale = 0.02
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every_steps = 500
    config.preview.every_steps = 500
    return config
