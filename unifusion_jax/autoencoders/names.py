"""Names of autoencoder weights: in diffusers' files, new and old, and in the original LDM, FLUX.1 and FLUX.2 files."""

import re
from typing import Any

from flax import traverse_util

from unifusion_jax import weights

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
    """Returns the weight table of a parameter tree (abstract or not), in diffusers' current names."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep=".")
    rules = []
    for path, leaf in flat.items():
        parent, _, name = path.rpartition(".")
        parent = parent + ".0" if parent.endswith(".to_out") else parent
        transform = {2: _ATTENTION, 4: weights.CONV}.get(len(leaf.shape), weights.IDENTITY)
        rules.append(weights.Rule(f"{parent}.{_LEAF_NAMES.get(name, name)}", path, transform))
    return rules
