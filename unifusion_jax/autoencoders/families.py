"""The classes of autoencoders that load, and what is special to each: network, weight table, tensors that are only stored."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from unifusion_jax import weights
from unifusion_jax.autoencoders import names, tiny, wan_config
from unifusion_jax.autoencoders.config import CLASS_NAME, FLUX2_CLASS_NAME, AutoencoderKLConfig
from unifusion_jax.autoencoders.kl import AutoencoderKL
from unifusion_jax.autoencoders.latents import LatentConfig, LatentModule
from unifusion_jax.autoencoders.tiny import AutoencoderTiny, AutoencoderTinyConfig
from unifusion_jax.autoencoders.wan import AutoencoderKLWan
from unifusion_jax.autoencoders.wan_config import AutoencoderKLWanConfig

_CONFIGS: dict[str, type[LatentConfig]] = {
    CLASS_NAME: AutoencoderKLConfig,
    FLUX2_CLASS_NAME: AutoencoderKLConfig,
    wan_config.WAN: AutoencoderKLWanConfig,
    wan_config.QWEN_IMAGE: AutoencoderKLWanConfig,
    wan_config.QWEN_IMAGE21: AutoencoderKLWanConfig,
    tiny.CLASS_NAME: AutoencoderTinyConfig,
}
SUPPORTED_CLASS_NAMES = tuple(_CONFIGS)


@dataclasses.dataclass(frozen=True)
class Family:
    """What one network needs to be built, loaded and saved.

    Attributes:
      module: the network; called with the config and the keywords dtype, param_dtype and rngs.
      rules: weight table of a parameter tree.
      rename: spelling of a tensor's name in the table, None for one that is not loaded.
      stored: shape and dtype of tensors that diffusers' files also hold and that do not act here; called with the names of
        those that do. They are written as zeros.
    """

    module: Callable[..., LatentModule]
    rules: Callable[[dict[str, Any]], list[weights.Rule]]
    rename: weights.Rename
    stored: Callable[[list[str]], dict[str, tuple[tuple[int, ...], Any]]]


def config_of(values: Mapping[str, Any], *, pack: int | None = None) -> LatentConfig:
    """Reads the content of a diffusers `config.json`, whose `_class_name` decides the class.

    Raises:
      ValueError: for a class that is not supported, listing those that are, and for values that do not fit.
    """
    name = values.get("_class_name")
    if name not in _CONFIGS:
        raise ValueError(
            f"config.json names the class {name!r}, which is not a supported autoencoder. Supported _class_name "
            f"values: {', '.join(SUPPORTED_CLASS_NAMES)}."
        )
    return _CONFIGS[name].from_diffusers(values, pack=pack)


def family_of(config: LatentConfig) -> Family:
    """Returns what belongs to a config's class."""
    if isinstance(config, AutoencoderKLConfig):
        rename = functools.partial(names.canonical_name, levels=len(config.block_out_channels))
        counter = {"bn.num_batches_tracked": ((), np.int64)} if config.batch_norm_eps is not None else {}
        return Family(AutoencoderKL, names.rules_of, rename, lambda _: dict(counter))
    if isinstance(config, AutoencoderKLWanConfig):

        def over_time(known: list[str]) -> dict[str, tuple[tuple[int, ...], Any]]:
            shapes = names.time_convolutions(config, known)
            return {name: (shape, np.float32) for name, shape in shapes.items()}

        rules = functools.partial(names.wan_rules_of, config=config)
        return Family(AutoencoderKLWan, rules, names.wan_name, over_time)
    if isinstance(config, AutoencoderTinyConfig):
        return Family(AutoencoderTiny, names.rules_of, lambda name: name, lambda _: {})
    raise TypeError(f"No autoencoder has a config of type {type(config).__name__}.")
