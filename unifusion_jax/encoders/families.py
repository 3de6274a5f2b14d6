"""Language model families: decoder sizes read from a published `config.json`, and the names of a decoder's tensors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unifusion_jax.encoders.decoder_config import DecoderConfig, LinearScaling, Llama3Scaling
from unifusion_jax.weights import IDENTITY, LINEAR, Rule, Transform

# What a family's configuration class assumes for keys that config.json leaves out. Gemma 3's published files rely on it.
_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        **_COMMON,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    "internlm2": {
        **_COMMON,
        "vocab_size": 103168,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "bias": True,
    },
    "llama": {**_COMMON, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "qwen2": {
        **_COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        **_COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
}
LANGUAGE_MODELS = tuple(sorted(_DEFAULTS))

# Keys whose other values the decoder does not do, with the values that it does.
_EXPECTED: dict[str, Any] = {
    "mlp_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def decoder_config(text: Mapping[str, Any], *, tie_embeddings: bool) -> DecoderConfig:
    """Reads a decoder's sizes from a language model's `config.json`.

    Raises ValueError, naming key and value, for what the decoder does not do.
    """
    family = text.get("model_type", "qwen2")
    if family not in _DEFAULTS:
        raise ValueError(f"Unsupported language model {family!r}; supported: {', '.join(LANGUAGE_MODELS)}.")
    for key, expected in _EXPECTED.items():
        if text.get(key) not in (None, expected):
            raise ValueError(f"{key}={text[key]!r} is not supported, expected {expected!r}.")
    given = {key: value for key, value in text.items() if value is not None}
    values = {**_DEFAULTS[family], **given}
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    options = {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads", heads),
        "head_dim": values.get("head_dim", values["hidden_size"] // heads),
        "ffn_size": values["intermediate_size"],
        "max_positions": values["max_position_embeddings"],
        "rms_eps": values["rms_norm_eps"],
        "activation": values.get("hidden_activation", values["hidden_act"]),
        "tie_embeddings": tie_embeddings,
    }
    if family == "gemma3_text":
        return DecoderConfig(**options, **_gemma3(values, given))
    theta, scaling = _rope(values, _flat_rope(values))
    # Qwen2 always has biases on q, k and v, and never one on the output map; the others have them together.
    bias = values.get("bias" if family == "internlm2" else "attention_bias", False)
    slides = family.startswith("qwen") and values.get("use_sliding_window", False)
    return DecoderConfig(
        **options,
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=family == "qwen2" or bias,
        output_bias=family != "qwen2" and bias,
        qk_norm=family == "qwen3",
        sliding_layers=_sliding_layers(values, from_layer=values.get("max_window_layers", 28)) if slides else (),
        window_tokens=values.get("sliding_window", 4096) if slides else 0,
    )


def _gemma3(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what only Gemma 3 has; older files spell the rotary settings flat, newer ones by kind of layer."""
    by_kind = given.get("rope_parameters") or {}
    whole = by_kind.get("full_attention") or given.get("rope_scaling") or {}
    local = by_kind.get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"Unsupported rotary scaling {local['rope_type']!r} of sliding layers; supported: 'default'.")
    theta, scaling = _rope(values, whole)
    bias = values.get("attention_bias", False)
    return {
        "norm_offset": 1.0,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_layers": _sliding_layers(values, every=values["sliding_window_pattern"]),
        "window_tokens": values["sliding_window"],
        "sliding_rope_theta": float(local.get("rope_theta", values["rope_local_base_freq"])),
        "attention_bias": bias,
        "output_bias": bias,
        "qk_norm": True,
        "attention_scale": values["query_pre_attn_scalar"] ** -0.5,
        "post_norms": True,
        "embedding_scale": values["hidden_size"] ** 0.5,
    }


def _sliding_layers(values: Mapping[str, Any], *, from_layer: int = 0, every: int = 0) -> tuple[bool, ...]:
    """Reads which layers slide: as listed, else all but each `every`-th, else those from `from_layer` on (0-based)."""
    layers = values["num_hidden_layers"]
    kinds = values.get("layer_types")
    if kinds is None:
        return tuple(bool((i + 1) % every) if every else i >= from_layer for i in range(layers))
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"Unsupported layer_types {unknown}; supported: 'full_attention', 'sliding_attention'.")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _flat_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Joins both spellings: rope_theta with rope_scaling, and rope_parameters."""
    return {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}


def _rope(values: Mapping[str, Any], rope: Mapping[str, Any]) -> tuple[float, Llama3Scaling | LinearScaling | None]:
    """Returns base and scaling."""
    theta = float(rope.get("rope_theta", values["rope_theta"]))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "dynamic"):  # dynamic scaling acts beyond max_position_embeddings only, which is refused
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(float(rope["factor"]))
    if kind == "llama3":
        return theta, Llama3Scaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_positions=rope["original_max_position_embeddings"],
        )
    raise ValueError(f"Unsupported rotary scaling {kind!r}; supported: 'default', 'dynamic', 'linear', 'llama3'.")


def text_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `config.json` of a Qwen2 or Qwen3 language model; the inverse of `decoder_config` for these families.

    Raises ValueError for decoders of other families.
    """
    family = "qwen3" if config.qk_norm else "qwen2"
    raw = {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
    }
    if decoder_config(raw, tie_embeddings=config.tie_embeddings) != config:
        raise ValueError("Only decoders of Qwen2's and Qwen3's form can be written, this one has other settings.")
    return raw


