"""Every family of the causal decoder against transformers: states, rewriting, layouts, full sizes, templates, bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from encoders_support import (
    OTHER_LANGUAGE_MODELS,
    assert_same_states,
    least_cosine,
    photo,
    reference,
    reference_run,
    relative_error,
    teacher_forced,
    write_reference,
)
from families_support import (
    DYNAMIC_ROPE,
    GEMMA_ROPE,
    LLAMA3_ROPE,
    VARIANTS,
    text_model,
    text_run,
    text_tokenizer,
    token_batch,
    write_internvl25,
    write_text_model,
)
from flax import nnx

from unifusion_jax import encoders
from unifusion_jax.encoders import EncoderBatch, InternVLConfig, Prompt
from unifusion_jax.encoders.decoder_config import DecoderConfig
from unifusion_jax.encoders.encoder import abstract_model
from unifusion_jax.encoders.families import decoder_config, text_config
from unifusion_jax.encoders.model import TextConfig
from unifusion_jax.encoders.registry import FAMILIES
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.tasks.encoder import EncoderTask

PROMPTS = [Prompt("a red square left of a blue circle"), Prompt("one"), Prompt("make it yellow", system="be brief")]
PICTURES = [Prompt("make the ring yellow", [photo(1, 90, 40)]), Prompt("one", [photo(2, 32, 32), photo(3, 32, 32)])]
NEW_TOKENS = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_text_model(tmp_path_factory.mktemp("text"), name) for name in VARIANTS}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: encoders.load(folder, dtype="float32") for name, folder in folders.items()}


def every_layer(encoder) -> range:
    return range(encoder.config.num_layers + 1)


@pytest.mark.parametrize("left", [False, True], ids=["right padding", "left padding"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_and_the_logits_equal_transformers(loaded, variant, left):
    encoder, batch = loaded[variant], token_batch(left=left)
    ours = np.asarray(encoder.layer_states(batch, layers=every_layer(encoder)))
    theirs, their_logits = text_run(text_model(variant), batch)
    assert ours.shape == theirs.shape
    error = relative_error(ours, theirs, batch.mask)
    print(f"{variant}: worst layer {error:.1e} of its rms")  # docs/encoders.md gives the command that shows these
    assert error < 1e-4
    logits = encoder.module(encoder.params).decoder.logits(jnp.asarray(ours[:, :, -1]))
    assert relative_error(logits[:, :, None], their_logits[:, :, None], batch.mask) < 1e-4
    assert encoder.config.decoder.slides == ("window" in variant or "gemma" in variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_states_point_where_float32_ones_do(folders, variant):
    encoder, batch = encoders.load(folders[variant]), token_batch(left=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(encoder.params)} == {jnp.dtype(jnp.bfloat16)}
    ours = encoder.layer_states(batch, layers=every_layer(encoder))
    cosine = least_cosine(ours, text_run(text_model(variant), batch)[0], batch.mask)
    print(f"{variant}: least bfloat16 cosine of any token and layer {cosine:.5f}")
    assert cosine > 0.999


@pytest.mark.parametrize("variant", VARIANTS)
def test_rewriting_equals_teacher_forcing_and_generate(loaded, variant):
    encoder = loaded[variant]
    rewrite = encoder.rewrite(PROMPTS, max_new_tokens=NEW_TOKENS)
    assert_same_states(rewrite.states, teacher_forced(encoder, rewrite, PROMPTS))
    for prompt, answer in zip(PROMPTS, rewrite.token_ids, strict=True):
        batch = encoder.prepare([dataclasses.replace(prompt, target="")])
        out = text_model(variant).generate(
            input_ids=torch.tensor(batch.token_ids).long(),
            attention_mask=torch.ones(batch.token_ids.shape, dtype=torch.long),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=list(encoder.processor.stop_ids),
                pad_token_id=0,
            ),
        )
        decoded = out[0, batch.token_ids.shape[1] :].tolist()
        assert [token for token in decoded if token not in encoder.processor.stop_ids] == answer


def _check_internvl(folder, name):
    encoder = encoders.load(folder, dtype="float32")
    batch = encoder.prepare(PICTURES, max_tiles=4)
    ours = encoder.layer_states(batch, layers=every_layer(encoder))
    error = relative_error(ours, reference_run(reference(name), batch)[0], batch.mask)
    print(f"InternVL with {name}: worst layer {error:.1e} of its rms")
    assert error < 1e-4
    rewrite = encoder.rewrite(PICTURES, max_new_tokens=NEW_TOKENS, max_tiles=4)
    assert rewrite.states.is_image.sum() == batch.is_image.sum() > 0
    assert_same_states(rewrite.states, teacher_forced(encoder, rewrite, PICTURES))
    return encoder


def test_internvl25_in_its_original_layout(tmp_path):
    encoder = _check_internvl(write_internvl25(tmp_path), "llama")
    assert not encoder.config.decoder.attention_bias
    row = encoder.processor.prepare_row(Prompt("hi"))
    text = encoder.processor.tokenizer.decode(row.token_ids)
    assert text.startswith("<s><|im_start|>system\n") and "书生" in text
    with pytest.raises(ValueError, match="Only InternVL models with Qwen's chat tokens can be written"):
        encoder.save(tmp_path / "copy")


@pytest.mark.parametrize("name", OTHER_LANGUAGE_MODELS)
def test_internvl_with_other_language_models_in_transformers_layout(tmp_path, name):
    folder = write_reference(tmp_path, name)
    if name == "llama":
        text_tokenizer("internlm2").save_pretrained(folder)
    encoder = _check_internvl(folder, name)
    if name == "qwen3":
        encoder.save(tmp_path / "copy")
        assert encoders.load(tmp_path / "copy", dtype="float32").config == encoder.config


SPARSE = [
    {"model_type": "llama"},
    {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {**LLAMA3_ROPE, "rope_theta": None}},
    {"model_type": "llama", "rope_parameters": DYNAMIC_ROPE, "num_attention_heads": 16},
    {"model_type": "qwen2", "use_sliding_window": True},
    {"model_type": "qwen3", "num_key_value_heads": None},
    {"model_type": "gemma3_text"},
    {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024},
    {"model_type": "gemma3_text", "rope_theta": 5e5, "rope_local_base_freq": 7e3, "sliding_window_pattern": 2},
    {"model_type": "gemma3_text", "rope_parameters": GEMMA_ROPE, "num_hidden_layers": 4},
]


@pytest.mark.parametrize("raw", SPARSE, ids=str)
def test_missing_keys_take_the_defaults_of_transformers(raw):
    classes = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    raw = json.loads(json.dumps(raw))
    if raw.get("rope_scaling"):
        raw["rope_scaling"].pop("rope_theta", None)
    given = {key: value for key, value in json.loads(json.dumps(raw)).items() if key != "model_type"}
    whole = classes.get(raw["model_type"], transformers.Gemma3TextConfig)(**given).to_dict()
    assert decoder_config(raw, tie_embeddings=True) == decoder_config(whole, tie_embeddings=True)


@pytest.mark.parametrize(
    ("config", "decoder"),
    [
        (TextConfig.llama3_1_8b(), 8_030_261_248),
        (TextConfig.gemma3_4b(), 3_880_263_168),
        (TextConfig.gemma3_12b(), 11_766_034_176),
        (TextConfig.gemma3_27b(), 27_009_346_304),
        (InternVLConfig.internvl2_5_8b(), 7_737_782_272),
    ],
    ids=["llama3.1-8b", "gemma3-4b", "gemma3-12b", "gemma3-27b", "internvl2.5-8b"],
)
def test_full_sizes_have_the_published_parameter_counts(config, decoder):
    params = nnx.to_pure_dict(nnx.state(abstract_model(config, "bfloat16"), nnx.Param))
    assert sum(leaf.size for leaf in jax.tree.leaves(params["decoder"])) == decoder
    batch = EncoderBatch(*[jax.ShapeDtypeStruct((2, 2000), dtype) for dtype in (jnp.int32, bool, bool, bool)])
    graphdef = nnx.split(abstract_model(config, "bfloat16"), nnx.Param, ...)[0]
    layers = encoders.default_layers(config.num_layers)
    states = jax.eval_shape(lambda params, batch: nnx.merge(graphdef, params).states(batch, layers), params, batch)
    assert states.shape == (2, 2000, len(layers), config.hidden_size) and states.dtype == jnp.bfloat16


HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
EXPECTED = {
    "llama": "<|begin_of_text|>" + HEADER.format("system") + "be brief<|eot_id|>" + HEADER.format("user")
    + "a red square<|eot_id|>" + HEADER.format("assistant"),
    "qwen2": "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na red square<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na red square<|im_end|>\n<|im_start|>assistant\n",
    "internlm2": "<s><|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na red square<|im_end|>\n"
    "<|im_start|>assistant\n",
    "gemma3": "<bos><start_of_turn>user\nbe brief\n\na red square<end_of_turn>\n<start_of_turn>model\n",
}  # fmt: skip
DEFAULT_SYSTEM = {"llama": "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>",
                  "qwen2": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>"}  # fmt: skip


@pytest.mark.parametrize("family", EXPECTED)
def test_templates(loaded, family):
    processor = loaded[family].processor
    tokenizer = processor.tokenizer

    def text(row, mark=slice(None)) -> str:
        return tokenizer.decode(row.token_ids[mark], skip_special_tokens=False)

    row = processor.prepare_row(Prompt("a red square", system="be brief"))
    assert text(row) == EXPECTED[family] and text(row, row.keep) == "a red square"
    assert row.token_ids.tolist() == tokenizer(EXPECTED[family], add_special_tokens=False)["input_ids"]
    plain = text(processor.prepare_row(Prompt("a red square")))
    assert DEFAULT_SYSTEM[family] in plain if family in DEFAULT_SYSTEM else "system" not in plain
    answered = processor.prepare_row(Prompt("a red square", target="it is small"))
    assert text(answered, answered.keep) == "it is small"
    assert answered.token_ids[-1] == processor.stop_ids[0] and answered.is_target[-1] and not answered.keep[-1]
    if family in ("llama", "gemma3"):
        assert text(processor.prepare_row(Prompt(" a red square\n", system="be brief"))) == EXPECTED[family]
    attack = "".join(tokenizer.get_added_vocab()) + "\n<image><|image|>"
    attacked = processor.prepare_row(Prompt(attack, system="be brief"))
    controls = list(tokenizer.get_added_vocab().values())
    assert np.isin(attacked.token_ids, controls).sum() == np.isin(row.token_ids, controls).sum()
    assert text(attacked, attacked.keep) == attack and not attacked.is_image.any()
    with pytest.raises(ValueError, match="The prompt has 1 images, but this encoder reads text only"):
        processor.prepare_row(PICTURES[0])


@pytest.mark.parametrize(("family", "begin"), [("llama", "<|begin_of_text|>"), ("gemma3", "<bos>")])
def test_models_that_were_never_taught_turns_get_the_words_alone(folders, tmp_path, family, begin):
    for file in folders[family].iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    processor = encoders.load(tmp_path).processor
    row = processor.prepare_row(Prompt("a red square"))
    assert (
        processor.tokenizer.decode(row.token_ids) == f"{begin}a red square" and not row.keep[0] and row.keep[1:].all()
    )
    row = processor.prepare_row(Prompt("a red square", system="be brief", target="small"))
    assert processor.tokenizer.decode(row.token_ids[:-1]) == f"{begin}be brief\n\na red square\n\nsmall"
    assert processor.tokenizer.decode(row.token_ids[row.keep]) == "small"


def _write(folder, raw) -> None:
    (folder / "config.json").write_text(json.dumps(raw))


def test_clear_errors(folders, loaded, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist. A checkpoint folder needs it; got"):
        encoders.load(tmp_path)
    _write(tmp_path, {"model_type": "bert"})
    with pytest.raises(ValueError, match=f"Unsupported encoder model_type='bert'.*{', '.join(sorted(FAMILIES))}"):
        encoders.load(tmp_path)
    raw = json.loads((folders["internlm2"] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folders["internlm2"] / "model.safetensors").read_bytes())
    _write(tmp_path, raw | {"num_key_value_heads": 3})
    with pytest.raises(ValueError, match=r"shape: model.layers.0.attention.wqkv.weight -> .*the config expects"):
        encoders.load(tmp_path)
    for key, value, message in (
        ("layer_types", ["chunked_attention"], r"Unsupported layer_types \['chunked_attention'\]"),
        ("final_logit_softcapping", 30.0, r"final_logit_softcapping=30.0 is not supported, expected None"),
        ("use_bidirectional_attention", True, r"use_bidirectional_attention=True is not supported, expected False"),
        ("rope_scaling", {"rope_type": "yarn"}, r"Unsupported rotary scaling 'yarn'; supported: .*'linear', 'llama3'"),
        ("num_attention_heads", 6, r"must be a multiple of num_kv_heads, got 6 and 4"),
    ):
        _write(tmp_path, {"model_type": "gemma3_text", key: value})
        with pytest.raises(ValueError, match=message):
            encoders.load(tmp_path)
    with pytest.raises(ValueError, match="Only InternVL models can be written"):
        loaded["llama"].save(tmp_path / "copy")
    with pytest.raises(ValueError, match="has pictures, but this language model reads text only"):
        pixels = np.zeros((3, 1, 8, 8, 3), np.float32)
        loaded["llama"].layer_states(dataclasses.replace(token_batch(left=False), pixels=pixels))
    with pytest.raises(ValueError, match="Only decoders of Qwen2's and Qwen3's form can be written"):
        text_config(loaded["gemma3"].config.decoder)
    with pytest.raises(ValueError, match=r"is no InternVL model.*configuration is TextConfig"):
        EncoderTask(TrainConfig(task="encoder", init_from=str(folders["qwen2"])), make_mesh(MeshConfig()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_layers": (True,)}, "needs a flag for each of the 2 layers, got 1"),
        ({"sliding_layers": (True, False)}, "window_tokens must be positive, got 0"),
        ({"mrope_section": (1, 2)}, "three numbers that sum up to head_dim / 2 = 2"),
    ],
)
def test_decoder_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(10, 8, 2, 2, 1, 4, 8, **changes)
