"""A tiny encoder and autoencoder on disk, and a training config around them."""

from pathlib import Path

import ml_collections

from unifusion_jax.autoencoders import Autoencoder, AutoencoderKLConfig
from unifusion_jax.conditioning import ConditioningConfig
from unifusion_jax.config import to_config_dict
from unifusion_jax.data.shapes.source import ShapesSource
from unifusion_jax.dit import DiTConfig
from unifusion_jax.encoders import Encoder, InternVLConfig, train_tokenizer
from unifusion_jax.encoders.decoder import DecoderConfig
from unifusion_jax.encoders.vision import VisionConfig
from unifusion_jax.training.config import TrainConfig

VOCAB = 480
# Changes of `tiny_config` that compute the same by other means: in parts, computed again, on a mesh that splits the model.
# Tests share it, since what one compiled the others need not.
SPLIT = {
    "mesh": {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2},
    "accumulate_steps": 2,
    "remat": "full",
}


def write_frozen(folder: Path) -> None:
    """Writes `folder`/encoder and `folder`/autoencoder: random weights, the classes of the real sizes."""
    records = ShapesSource()
    texts = [text for index in range(200) for text in (records[index].prompt, records[index].target or "")]
    vision = VisionConfig(image_px=32, patch_px=8, hidden_size=16, num_layers=1, num_heads=2, ffn_size=24)
    decoder = DecoderConfig(VOCAB, 32, 4, 2, 1, 16, 48, max_positions=512)
    Encoder.create(InternVLConfig(vision, decoder), train_tokenizer(texts, VOCAB), seed=1).save(folder / "encoder")
    autoencoder = AutoencoderKLConfig(
        z_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, pack=2
    )
    Autoencoder.create(autoencoder, seed=2).save(folder / "autoencoder")


def tiny_config(frozen: str, **changes: object) -> ml_collections.ConfigDict:
    """Returns a config that trains in a second a step count of ten; `changes` are dotted keys."""
    config = to_config_dict(
        TrainConfig(
            dit=DiTConfig(latent_channels=16, num_layers=2, hidden_size=32, num_heads=2, ffn_size=48, time_features=16),
            conditioning=ConditioningConfig(lap_heads=2, refiner_heads=2),
        )
    )
    config.total_steps = 10
    config.batch_size = 8
    config.log_every_steps = 2
    config.dtype = "float32"
    config.encoder = {"path": f"{frozen}/encoder", "layers": (), "dtype": "float32", "system_prompts": "short"}
    config.autoencoder.path = f"{frozen}/autoencoder"
    config.data.size_px = 96
    config.data.tiles_per_image = 1
    config.data.sources = ({"name": "shapes", "tasks": {"text_to_image": 0.7, "edit": 0.3}},)
    config.data.budgets = {
        "text_to_image": {"max_tokens": 192, "max_tiles": 0, "max_kept_tokens": 96},
        "edit": {"max_tokens": 192, "max_tiles": 1, "max_kept_tokens": 96},
    }
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 2
    config.checkpoint.every_steps = 3
    for key, value in changes.items():
        parent, name = config, key
        while "__" in name:
            first, name = name.split("__", 1)
            parent = parent[first]
        parent[name] = value
    return config
