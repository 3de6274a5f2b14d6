"""The kinds of training, by name."""

from jax.sharding import Mesh

from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.task import Task


def make_task(config: TrainConfig, mesh: Mesh) -> Task:
    """Builds the task that `config.task` names."""
    if config.task == "autoencoder":
        from unifusion_jax.training.tasks.autoencoder import AutoencoderTask

        return AutoencoderTask(config, mesh)
    if config.task == "encoder":
        from unifusion_jax.training.tasks.encoder import EncoderTask

        return EncoderTask(config, mesh)
    from unifusion_jax.training.tasks.unifusion import UniFusionTask

    return UniFusionTask(config, mesh)
