"""Names of InternVL's tensors: one table in transformers' current spelling, and the older spellings mapped onto it."""

import re

from unifusion_jax.encoders.families import decoder_rules, meta_rules
from unifusion_jax.encoders.internvl import InternVLConfig
from unifusion_jax.weights import CONV, IDENTITY, LINEAR, Rule, Transform

_TOWER = "model.vision_tower."
_LAYER = _TOWER + "encoder.layer.{layer}"
_BLOCK = "vision.layers.blocks"
_PROJECTOR = "model.multi_modal_projector."


def _tower_rules() -> list[Rule]:
    embeddings = _TOWER + "embeddings."
    rules = [
        Rule(embeddings + "cls_token", "vision.cls"),
        Rule(embeddings + "position_embeddings", "vision.positions"),
        Rule(embeddings + "patch_embeddings.projection.weight", "vision.patch.kernel", CONV),
        Rule(embeddings + "patch_embeddings.projection.bias", "vision.patch.bias"),
        Rule(f"{_LAYER}.lambda_1", f"{_BLOCK}.scale1"),
        Rule(f"{_LAYER}.lambda_2", f"{_BLOCK}.scale2"),
        Rule(f"{_LAYER}.attention.q_norm.weight", f"{_BLOCK}.q_norm.scale"),
        Rule(f"{_LAYER}.attention.k_norm.weight", f"{_BLOCK}.k_norm.scale"),
    ]
    for theirs, ours in (("layernorm_before", "attention_norm"), ("layernorm_after", "mlp_norm")):
        rules.append(Rule(f"{_LAYER}.{theirs}.weight", f"{_BLOCK}.{ours}.scale"))
        rules.append(Rule(f"{_LAYER}.{theirs}.bias", f"{_BLOCK}.{ours}.bias"))
    maps = [(f"attention.{name}_proj", name) for name in "qkv"]
    maps += [("attention.projection_layer", "o"), ("mlp.fc1", "up"), ("mlp.fc2", "down")]
    for theirs, ours in maps:
        rules.append(Rule(f"{_LAYER}.{theirs}.weight", f"{_BLOCK}.{ours}.kernel", LINEAR))
        rules.append(Rule(f"{_LAYER}.{theirs}.bias", f"{_BLOCK}.{ours}.bias"))
    return rules


def _projector_rules() -> list[Rule]:
    rules = [
        Rule(_PROJECTOR + "layer_norm.weight", "projector.norm.scale"),
        Rule(_PROJECTOR + "layer_norm.bias", "projector.norm.bias"),
    ]
    for theirs, ours in (("linear_1", "up"), ("linear_2", "down")):
        rules.append(Rule(f"{_PROJECTOR}{theirs}.weight", f"projector.{ours}.kernel", LINEAR))
        rules.append(Rule(f"{_PROJECTOR}{theirs}.bias", f"projector.{ours}.bias"))
    return rules


def third(index: int, of: Transform) -> Transform:
    """Takes the q, k or v rows of a fused map. Only for reading: a third does not make a whole."""
    return Transform(lambda x: of.forward(x.reshape(3, -1, *x.shape[1:])[index]), None)


def _fused_rules() -> list[Rule]:
    rules = []
    for index, name in enumerate("qkv"):
        rules.append(Rule(f"{_LAYER}.attention.qkv.weight", f"{_BLOCK}.{name}.kernel", third(index, LINEAR)))
        rules.append(Rule(f"{_LAYER}.attention.qkv.bias", f"{_BLOCK}.{name}.bias", third(index, IDENTITY)))
    return rules


RULES = (*_tower_rules(), *_projector_rules(), *decoder_rules("model.language_model.", "lm_head.weight"))


def read_rules(config: InternVLConfig) -> list[Rule]:
    """Returns the table of all spellings: this one, and what the original layout fuses or, with InternLM2, packs."""
    return [*RULES, *_fused_rules(), *meta_rules(config.decoder, "model.language_model.", "output.weight")]


# Regular expressions of the original layout's names and of older transformers' ones, and their current spelling.
_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"vision_model\.embeddings\.class_embedding", _TOWER + "embeddings.cls_token"),
        (r"vision_model\.embeddings\.position_embedding", _TOWER + "embeddings.position_embeddings"),
        (r"vision_model\.embeddings\.patch_embedding\.(\w+)", _TOWER + r"embeddings.patch_embeddings.projection.\1"),
        (
            r"vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.(\w+)",
            _TOWER + r"encoder.layer.\1.attention.projection_layer.\2",
        ),
        (r"vision_model\.encoder\.layers\.(\d+)\.attn\.(.+)", _TOWER + r"encoder.layer.\1.attention.\2"),
        (r"vision_model\.encoder\.layers\.(\d+)\.norm1\.(\w+)", _TOWER + r"encoder.layer.\1.layernorm_before.\2"),
        (r"vision_model\.encoder\.layers\.(\d+)\.norm2\.(\w+)", _TOWER + r"encoder.layer.\1.layernorm_after.\2"),
        (r"vision_model\.encoder\.layers\.(\d+)\.ls([12])", _TOWER + r"encoder.layer.\1.lambda_\2"),
        (r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(.+)", _TOWER + r"encoder.layer.\1.mlp.\2"),
        (r"mlp1\.0\.(\w+)", _PROJECTOR + r"layer_norm.\1"),
        (r"mlp1\.1\.(\w+)", _PROJECTOR + r"linear_1.\1"),
        (r"mlp1\.3\.(\w+)", _PROJECTOR + r"linear_2.\1"),
        (r"vision_tower\.(.+)", _TOWER + r"\1"),
        (r"multi_modal_projector\.(.+)", _PROJECTOR + r"\1"),
        (r"language_model\.model\.(.+)", r"model.language_model.\1"),
        (r"language_model\.(lm_head|output)\.weight", r"\1.weight"),
    )
)


def canonical_name(name: str) -> str | None:
    """Maps any published spelling of a tensor's name to the table's; None for tensors that take no part."""
    if name.endswith(("rotary_emb.inv_freq", "embeddings.mask_token")):
        return None
    for pattern, replacement in _SPELLINGS:
        if found := pattern.fullmatch(name):
            return found.expand(replacement)
    return name


def file_name(name: str) -> str:
    """Maps the table's spelling to the one that transformers writes into files, which all its versions read."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return "language_model.lm_head.weight" if name == "lm_head.weight" else name.removeprefix("model.")
