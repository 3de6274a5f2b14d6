"""Tiny text-only models of transformers with random weights, in every layout that is published, and their tokenizers."""

import functools
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers
from encoders_support import TEXTS, original_config, original_tensors, reference, train_tokenizer, write_processor

from unifusion_jax.encoders import EncoderBatch
from unifusion_jax.encoders.templates import CONTROL_TOKENS

VOCAB = 420
CONTROL = {
    "llama": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
              "<|eot_id|>"),
    "gemma3_text": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "internlm2": ("<s>", *CONTROL_TOKENS),
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 900.0, "factor": 2.0}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
SLIDING, FULL = "sliding_attention", "full_attention"

# name -> (family, layout, settings). Head counts, widths and depths are chosen so that no two sizes agree; ratios of query
# to key-value heads are 1, 2, 3, 5 and 7. Layouts: as transformers saves it, "bare" (no head, no "model."), "packed"
# (InternLM2's), "meta" (Meta's).
VARIANTS = {
    "llama": ("llama", "saved", {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "num_hidden_layers": 5,
        "rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5,
    }),
    "llama, tied, biases": ("llama", "saved", {
        "hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 3,
        "attention_bias": True, "tie_word_embeddings": True,
    }),
    "llama, Meta's names": ("llama", "meta", {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "rope_parameters": LLAMA3_ROPE,
    }),
    "qwen2": ("qwen2", "saved", {
        "hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1, "num_hidden_layers": 4,
        "tie_word_embeddings": True,
    }),
    "qwen2, window": ("qwen2", "saved", {
        "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 4,
        "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 6,
    }),
    "qwen3": ("qwen3", "saved", {
        "hidden_size": 28, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 4,
    }),
    "qwen3, tied, biases, no head": ("qwen3", "bare", {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 14, "num_hidden_layers": 3,
        "attention_bias": True, "tie_word_embeddings": True,
    }),
    "internlm2": ("internlm2", "packed", {
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 4,
        "rope_parameters": DYNAMIC_ROPE, "rms_norm_eps": 1e-5,
    }),
    "internlm2, biases": ("internlm2", "packed", {
        "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "num_hidden_layers": 3,
        "attention_bias": True,
    }),
    "gemma3": ("gemma3_text", "saved", {
        "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "num_hidden_layers": 7,
        "query_pre_attn_scalar": 7, "sliding_window": 5, "rope_parameters": GEMMA_ROPE,
    }),
    "gemma3, own pattern, untied, biases": ("gemma3_text", "saved", {
        "hidden_size": 30, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 4,
        "query_pre_attn_scalar": 30, "sliding_window": 3, "rope_parameters": GEMMA_ROPE, "attention_bias": True,
        "layer_types": [FULL, SLIDING, FULL, SLIDING], "tie_word_embeddings": False,
    }),
}  # fmt: skip
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    # InternLM2 computes what Llama does; only its files differ.
    "internlm2": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}


@functools.cache
def text_model(variant: str) -> transformers.PreTrainedModel:
    """A float32 model, every parameter random, biases and norms too; each a bfloat16 number, as in published files."""
    family, _, settings = VARIANTS[variant]
    config_class, model_class = _CLASSES[family]
    rope = {} if "rope_parameters" in settings else {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}
    config = config_class(
        vocab_size=VOCAB, intermediate_size=44, max_position_embeddings=512, pad_token_id=0, **rope, **settings
    )
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    for part in (model, model.model):
        part.config.tie_last_hidden_states = False
    generator = torch.Generator().manual_seed(len(variant))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            mean = 1.0 if "norm" in name and family != "gemma3_text" else 0.0
            # Embeddings as large as what a block adds: beside smaller ones rounding is amplified as in no trained model.
            width = 1 if "embed_tokens" in name else max(parameter.shape[-1], 9)
            value = mean + 0.2 * noise if "norm" in name else noise / width**0.5
            if name == "model.norm.weight" and config.tie_word_embeddings:
                # A random model with tied embeddings repeats its last token for ever, unless signs part in from out.
                gain = 1.0 - mean + value
                value = gain * (1 - 2 * (torch.arange(len(gain)) % 2)) - (1.0 - mean)
            parameter.copy_(value.bfloat16())
    return model


