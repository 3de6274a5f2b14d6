"""Names of autoencoder weights: in diffusers' files, new and old, and in the original LDM, FLUX.1 and FLUX.2 files."""

import re
from typing import Any

import numpy as np
from flax import traverse_util

from unifusion_jax import weights
from unifusion_jax.autoencoders.wan_config import AutoencoderKLWanConfig

_LEAF_NAMES = {"kernel": "weight", "scale": "weight"}

# Attention maps are (out, in) matrices in diffusers and 1x1 convolutions (out, in, 1, 1) in the original files.
_ATTENTION = weights.Transform(lambda x: (x[..., 0, 0] if x.ndim == 4 else x).T, lambda x: x.T)

_ATTENTION_NAMES = {
    **{"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"},  # diffusers before 0.18
    **{"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"},  # original
}
_ATTENTION_PART = re.compile(r"(?P<parent>.*\.attentions\.\d+)\.(?P<part>\w+)(?P<leaf>\.weight|\.bias)")

_ORIGINAL_NAMES = (
    (r"^encoder\.(quant_conv\.)", r"\1"),
    (r"^decoder\.(post_quant_conv\.)", r"\1"),
    (r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.\1sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)


def canonical_name(name: str, levels: int) -> str | None:
    """Returns the current diffusers name of a tensor in any of the spellings, or None for one that is no weight.

    The original files count decoder levels from the finest, diffusers from the coarsest; `levels` is their number.
    """
    if name == "bn.num_batches_tracked":
        return None
    if (
        re.match(r"(encoder|decoder)\.(mid|down|up|norm_out|quant_conv|post_quant_conv)\.", name)
        or ".nin_shortcut." in name
    ):
        for pattern, replacement in _ORIGINAL_NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"(?<=\.up_blocks\.)\d+", lambda m: str(levels - 1 - int(m[0])), name)
    if found := _ATTENTION_PART.fullmatch(name):
        part = _ATTENTION_NAMES.get(found["part"], found["part"])
        return f"{found['parent']}.{part}{found['leaf']}"
    return name


def rules_of(params: dict[str, Any]) -> list[weights.Rule]:
    """Returns the weight table of a parameter tree (abstract or not), in diffusers' current names.

    For AutoencoderKL, AutoencoderKLFlux2 and AutoencoderTiny, where a parameter's path is its name.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    rules = []
    for path, leaf in flat.items():
        parent, _, name = path.rpartition(".")
        parent = parent + ".0" if parent.endswith(".to_out") else parent
        transform = {2: _ATTENTION, 4: weights.CONV}.get(len(leaf.shape), weights.IDENTITY)
        rules.append(weights.Rule(f"{parent}.{_LEAF_NAMES.get(name, name)}", path, transform))
    return rules


_WAN_NAMES = {"group_norm": "norm", "to_out": "proj", "conv": "resample.1"}
_LINEAR_AS_CONV = weights.Transform(lambda x: x[..., 0, 0].T, lambda x: x.T[..., None, None])


def _causal(kernel: Any) -> Any:
    """Makes a cubic causal kernel (out, in, kt, kh, kw) of (kh, kw, in, out), which acts on a single frame alone."""
    taps = np.zeros((kernel.shape[0], 1, 1), kernel.dtype)
    taps[-1] = 1
    return kernel.transpose(3, 2, 0, 1)[:, :, None] * taps


# Of a causal kernel, the last slice acts on a single frame; the others see the zeros before it.
_CAUSAL = weights.Transform(lambda x: weights.CONV.forward(x[:, :, -1]), _causal)


def wan_rules_of(params: dict[str, Any], config: AutoencoderKLWanConfig) -> list[weights.Rule]:
    """Returns the weight table of an `AutoencoderKLWan` parameter tree (abstract or not), in diffusers' names."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    rules = []
    for path, leaf in flat.items():
        parent, _, name = path.rpartition(".")
        layer = parent.rpartition(".")[2]
        parent = parent.removesuffix(layer) + _WAN_NAMES.get(layer, layer)
        if name == "scale":  # (c, 1, 1) in attention, which runs on frames, (c, 1, 1, 1) elsewhere
            rules.append(weights.Rule(f"{parent}.gamma", path, _gamma(2 if layer == "group_norm" else 3)))
            continue
        if len(leaf.shape) == 2:
            transform = _LINEAR_AS_CONV
        elif len(leaf.shape) == 4:
            transform = weights.CONV if layer == "conv" or not config.stores_time else _CAUSAL
        else:
            transform = weights.IDENTITY
        rules.append(weights.Rule(f"{parent}.{_LEAF_NAMES.get(name, name)}", path, transform))
    return rules


def _gamma(trailing: int) -> weights.Transform:
    return weights.Transform(lambda x: x.reshape(-1), lambda x: x.reshape(-1, *(1,) * trailing))


def wan_name(name: str) -> str | None:
    """Returns the name of a tensor of a Wan or Qwen-Image file, or None for one that never acts on a still image."""
    return None if ".time_conv." in name else name


def time_convolutions(config: AutoencoderKLWanConfig, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of the convolutions over time that a file has beside the weights called `names`."""
    shapes: dict[str, tuple[int, ...]] = {}
    kernel = (3, 1, 1) if config.stores_time else (1, 1)
    widths = {"encoder": config.encoder_widths[1:], "decoder": config.decoder_widths[1:]}
    temporal = {"encoder": config.temporal_downsample, "decoder": config.temporal_downsample[::-1]}
    for side, times in (("encoder", 1), ("decoder", 2)):
        ends = [name for name in names if name.startswith(side) and name.endswith(".resample.1.weight")]
        ends.sort(key=lambda name: int(name.split(".")[2]))
        for end, width, keeps in zip(ends, widths[side], temporal[side], strict=False):
            if keeps:
                prefix = end.removesuffix("resample.1.weight") + "time_conv"
                shapes[f"{prefix}.weight"] = (times * width, width, *kernel)
                shapes[f"{prefix}.bias"] = (times * width,)
    return shapes
