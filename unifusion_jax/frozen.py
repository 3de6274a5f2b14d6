"""The frozen networks that a config names, and whether they fit the trained stack."""

from typing import Any

from jax.sharding import Mesh

from unifusion_jax import autoencoders, encoders
from unifusion_jax.autoencoders import Autoencoder
from unifusion_jax.conditioning import Selection
from unifusion_jax.encoders import Encoder
from unifusion_jax.model import ModelConfig
from unifusion_jax.training.config import TrainConfig

_LATENTS = "latent channels (autoencoder.path, dit.latent_channels)"


def load_frozen(config: TrainConfig, mesh: Mesh | None = None) -> tuple[Encoder, Autoencoder]:
    """Loads the encoder and the autoencoder that a config names.

    Raises:
      ValueError: something does not fit together, told from the networks' configs before any weights are read.
    """
    chosen = config.encoder
    sizes = encoders.read_config(chosen.path)
    model_config_of(config, sizes)
    channels = autoencoders.read_config(config.autoencoder.path).latent_channels
    _check_equal(_LATENTS, channels, config.dit.latent_channels)
    if not sizes.decodes and chosen.verifi:
        raise ValueError(
            f"encoder.verifi=True needs an encoder that decodes text, but {chosen.path} only reads it: set "
            "encoder.verifi=False."
        )
    if not sizes.decodes and chosen.system_prompts != "none":
        raise ValueError(
            f"{chosen.path} has no system turn, but encoder.system_prompts={chosen.system_prompts!r}: set 'none'."
        )
    selection = selection_of(config, sizes)
    encoder = encoders.load(
        chosen.path,
        layers=selection.layers,
        form=selection.form,
        dtype=chosen.dtype,
        mesh=mesh,
        quantize=chosen.quantize,
    )
    return encoder, autoencoders.load(config.autoencoder.path, dtype=config.autoencoder.dtype, mesh=mesh)


def selection_of(config: TrainConfig, sizes: Any) -> Selection:
    """Returns which layers the encoder of a training config exports, and what of them."""
    return config.conditioning.select(config.encoder.layers, sizes.num_layers, config.dit.num_layers)


def model_config_of(config: TrainConfig, sizes: Any) -> ModelConfig:
    """Returns the sizes that a training config implies for an encoder of these (`Encoder.config`).

    Raises ValueError, naming the dimension and what would fit, where the strategy cannot connect encoder and DiT.
    """
    selection = selection_of(config, sizes)
    return ModelConfig(
        len(selection.layers),
        encoders.exported_size(sizes, selection.form),
        config.conditioning,
        config.dit,
        sizes.key_value_shape[0] if selection.form == "key_values" else 0,
    )


def check_fit(encoder: Encoder, autoencoder: Autoencoder, model: ModelConfig) -> None:
    """Raises ValueError naming the dimension in which frozen and trained parts disagree."""
    pairs = (
        ("exported layers (encoder.layers)", len(encoder.layers), model.num_layers),
        ("encoder width (encoder.path)", encoder.exported_size, model.encoder_size),
        (_LATENTS, autoencoder.latent_channels, model.dit.latent_channels),
    )
    for name, got, expected in pairs:
        _check_equal(name, got, expected)


def _check_equal(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"The frozen networks do not fit the model: {name} is {got}, the model takes {expected}.")