@functools.cache
def text_tokenizer(family: str) -> transformers.PreTrainedTokenizerFast:
    """The byte-pair tokenizer of the other tests with a family's control tokens."""
    base = train_tokenizer(TEXTS * 3, 400)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=base.backend_tokenizer, pad_token=base.pad_token)
    made.add_tokens(list(CONTROL.get(family, CONTROL_TOKENS)), special_tokens=True)
    # Tells that the model was taught turns; the text itself is not used.
    made.chat_template = "{{ messages[0]['content'] }}"
    return made


def pack_internlm2(tensors: dict[str, torch.Tensor], config, head: str) -> dict[str, torch.Tensor]:
    """Renames Llama's tensors to InternLM2's, q, k and v packed by key-value head."""
    names = {
        "embed_tokens": "tok_embeddings", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    groups, dim = config.num_key_value_heads, config.head_dim
    packed = {}
    for name, value in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [
                tensors[name.replace("q_proj", f"{kind}_proj")].view(groups, -1, dim, *value.shape[1:])
                for kind in "qkv"
            ]
            packed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(parts, dim=1).flatten(0, 2)
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        packed[f"{head}output.weight" if name.endswith("lm_head.weight") else name] = value
    return {name: value.contiguous().clone() for name, value in packed.items()}


def _meta(tensors: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Renames Llama's tensors to Meta's, with neighbouring rotary pairs."""
    renamed = {}
    for name, value in pack_internlm2({k: v for k, v in tensors.items() if "self_attn" not in k}, config, "").items():
        renamed[name.removeprefix("model.")] = value
    for name, value in tensors.items():
        if "self_attn" in name:
            kind = name.split("self_attn.")[1][0]
            if kind in "qk":
                halves = value.view(-1, 2, config.head_dim // 2, value.shape[-1])
                value = halves.transpose(1, 2).reshape(value.shape)
            renamed[name.removeprefix("model.").replace(f"self_attn.{kind}_proj", f"attention.w{kind}")] = value
    return {name: value.contiguous().clone() for name, value in renamed.items()}


def write_text_model(folder: Path, variant: str, *, tokenizer: bool = True) -> Path:
    """Writes a variant's folder in its layout."""
    family, layout, _ = VARIANTS[variant]
    model = text_model(variant)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "saved":
        model.save_pretrained(folder)
    elif layout == "bare":
        model.model.save_pretrained(folder)
    else:
        raw = model.config.to_dict()
        if layout == "packed":
            rope = raw.pop("rope_parameters")
            raw |= {
                "model_type": "internlm2", "bias": raw.pop("attention_bias"), "rope_theta": rope["rope_theta"],
                "rope_scaling": {"type": rope["rope_type"], "factor": 2.0} if "factor" in rope else None,
            }  # fmt: skip
            tensors = pack_internlm2(model.state_dict(), model.config, "")
        else:
            tensors = _meta(model.state_dict(), model.config)
        (folder / "config.json").write_text(json.dumps(raw))
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    if tokenizer:
        text_tokenizer(family).save_pretrained(folder)
    return folder


def write_internvl25(folder: Path) -> Path:
    """Writes an InternVL 2.5 model in its original layout: InternLM2 packed, the vision tower fused."""
    model = reference("llama")
    text = model.config.text_config
    tensors = original_tensors(model)
    language = {name: value for name, value in tensors.items() if name.startswith("language_model.")}
    for name in language:
        del tensors[name]
    tensors |= pack_internlm2(language, text, "language_model.")
    raw = original_config(model)
    raw["llm_config"] |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    (folder / "config.json").write_text(json.dumps(raw))
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    write_processor(folder)
    text_tokenizer("internlm2").save_pretrained(folder)
    return folder


def token_batch(*, left: bool, length: int = 21) -> EncoderBatch:
    """Three rows of 21, 13 and 4 random tokens."""
    lengths = np.array([length, 13, 4])[:, None]
    places = np.arange(length)
    mask = places >= length - lengths if left else places < lengths
    return EncoderBatch.from_tokens(np.random.default_rng(7).integers(1, 400, (3, length)), mask)


def text_run(model, batch: EncoderBatch) -> tuple[np.ndarray, np.ndarray]:
    """Runs transformers on a batch of tokens; returns its states [B, S, layers + 1, H] (none normed) and logits."""
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(batch.token_ids).long(),
            attention_mask=torch.tensor(batch.mask).long(),
            position_ids=torch.tensor(np.maximum(batch.mask.cumsum(axis=1) - 1, 0)),
            output_hidden_states=True,
        )
    return torch.stack(out.hidden_states, dim=2).numpy(), out.logits.numpy()
