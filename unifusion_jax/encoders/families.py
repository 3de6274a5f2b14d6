"""Language model families: decoder sizes read from a published `config.json`, and the names of a decoder's tensors."""

from collections.abc import Mapping
from typing import Any

from unifusion_jax.encoders.decoder_config import DecoderConfig, Llama3Scaling
from unifusion_jax.weights import LINEAR, Rule

# What a family's configuration class assumes for keys that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": True,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
    },
}


def decoder_config(text: Mapping[str, Any], *, tie_embeddings: bool) -> DecoderConfig:
    """Reads a decoder's sizes from a language model's `config.json`.

    Raises ValueError, naming key and value, for what the decoder does not do.
    """
    family = text.get("model_type", "qwen2")
    if family not in _DEFAULTS:
        raise ValueError(f"Unsupported language model {family!r}; supported: {sorted(_DEFAULTS)}.")
    if text.get("use_sliding_window"):
        raise ValueError("use_sliding_window=true is not supported: only full causal attention is.")
    if text.get("mlp_bias"):
        raise ValueError("mlp_bias=true is not supported: the feed-forward maps have no biases.")
    values = {**_DEFAULTS[family], **{key: value for key, value in text.items() if value is not None}}
    # Qwen2 always has q, k and v biases; Llama's flag would also put one on the output map.
    if family == "llama" and values["attention_bias"]:
        raise ValueError("attention_bias=true is not supported for Llama: the output map has no bias.")
    theta, scaling = _rope(values)
    heads = values["num_attention_heads"]
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads", heads),
        head_dim=values.get("head_dim", values["hidden_size"] // heads),
        ffn_size=values["intermediate_size"],
        max_positions=values["max_position_embeddings"],
        rms_eps=values["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=values["attention_bias"],
        activation=values.get("hidden_act", "silu"),
        tie_embeddings=tie_embeddings,
    )


def _rope(values: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Reads base and scaling from both spellings: rope_theta with rope_scaling, and rope_parameters."""
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", values["rope_theta"]))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "dynamic"):  # dynamic scaling acts beyond max_position_embeddings only, which is refused
        return theta, None
    if kind == "llama3":
        return theta, Llama3Scaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_max_positions=rope["original_max_position_embeddings"],
        )
    raise ValueError(f"Unsupported rotary scaling {kind!r}; supported: 'default', 'dynamic', 'llama3'.")


def text_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `config.json` of a Qwen2 language model; the inverse of `decoder_config` for that family."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
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


def decoder_rules(prefix: str, head: str, target: str = "decoder") -> list[Rule]:
    """Returns the weight table of a decoder: its tensors are named `prefix` + Llama's names, its output head `head`."""
    block, layer = f"{target}.layers.blocks", f"{prefix}layers.{{layer}}"
    rules = [
        Rule(f"{prefix}embed_tokens.weight", f"{target}.embed.embedding"),
        Rule(f"{prefix}norm.weight", f"{target}.norm.scale"),
        Rule(head, f"{target}.head.kernel", LINEAR),
        Rule(f"{layer}.input_layernorm.weight", f"{block}.attention_norm.scale"),
        Rule(f"{layer}.post_attention_layernorm.weight", f"{block}.ffn_norm.scale"),
        Rule(f"{layer}.self_attn.q_norm.weight", f"{block}.attention.q_norm.scale"),
        Rule(f"{layer}.self_attn.k_norm.weight", f"{block}.attention.k_norm.scale"),
    ]
    for name in "qkvo":
        rules.append(Rule(f"{layer}.self_attn.{name}_proj.weight", f"{block}.attention.{name}.kernel", LINEAR))
        rules.append(Rule(f"{layer}.self_attn.{name}_proj.bias", f"{block}.attention.{name}.bias"))
    for name in ("gate", "up", "down"):
        rules.append(Rule(f"{layer}.mlp.{name}_proj.weight", f"{block}.ffn.{name}.kernel", LINEAR))
    return rules
