"""The kinds of training, by name."""

from flax import nnx
from jax.sharding import Mesh

from unifusion_jax.parallel.sharding import param_shardings
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.phases import Shapes
from unifusion_jax.training.task import Task


def parameter_shapes(config: TrainConfig, mesh: Mesh) -> Shapes:
    """Returns the shapes of what a run of the model itself trains, from configs alone; ValueError where they do not fit."""
    from unifusion_jax import encoders
    from unifusion_jax.frozen import model_config_of
    from unifusion_jax.model import UniFusionModel

    sizes = model_config_of(config, encoders.read_config(config.encoder.path))
    module = nnx.eval_shape(lambda: UniFusionModel(sizes, rngs=nnx.Rngs(0)))
    return Shapes(nnx.to_pure_dict(nnx.state(module, nnx.Param)), param_shardings(module, mesh))


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
