"""A task whose step compiles in no time, for tests of the loop itself; as a script, `unifusion_jax.train` on it.

It fits a line through the mean colours of the built-in world's pictures. Environment: ROW_S makes every record take that long,
BAD_RECORD makes the picture of one record NaN; GATHERED_BYTES is what hosts gather at a time.
"""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jax.sharding import NamedSharding, PartitionSpec

from unifusion_jax import train
from unifusion_jax.config import parse_flags, to_config_dict
from unifusion_jax.data.buckets import Budget
from unifusion_jax.parallel import hosts
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.tasks.streams import open_batches, open_mixture


def get_config():
    config = to_config_dict(TrainConfig())
    config.total_steps, config.batch_size, config.log_every_steps = 8, 8, 2
    config.checkpoint.every_steps = 3
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 2
    config.data.size_px = 96
    config.data.sources = ({"name": "shapes", "tasks": {"text_to_image": 1.0}},)
    return config


def build_row(record, bucket):
    time.sleep(float(os.environ.get("ROW_S", "0")))
    colour = record.image.reshape(-1, 3).mean(0) / 255
    return colour * np.nan if record.id == os.environ.get("BAD_RECORD") else colour


def collate(rows, bucket):
    return np.stack(rows).astype(np.float32)


class LineTask:
    """What `training.task.Task` asks for, as small as it gets."""

    metric_names = ("error",)
    frozen = ()
    flops_per_sample = None

    def __init__(self, config, mesh):
        self.config, self.mesh = config, mesh
        budgets = {"text_to_image": Budget(max_tokens=1, max_tiles=0, max_kept_tokens=1)}
        self.mixture = open_mixture(config, multiple_of_px=32, budgets=budgets)
        split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
        self.param_shardings = {"kernel": split, "scale": NamedSharding(mesh, PartitionSpec())}

    def init(self, key):
        return {"kernel": jax.random.normal(key, (3, 16)), "scale": jnp.ones(())}

    def draw(self, batch, key, static):
        return key

    def loss(self, params, frozen, batch, key, static):
        noise = jax.random.normal(key, (batch.shape[0], 16))
        error = jnp.square(batch @ params["kernel"] * params["scale"] - batch.sum(1, keepdims=True) - 0.1 * noise)
        return error.mean(), {"error": (error.sum(), jnp.float32(error.size))}

    def static(self, bucket):
        return None

    def batches(self):
        return open_batches(self.config, self.mixture, build_row, collate, self.mesh)

    def preview(self, params):
        return None

    def evaluate(self, params):
        return {"scale": float(params["scale"])}

    def export(self, params, folder):
        folder.mkdir(exist_ok=True)
        np.savez(folder / "params.npz", **params)


if __name__ == "__main__":
    train.make_task = LineTask
    hosts._GATHERED_BYTES = int(os.environ.get("GATHERED_BYTES", hosts._GATHERED_BYTES))
    app.run(train.main, flags_parser=parse_flags)
