"""The demo encoder: a 2.5M-parameter InternVL that describes scenes, rewrites prompts and thinks edits through.

Command:  python -m unifusion_jax.train --config=configs/demo_encoder.py:start --workdir=runs/encoder_start
          python -m unifusion_jax.train --config=configs/demo_encoder.py:finish --workdir=runs/encoder \
              --config.init_from=runs/encoder_start/export
Hardware: 2 CPU cores.
"""

import ml_collections

from unifusion_jax.config import to_config_dict
from unifusion_jax.training.config import TrainConfig

# Shares of the tasks: first mostly seeing, then as much copying from the prompt.
_START = {"text_to_image": 0.2, "reconstruction": 0.42, "edit": 0.32, "multi_reference": 0.06}
_FINISH = {"text_to_image": 0.56, "reconstruction": 0.18, "edit": 0.23, "multi_reference": 0.03}


def get_config(stage: str = "start") -> ml_collections.ConfigDict:
    """Returns the configuration; `stage` is "start" (AdamW) or "finish" (Muon)."""
    if stage not in ("start", "finish"):
        raise ValueError(f"configs/demo_encoder.py takes 'start' or 'finish', got {stage!r}.")
    start = stage == "start"
    config = to_config_dict(TrainConfig())
    config.task = "encoder"
    config.model = "demo"
    config.seed = 0 if start else 2
    config.total_steps = 6000 if start else 1800
    config.batch_size = 32
    config.log_every_steps = 100
    config.dtype = "float32"
    config.encoder.system_prompts = "short"
    config.data.size_px = 96
    config.data.sources = (
        {"name": "shapes", "weight": 0.47, "seed": 21, "tasks": _START if start else _FINISH},
        # Prompts that say everything: nothing in their descriptions is left to chance, so copying is learned from them.
        {"name": "shapes", "weight": 0.45, "seed": 23, "detail": "full", "tasks": {"text_to_image": 1.0}},
        {"name": "emoji_names", "weight": 0.08, "seed": 22},
    )
    config.data.budgets = {
        "text_to_image": {"max_tokens": 112, "max_tiles": 0, "max_kept_tokens": 112},
        "reconstruction": {"max_tokens": 128, "max_tiles": 10, "max_kept_tokens": 128},
        "edit": {"max_tokens": 144, "max_tiles": 10, "max_kept_tokens": 144},
        "multi_reference": {"max_tokens": 296, "max_tiles": 30, "max_kept_tokens": 296},
    }
    config.optimizer.name = "adamw" if start else "muon"
    config.optimizer.learning_rate = 1.5e-3 if start else 2.5e-3
    config.optimizer.warmup_steps = 300 if start else 60
    config.optimizer.schedule = "cosine"
    config.optimizer.final_scale = 0.05
    config.optimizer.weight_decay = 0.05
    config.checkpoint.every_steps = 250
    config.evaluation.prompts = 128
    return config
