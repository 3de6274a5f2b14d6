"""The paper's comparisons as configs: one base, and for each bar of a figure what it changes.

"paper" is the paper's size: the 5B DiT, batch 1024, 200k or 250k steps (sections 2.2 and A.1). It names neither the
autoencoder, the picture size nor the learning rate of these runs; FLUX.1's autoencoder (8x and 2x2 packing), 512 px and the
final model's optimizer are ours. "demo" is the same comparison with the bundled networks, steps cut in the same proportion.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from unifusion_jax.conditioning import ConditioningConfig
from unifusion_jax.config import to_config_dict
from unifusion_jax.dit import DiTConfig
from unifusion_jax.training import presets
from unifusion_jax.training.config import TrainConfig

SIZES = ("paper", "demo")
_PAPER_STEPS = 200_000
_DEMO_STEPS = 600
_ENCODERS = {
    "paper": {
        "t5": "google/flan-t5-xxl",
        "llama": "meta-llama/Llama-3.1-8B-Instruct",
        "internvl": "OpenGVLab/InternVL2_5-8B",
    },
    # There is no small T5 or Llama: the demo's encoder stands in, read without a system turn and without rewriting.
    "demo": dict.fromkeys(("t5", "llama", "internvl"), "bundled:demo/encoder"),
}

Changes = Mapping[str, Any]
_REFINER = {"conditioning.refiner_blocks": 2}
_T5 = {"encoder": "t5", "conditioning.strategy": "last_layer"}
_LLAMA = {"encoder": "llama"}
_INTERNVL = {"encoder": "internvl", "conditioning.layer_stride": 3}
_VERIFI = {"encoder.verifi": True}
_LONGER = {"steps": 250_000}

# figure -> bar -> what differs from the base. "encoder" and "steps" are names of the tables above; the rest are config keys.
BARS: Mapping[str, Mapping[str, Changes]] = MappingProxyType(
    {
        "figure_4": {
            "t5": _T5,
            "last_layer": _LLAMA | {"conditioning.strategy": "last_layer"},
            "kv_fusion": _LLAMA | {"conditioning.strategy": "kv_fusion"},
            "hidden_state_injection": _LLAMA | {"conditioning.strategy": "hidden_state_injection"},
            "lap": _LLAMA,
        },
        "figure_19": {
            "without_verifi": _INTERNVL | _REFINER,
            "with_verifi": _INTERNVL | _REFINER | _VERIFI,
        },
        "figure_21": {
            "with_injection": _INTERNVL | {"conditioning.strategy": "lap_injection"},
            "without_injection": _INTERNVL,
        },
        "figure_22": {
            "t5": _T5 | _LONGER,
            "penultimate_refiner": _INTERNVL
            | _REFINER
            | _LONGER
            | {"conditioning.strategy": "last_layer", "conditioning.layer": -2},
            "lap_refiner": _INTERNVL | _REFINER | _LONGER,
        },
        "figure_23": {
            "t5": _T5 | _LONGER,
            "from_scratch": _INTERNVL | _REFINER | _LONGER,
            "continued": _INTERNVL | _REFINER | _LONGER | {"first_steps": 100_000},
        },
    }
)


def base(size: str) -> Any:
    """Returns the ConfigDict that every bar starts from: text to image, LAP over all layers, no refiner, no rewriting."""
    if size not in SIZES:
        raise ValueError(f"An ablation's size is one of {list(SIZES)}, got {size!r}.")
    if size == "demo":
        config = presets.demo()
        config.optimizer.learning_rate = 1.2e-2
        config.ema_decay = 0.99
        config.data.sources = ({"name": "shapes", "seed": 31, "num_objects": (1, 2), "tasks": {"text_to_image": 1.0}},)
        config.data.budgets = {"text_to_image": {"max_tokens": 96, "max_tiles": 0, "max_kept_tokens": 36}}
        config.evaluation.prompts = 128
    else:
        # Llama, T5 and InternVL2.5 are 4096 wide, as the DiT is: no maps between them.
        conditioning = ConditioningConfig(lap_heads=32)
        config = to_config_dict(TrainConfig(dit=DiTConfig.dit_5b(latent_channels=64), conditioning=conditioning))
        config.autoencoder.path = "black-forest-labs/FLUX.1-schnell"
        config.autoencoder.dtype = "bfloat16"
        config.batch_size = 1024
        config.remat = "full"
        config.mesh.data = 1
        config.mesh.fsdp = -1
        config.ema_decay = 0.9999
        config.data.sources = ({"name": "records", "path": "data/images", "tasks": {"text_to_image": 1.0}},)
        config.data.size_px = 512
        config.data.num_workers = 8
        config.data.budgets = {"text_to_image": {"max_tokens": 1024, "max_tiles": 0, "max_kept_tokens": 512}}
        config.optimizer.warmup_steps = 2000
    config.encoder.verifi = False
    config.conditioning.refiner_blocks = 0
    config.conditioning.layer_stride = 1
    return config


def get_config(figure: str, argument: str) -> Any:
    """Returns the config of a bar.

    Args:
      figure: key of `BARS`.
      argument: "BAR" or "BAR,demo".

    Raises:
      ValueError: there is no such bar or size; lists those that are.
    """
    bar, _, size = argument.partition(",")
    bars = BARS[figure]
    if bar not in bars:
        raise ValueError(f"{figure} has the bars {', '.join(bars)}, got {bar!r}. Append ',demo' for the demo's size.")
    return changed(base(size or "paper"), bars[bar], size or "paper")


def changed(config: Any, changes: Changes, size: str) -> Any:
    """Returns the config with the changes of a bar made to it."""
    changes = dict(changes)
    name, steps = changes.pop("encoder", "internvl"), changes.pop("steps", _PAPER_STEPS)
    first_steps = changes.pop("first_steps", 0)
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    _read_with(config.encoder, name, size)
    config.total_steps = _steps(steps, size)
    if first_steps:
        config.first.steps = _steps(first_steps, size)
        config.first.encoder = config.encoder.copy_and_resolve_references()
        config.first.encoder.verifi = False
        _read_with(config.first.encoder, "t5", size)
        config.first.conditioning = config.conditioning.copy_and_resolve_references()
        config.first.conditioning.strategy = "last_layer"
        config.first.conditioning.refiner_blocks = 0
    config.checkpoint.every_steps = min(config.checkpoint.every_steps, config.total_steps)
    return config


def _read_with(encoder: Any, name: str, size: str) -> None:
    encoder.path = _ENCODERS[size][name]
    prompts = "short" if size == "demo" else "full"
    encoder.system_prompts = prompts if encoder.verifi else "none"


def _steps(paper_steps: int, size: str) -> int:
    return paper_steps if size == "paper" else paper_steps * _DEMO_STEPS // _PAPER_STEPS
