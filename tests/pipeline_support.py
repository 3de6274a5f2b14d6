"""A tiny model whose pictures differ: every parameter is shaken, since a new velocity is zero whatever the condition."""

import jax
from flax import nnx
from training_support import tiny_config

from unifusion_jax import UniFusion
from unifusion_jax.config import from_mapping
from unifusion_jax.frozen import load_frozen, model_config_of
from unifusion_jax.model import UniFusionModel
from unifusion_jax.training.config import TrainConfig


def shaken_model(frozen) -> UniFusion:
    config = from_mapping(TrainConfig, tiny_config(str(frozen)))
    encoder, autoencoder = load_frozen(config)
    sizes = model_config_of(config, encoder.config)
    params = nnx.to_pure_dict(nnx.state(UniFusionModel(sizes, rngs=nnx.Rngs(0)), nnx.Param))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params)
    return UniFusion(encoder, autoencoder, config, sizes, params)