def decoder_rules(prefix: str, head: str, target: str = "decoder", *, post_norms: bool = False) -> list[Rule]:
    """Returns the weight table of a decoder: its tensors are named `prefix` + Llama's names, its output head `head`.

    `post_norms` is for Gemma's names, which give a norm behind the attention the name of Llama's second norm.
    """
    block, layer = f"{target}.layers.blocks", f"{prefix}layers.{{layer}}"
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    if post_norms:
        norms |= {
            "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "ffn_post_norm",
        }
    rules = [
        Rule(f"{prefix}embed_tokens.weight", f"{target}.embed.embedding"),
        Rule(f"{prefix}norm.weight", f"{target}.norm.scale"),
        Rule(head, f"{target}.head.kernel", LINEAR),
        *(Rule(f"{layer}.{theirs}.weight", f"{block}.{ours}.scale") for theirs, ours in norms.items()),
        Rule(f"{layer}.self_attn.q_norm.weight", f"{block}.attention.q_norm.scale"),
        Rule(f"{layer}.self_attn.k_norm.weight", f"{block}.attention.k_norm.scale"),
    ]
    for name in "qkvo":
        rules.append(Rule(f"{layer}.self_attn.{name}_proj.weight", f"{block}.attention.{name}.kernel", LINEAR))
        rules.append(Rule(f"{layer}.self_attn.{name}_proj.bias", f"{block}.attention.{name}.bias"))
    for name in ("gate", "up", "down"):
        rules.append(Rule(f"{layer}.mlp.{name}_proj.weight", f"{block}.ffn.{name}.kernel", LINEAR))
    return rules


def meta_rules(config: DecoderConfig, prefix: str, head: str, target: str = "decoder") -> list[Rule]:
    """Returns what Meta's own names of Llama, which InternLM2 shares, add to `decoder_rules`; only for reading.

    The families differ in q, k and v: InternLM2 packs them in one map, Meta turns neighbouring pairs where all others turn
    first and second half.
    """
    block, layer = f"{target}.layers.blocks", f"{prefix}layers.{{layer}}"
    rules = [
        Rule(f"{prefix}tok_embeddings.weight", f"{target}.embed.embedding"),
        Rule(head, f"{target}.head.kernel", LINEAR),
        Rule(f"{layer}.attention_norm.weight", f"{block}.attention_norm.scale"),
        Rule(f"{layer}.ffn_norm.weight", f"{block}.ffn_norm.scale"),
        Rule(f"{layer}.attention.wo.weight", f"{block}.attention.o.kernel", LINEAR),
        Rule(f"{layer}.attention.wo.bias", f"{block}.attention.o.bias"),
        Rule(f"{layer}.attention.wv.weight", f"{block}.attention.v.kernel", LINEAR),
    ]
    for name, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        rules.append(Rule(f"{layer}.feed_forward.{theirs}.weight", f"{block}.ffn.{name}.kernel", LINEAR))
    for name in "qk":
        rules.append(Rule(f"{layer}.attention.w{name}.weight", f"{block}.attention.{name}.kernel", _halves(config)))
    for name in "qkv":
        kernel, bias = f"{block}.attention.{name}.kernel", f"{block}.attention.{name}.bias"
        rules.append(Rule(f"{layer}.attention.wqkv.weight", kernel, _packed(config, name, LINEAR)))
        rules.append(Rule(f"{layer}.attention.wqkv.bias", bias, _packed(config, name, IDENTITY)))
    return rules


def _packed(config: DecoderConfig, name: str, of: Transform) -> Transform:
    """Takes the q, k or v rows of InternLM2's packed map: for each key-value head its query heads, then k, then v."""
    queries = config.num_heads // config.num_kv_heads
    rows = {"q": slice(0, queries), "k": slice(queries, queries + 1), "v": slice(queries + 1, queries + 2)}[name]

    def take(packed: np.ndarray) -> np.ndarray:
        if packed.shape[0] != (queries + 2) * config.num_kv_heads * config.head_dim:
            return of.forward(packed)  # the loader reports the shape
        groups = packed.reshape(config.num_kv_heads, queries + 2, config.head_dim, *packed.shape[1:])
        return of.forward(groups[:, rows].reshape(-1, *packed.shape[1:]))

    return Transform(take, None)


def _halves(config: DecoderConfig) -> Transform:
    """Sorts the rows of each head from neighbouring pairs to first and second half."""

    def sort(pairs: np.ndarray) -> np.ndarray:
        heads = pairs.reshape(-1, config.head_dim // 2, 2, pairs.shape[-1])
        return LINEAR.forward(heads.swapaxes(1, 2).reshape(pairs.shape))

    return Transform(sort, None)


def canonical_name(name: str) -> str | None:
    """Maps a text-only model's tensor name to the tables'; None for tensors that take no part.

    The tables begin with "model."; models without a head are published without it, and a language model cut out of a
    larger one begins with "language_model.".
    """
    if name.endswith("rotary_emb.inv_freq") or name == "rope.freqs":
        return None
    name = name.removeprefix("language_model.")
    return name if name.startswith("model.") or name in ("lm_head.weight", "output.weight") else f"model.{name}"
