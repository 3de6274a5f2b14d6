"""Base configurations that several files under configs/ start from."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unifusion_jax.conditioning import ConditioningConfig
from unifusion_jax.config import to_config_dict
from unifusion_jax.dit import DiTConfig
from unifusion_jax.training.config import TrainConfig

# The longest of each task of the built-in world, read by the demo encoder, and no more: what pads a batch costs as much as
# what fills it.
SHAPES_BUDGETS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "text_to_image": {"max_tokens": 112, "max_tiles": 0, "max_kept_tokens": 48},
        "reconstruction": {"max_tokens": 72, "max_tiles": 10, "max_kept_tokens": 40},
        "joint": {"max_tokens": 152, "max_tiles": 10, "max_kept_tokens": 88},
        "edit": {"max_tokens": 144, "max_tiles": 10, "max_kept_tokens": 88},
    }
)


def demo() -> Any:
    """Returns a ConfigDict of the demo model on its bundled frozen networks, with Muon; data, lengths and rates are open."""
    config = to_config_dict(
        TrainConfig(
            dit=DiTConfig.demo(),
            # Encoder and DiT differ in width, depth and heads; the strategies that pair them need maps.
            conditioning=ConditioningConfig(lap_heads=4, refiner_heads=5, learned_maps=True),
        )
    )
    config.batch_size = 16
    config.log_every_steps = 25
    config.dtype = "float32"
    config.ema_decay = 0.995
    config.encoder.system_prompts = "short"
    config.encoder.dtype = "float32"
    config.data.size_px = 96
    # Four noises for each picture: what the frozen networks compute once serves four samples of the DiT.
    config.flow.timesteps_per_sample = 4
    config.flow.base_cells = 36
    config.optimizer.name = "muon"
    config.optimizer.warmup_steps = 30
    config.optimizer.schedule = "cosine"
    config.optimizer.final_scale = 0.02
    config.optimizer.weight_decay = 0.01
    config.checkpoint.every_steps = 500
    config.preview.every_steps = 500
    return config
