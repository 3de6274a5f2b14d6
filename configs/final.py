"""The paper's final model: InternVL3-8B, LAP and refiner, an 8B DiT, FLUX.2's autoencoder; base stage and edit stage.

Command:  python -m unifusion_jax.prepare --input=images/ --output=data/images
          python -m unifusion_jax.train --config=configs/final.py --workdir=runs/base
          python -m unifusion_jax.train --config=configs/final.py:edit --workdir=runs/edit \\
              --config.init_from=runs/base/export
Hardware: a TPU pod slice or several nodes of GPUs; never run by this project, whose largest model is the demo.

The paper gives the batch of 1024, the layers, the shares of the tasks and about 10k steps of instruction training
(sections 2 to 4); learning rate, schedule and averaging are ours.
"""

import ml_collections

from unifusion_jax.config import to_config_dict
from unifusion_jax.dit import DiTConfig
from unifusion_jax.training.config import TrainConfig


def get_config(stage: str = "base") -> ml_collections.ConfigDict:
    """Returns the configuration; `stage` is "base", "edit", or "5b": the base stage with the ablations' 5B DiT."""
    if stage not in ("base", "edit", "5b"):
        raise ValueError(f"configs/final.py takes 'base', 'edit' or '5b', got {stage!r}.")
    base = stage != "edit"
    # The sizes of the final model are the defaults.
    config = to_config_dict(TrainConfig(dit=DiTConfig.dit_5b()) if stage == "5b" else TrainConfig())
    config.encoder.path = "OpenGVLab/InternVL3-8B"
    config.autoencoder.path = "black-forest-labs/FLUX.2-dev"
    config.autoencoder.dtype = "bfloat16"
    config.total_steps = 200_000 if base else 10_000
    config.batch_size = 1024
    config.remat = "full"
    config.conditioning.lap_chunk_tokens = 512  # 2.5 GiB less a chip on v6e-256 than all tokens at once
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.ema_decay = 0.9999 if base else 0.999
    records = {"name": "records", "path": "data/images"}
    config.data.sources = (
        records | {"tasks": {"text_to_image": 1.0}, "derive": {"reconstruction": 0.03, "joint": 0.1}}
        if base
        else records | {"path": "data/edits", "tasks": {"text_to_image": 0.3, "edit": 0.6, "multi_reference": 0.1}},
    )
    config.data.size_px = 1024
    config.data.max_aspect = 2.0
    config.data.num_workers = 8
    # 256 tokens a tile of 448 px; one picture becomes up to 9 tiles and a thumbnail.
    config.data.budgets = {
        "text_to_image": {"max_tokens": 1024, "max_tiles": 0, "max_kept_tokens": 512},
        "reconstruction": {"max_tokens": 2816, "max_tiles": 10, "max_kept_tokens": 2560},
        "joint": {"max_tokens": 3584, "max_tiles": 10, "max_kept_tokens": 3072},
        "edit": {"max_tokens": 3584, "max_tiles": 10, "max_kept_tokens": 3072},
        "multi_reference": {"max_tokens": 8704, "max_tiles": 30, "max_kept_tokens": 8192},
    }
    config.optimizer.learning_rate = 1e-4 if base else 2e-5
    config.optimizer.warmup_steps = 2000 if base else 500
    config.checkpoint.every_steps = 1000
    config.preview.every_steps = 5000
    return config
