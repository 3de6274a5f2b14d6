"""Reading an encoder from its folder: config.json decides the family, whose rules say where each weight goes."""

import functools
import os
from collections.abc import Sequence
from typing import Any, Literal

from flax import nnx
from jax.sharding import Mesh

from unifusion_jax import weights
from unifusion_jax.encoders import registry
from unifusion_jax.encoders.encoder import Encoder, abstract_model
from unifusion_jax.encoders.forms import Form
from unifusion_jax.encoders.quantization import quantizer
from unifusion_jax.parallel.sharding import param_shardings


def read_config(path: str | os.PathLike[str]) -> Any:
    """Reads an encoder's sizes from its `config.json`, without its weights; see `load` for the errors."""
    raw = weights.read_json(weights.resolve(path) / "config.json")
    return registry.find(raw).read_config(raw)


def load(
    path: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    form: Form = "states",
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    quantize: Literal["none", "int8"] = "none",
) -> Encoder:
    """Loads an encoder; its `config.json` decides which.

    Args:
      path: local folder or hub id, in any published layout; `docs/encoders.md` lists families and layouts.
      layers: exported layers, 0 (embeddings) .. number of blocks; every third from 1 when None.
      form: what is exported of them, see `Encoder`.
      dtype: of parameters and states.
      mesh: devices to spread the parameters over; the default device when None.
      quantize: "int8" keeps the matrices of all linear maps as 8-bit integers with a scale per output channel; embeddings,
        convolutions, norms and biases stay in `dtype`, in which it still computes.

    Raises:
      FileNotFoundError: no such folder or missing files.
      ValueError: unsupported model, or weights that do not fit the config, all listed.
    """
    root = weights.resolve(path)
    raw = weights.read_json(root / "config.json")
    family = registry.find(raw)
    rules = family.rules(family.read_config(raw))  # an unsupported model is told before its weights are looked for
    files = weights.SafetensorsFolder(root)
    heads = {rule.source for rule in rules if rule.target == "decoder.head.kernel"}
    config = family.read_config(raw, has_head=any(family.canonical_name(name) in heads for name in files.names()))
    model = abstract_model(config, dtype)

    def rename(name: str) -> str | None:
        canonical = family.canonical_name(name)
        # Some writers store the output head although it is tied to the embeddings.
        return None if canonical in heads and config.decoder.tie_embeddings else canonical

    params = weights.load(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        files,
        rules,
        rename=rename,
        shardings=param_shardings(model, mesh) if mesh is not None else None,
        finish=quantizer(model, quantize),
    )
    processor = functools.partial(family.read_processor, root, raw, config)
    return Encoder(config, params, processor, layers=layers, form=form, mesh=mesh)
