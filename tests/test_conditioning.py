"""Every conditioning strategy: what it computes, what it refuses, and that it trains, resumes, shards and samples."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from optax.contrib import MuonDimensionNumbers
from test_dit import randomised
from test_training import assert_same, killed, logged, one_device, parsed, train
from vision_support import write_t5

from unifusion_jax import Prompt, UniFusion, encoders
from unifusion_jax.conditioning import ConditioningConfig
from unifusion_jax.dit import Condition, DiT, DiTConfig
from unifusion_jax.dit.blocks import SelfAttention
from unifusion_jax.dit.condition import BlockCondition
from unifusion_jax.dit.rope import rope_table, sequence_positions
from unifusion_jax.dit.transformer import time_embedding
from unifusion_jax.encoders.decoder import rotate, token_positions
from unifusion_jax.frozen import load_frozen
from unifusion_jax.model import ModelConfig, UniFusionModel
from unifusion_jax.parallel.attention import attention
from unifusion_jax.training.checkpoints import check_config
from unifusion_jax.training.flops import condition_flops, dit_flops, lap_flops
from unifusion_jax.training.optimizer import _muon_dimensions
from unifusion_jax.training.tasks import make_task

ONE_TASK = {
    "data__sources": ({"name": "shapes"},),
    "data__budgets": {"text_to_image": {"max_tokens": 192, "max_tiles": 0, "max_kept_tokens": 96}},
    "data__size_px": 32,
    "optimizer__warmup_steps": 0,
    "flow__condition_dropout": 0.5,
}
T5 = {
    "conditioning__strategy": "last_layer", "encoder__verifi": False, "encoder__system_prompts": "none",
    # The tiny tokenizer takes little more than a letter a token.
    "data__budgets": {"text_to_image": {"max_tokens": 224, "max_tiles": 0, "max_kept_tokens": 224}},
}  # fmt: skip
# The tiny encoder has 4 layers of width 32 with one key-value head of 16, the DiT 2 blocks of width 32 with heads of 16.
CASES = {
    "lap, refiner first": {"conditioning__refiner_position": "before_lap", "conditioning__layer_embedding": False},
    "last layer": {"conditioning__strategy": "last_layer"},
    "penultimate, no refiner": {
        "conditioning__strategy": "last_layer", "conditioning__layer": -2, "conditioning__refiner_blocks": 0,
    },
    "key-value fusion": {"conditioning__strategy": "kv_fusion", "encoder__layers": (2, 4)},
    "key-value fusion, maps": {"conditioning__strategy": "kv_fusion", "conditioning__learned_maps": True},
    "injection": {"conditioning__strategy": "hidden_state_injection", "encoder__layers": (1, 4)},
    "injection, maps": {"conditioning__strategy": "hidden_state_injection", "conditioning__learned_maps": True},
    "lap injection": {"conditioning__strategy": "lap_injection"},
    "t5": T5,
}  # fmt: skip


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("conditioning_t5"), "wide")


def config_of(name, frozen, t5, **changes):
    encoder = {"encoder__path": str(t5)} if name == "t5" else {}
    return parsed(
        frozen, **(ONE_TASK | encoder | CASES[name] | {"total_steps": 4, "checkpoint__every_steps": 2} | changes)
    )


@pytest.fixture(scope="module")
def straight(frozen, t5, tmp_path_factory):
    """Four steps of a case in one go on one device: returns the state and the workdir."""

    @functools.cache
    def run(name):
        workdir, config = tmp_path_factory.mktemp("straight"), config_of(name, frozen, t5)
        return train(config, workdir, one_device(config)), workdir

    return run


@pytest.mark.parametrize("name", CASES)
def test_trains_and_resumes_bit_for_bit(name, straight, frozen, t5, tmp_path):
    state, workdir = straight(name)
    killed(workdir, tmp_path, 2)
    config = config_of(name, frozen, t5)
    assert_same(train(config, tmp_path, one_device(config)), state)
    assert [line["step"] for line in logged(tmp_path)] == [2, 4] and logged(tmp_path) == logged(workdir)
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    # Every part learns: no parameter of the conditioner is left out of the gradient, the null token and maps included.
    still = [jax.tree_util.keystr(path) for path, leaf in moments if leaf.ndim and not np.any(np.asarray(leaf))]
    assert not still


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_compute_the_same_however_they_share_the_model(name, straight, frozen, t5, tmp_path):
    mesh = {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    train(config_of(name, frozen, t5, total_steps=2, mesh=mesh), tmp_path)
    plain, sharded = logged(straight(name)[1])[0], logged(tmp_path)[0]
    assert (plain["step"], sharded["step"]) == (2, 2)
    assert sharded["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert sharded["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_samples_with_guidance(name, frozen, t5):
    config = config_of(name, frozen, t5)
    task = make_task(config, one_device(config))
    params = task.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params)
    model = UniFusion(task.encoder, task.autoencoder, config, task.model_config, params)

    def draw(words, **options):
        prompt = Prompt(words, target=words if config.encoder.verifi else None)
        return np.asarray(model.generate([prompt], steps=2, **options)[0]).astype(int)

    red = draw("a red square", guidance=3.0)
    assert np.abs(red - draw("two green triangles", guidance=3.0)).max() > 0  # the words matter
    assert np.abs(red - draw("a red square", guidance=1.0)).max() > 0  # and so does what stands in for no words


# What is exported


def text_batch(encoder):
    ids = np.random.default_rng(0).integers(0, 400, (2, 7))
    return encoders.EncoderBatch.from_tokens(ids, np.arange(7) < np.array([[7], [5]]))


def test_exported_keys_and_values_are_those_of_the_block(frozen):
    encoder = encoders.load(frozen / "encoder", layers=(2, 4), form="key_values", dtype="float32")
    batch = text_batch(encoder)
    exported = encoder.export(batch)
    assert exported.states.shape == (2, 7, 2, 32) and encoder.exported_size == 32
    decoder = encoder.module(encoder.params).decoder
    before, after = jnp.moveaxis(encoder.layer_states(batch, layers=(3, 4)), 2, 0)
    # Block 4 with the exported keys, rotated here, must lead from layer 3 to layer 4.
    graphdef, params = nnx.split(decoder.layers.blocks)
    block = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[3], params))
    rope, _ = decoder._ropes(token_positions(jnp.asarray(batch.mask)))
    query = rotate(block.attention.q(block.attention_norm(before)).reshape(2, 7, 2, 16), rope)
    key, value = jnp.split(exported.states[:, :, 1], 2, axis=-1)
    key, value = rotate(key.reshape(2, 7, 1, 16), rope), value.reshape(2, 7, 1, 16)
    mixed = attention(query, key, value, causal=True, kv_mask=jnp.asarray(batch.mask))
    x = before + block.attention.o(mixed.reshape(2, 7, 32))
    x = x + block.ffn(block.ffn_norm(x))
    ours, theirs = np.asarray(x)[batch.mask], np.asarray(after)[batch.mask]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_last_layer_comes_after_the_final_norm(frozen):
    encoder = encoders.load(frozen / "encoder", layers=(4,), form="final_norm", dtype="float32")
    batch = text_batch(encoder)
    raw = np.asarray(encoder.layer_states(batch))[:, :, 0]
    scale = np.asarray(encoder.params["decoder"]["norm"]["scale"])
    expected = raw / np.sqrt(np.mean(raw**2, axis=-1, keepdims=True) + 1e-6) * scale
    exported = encoder.export(batch)
    np.testing.assert_allclose(exported.states[:, :, 0], np.where(batch.mask[..., None], expected, 0), atol=1e-5)


def test_rewriting_exports_the_same_form(frozen):
    options = {"max_new_tokens": 4}
    plain = encoders.load(frozen / "encoder", layers=(0, 2), dtype="float32")
    keys = encoders.load(frozen / "encoder", layers=(1, 3), form="key_values", dtype="float32")
    states, made = (encoder.rewrite([Prompt("a red circle")], **options) for encoder in (plain, keys))
    assert states.token_ids == made.token_ids
    expected = plain.module(plain.params).key_values(jnp.asarray(states.states.states), (1, 3))
    expected = jnp.where(states.states.mask[..., None, None], expected, 0)
    np.testing.assert_allclose(made.states.states, expected, atol=1e-5)


def test_layer_zero_has_no_keys(frozen):
    with pytest.raises(ValueError, match="Layer 0, the embeddings, has no keys"):
        encoders.load(frozen / "encoder", layers=(0, 1), form="key_values", dtype="float32")


# What the DiT makes of a condition

ONE_BLOCK = DiTConfig(latent_channels=4, num_layers=1, hidden_size=32, num_heads=2, ffn_size=48, time_features=16)


def inputs():
    latents, tokens = (
        jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((0, (2, 2, 2, 4)), (1, (2, 3, 32)))
    )
    return latents, jnp.array([0.3, 0.8]), tokens, jnp.array([[True] * 3, [True, True, False]])


def velocity_of(dit):
    """The DiT compiled: one operation at a time takes minutes."""
    graphdef, params = nnx.split(dit, nnx.Param)
    latents, t, _, _ = inputs()
    run = jax.jit(lambda params, condition: nnx.merge(graphdef, params)(latents, t, condition))
    return lambda condition: np.asarray(run(params, condition))


def test_fused_keys_are_attended_to_like_tokens_of_the_sequence():
    dit = randomised(DiT(ONE_BLOCK, rngs=nnx.Rngs(0)))
    _, t, tokens, mask = inputs()
    graphdef, params = nnx.split(dit, nnx.Param)

    @jax.jit
    def keys_and_values(params):
        """What the block makes of the condition tokens, as its attention is about to use it."""
        model, seen = nnx.merge(graphdef, params), {}
        project = SelfAttention.project

        def spy(self, x, rope):
            seen["all"] = project(self, x, rope)
            return seen["all"]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SelfAttention, "project", spy)
            stacked, blocks = nnx.split(model.blocks.blocks)
            block = nnx.merge(stacked, jax.tree.map(lambda leaf: leaf[0], blocks))
            time = model.time_in(time_embedding(t, ONE_BLOCK.time_features))
            time = jax.nn.silu(model.time_hidden(jax.nn.silu(time)))
            shared = model.time_modulation(time).reshape(2, 6, -1)
            rope = rope_table(sequence_positions(3), ONE_BLOCK.rope)
            block(tokens, mask, rope, shared, BlockCondition())
        return seen["all"][1:]

    key, value = keys_and_values(params)
    run = velocity_of(dit)
    as_tokens, empty = run(Condition(tokens, mask)), run(Condition(tokens[:, :0], mask[:, :0]))
    # In a one-block DiT, latents see of the condition its keys and values alone.
    none = Condition(tokens[:, :0], mask[:, :0], key=key[:, None], value=value[:, None], kv_mask=mask)
    np.testing.assert_allclose(run(none), as_tokens, atol=1e-5)
    np.testing.assert_allclose(run(dataclasses.replace(none, kv_mask=jnp.zeros_like(mask))), empty, atol=1e-5)
    assert np.abs(as_tokens - empty).max() > 1e-3


def test_additions_reach_the_block_they_are_for_and_no_masked_token():
    run = velocity_of(randomised(DiT(dataclasses.replace(ONE_BLOCK, num_layers=2), rngs=nnx.Rngs(0))))
    _, _, tokens, mask = inputs()
    extra = jax.random.normal(jax.random.key(5), tokens.shape)
    none = jnp.zeros((2, 2, 3, 32))
    plain = run(Condition(tokens, mask))
    np.testing.assert_allclose(run(Condition(tokens, mask, added=none)), plain, atol=1e-6)
    first = run(Condition(tokens, mask, added=none.at[:, 0].set(extra)))
    np.testing.assert_allclose(first, run(Condition(tokens + extra, mask)), atol=1e-5)
    second = run(Condition(tokens, mask, added=none.at[:, 1].set(extra)))
    assert np.abs(second - plain).max() > 1e-3 and np.abs(second - first).max() > 1e-3
    masked = run(Condition(tokens, mask, added=none.at[1, 1, 2].set(9.0)))
    np.testing.assert_allclose(masked, plain, atol=1e-6)


def model_of(strategy, num_layers, size, *, kv_heads=0, blocks=2, **conditioning):
    dit = dataclasses.replace(ONE_BLOCK, num_layers=blocks)
    settings = ConditioningConfig(strategy=strategy, lap_heads=2, refiner_heads=2, **conditioning)
    return ModelConfig(num_layers, size, settings, dit, kv_heads)


@pytest.mark.parametrize(
    "config",
    [
        model_of("last_layer", 1, 24),
        model_of("hidden_state_injection", 2, 24, learned_maps=True),
        model_of("lap_injection", 3, 24),
        model_of("kv_fusion", 2, 64, kv_heads=1, learned_maps=True),
        model_of("kv_fusion", 2, 32, kv_heads=1),
    ],
    ids=lambda config: f"{config.conditioning.strategy}-{config.encoder_size}",
)
def test_a_dropped_row_is_the_null_condition_and_the_others_are_not(config):
    model = randomised(UniFusionModel(config, rngs=nnx.Rngs(0)))
    states = jax.random.normal(jax.random.key(0), (3, 4, config.num_layers, config.encoder_size))
    mask = jnp.array([[True] * 4, [True] * 4, [False] * 4])
    graphdef, params = nnx.split(model, nnx.Param)
    latents, t = jnp.ones((3, 2, 2, 4)), jnp.full((3,), 0.5)

    @jax.jit
    def velocities(params, states):
        model = nnx.merge(graphdef, params)
        told = model.condition(states, mask, drop=jnp.array([False, True, False]))
        return model.velocity(latents, t, told), model.velocity(latents, t, model.null_condition(told))

    velocity, null = (np.asarray(part) for part in velocities(params, states))
    changed = np.asarray(velocities(params, states + 1.0)[0])
    np.testing.assert_allclose(velocity[1:], null[1:], atol=1e-5)
    np.testing.assert_array_equal(velocity[1:], changed[1:])
    assert np.abs(velocity[0] - null[0]).max() > 1e-3 and np.abs(velocity[0] - changed[0]).max() > 1e-3


def test_fused_keys_stand_where_condition_tokens_do():
    model = UniFusionModel(model_of("kv_fusion", 2, 32, kv_heads=1), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    states = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 1, 2, 32)), (1, 4, 2, 32))
    make = jax.jit(lambda params: nnx.merge(graphdef, params).conditioner(states, jnp.ones((1, 4), bool)).key)
    key = np.asarray(make(params))
    assert key.shape == (1, 2, 4, 2, 16)
    np.testing.assert_array_equal(key[..., 0, :], key[..., 1, :])  # one key-value head serves both heads
    cos, sin = rope_table(sequence_positions(4), model.config.dit.rope)
    first, second = np.split(key[0, 0, :, 0], 2, axis=-1)
    back = np.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
    np.testing.assert_allclose(back, np.broadcast_to(back[:1], back.shape), atol=1e-5)


def test_parameters_of_lap_keep_their_names_and_shapes():
    model = nnx.eval_shape(lambda: UniFusionModel(model_of("lap", 3, 16), rngs=nnx.Rngs(0)))
    shapes = {
        ".".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    of_block = {
        "attention.key.kernel": (2, 16, 16), "attention.key_norm.scale": (2, 8), "attention.out.kernel": (2, 16, 16),
        "attention.query.kernel": (2, 16, 16), "attention.query_norm.scale": (2, 8),
        "attention.value.kernel": (2, 16, 16), "attention_norm.scale": (2, 16), "ffn.down.kernel": (2, 32, 16),
        "ffn.gate.kernel": (2, 16, 32), "ffn.up.kernel": (2, 16, 32), "ffn_norm.scale": (2, 16),
    }  # fmt: skip
    expected = {f"conditioner.lap.blocks.blocks.{name}": shape for name, shape in of_block.items()} | {
        "conditioner.lap.layer_embedding": (3, 16),
        "conditioner.lap.norm.scale": (16,),
        "conditioner.lap.pool.bias": (1,),
        "conditioner.lap.pool.kernel": (3, 1),
        "conditioner.project.bias": (32,),
        "conditioner.project.kernel": (16, 32),
        "null_token": (32,),
    }
    found = {name: shape for name, shape in shapes.items() if not name.startswith(("dit.", "conditioner.refiner."))}
    assert found == expected
    assert shapes["conditioner.refiner.blocks.blocks.ffn.gate.kernel"] == (2, 32, 64)


# Which layers

LAYER_CASES = [
    ({"strategy": "lap"}, (), (1, 4, 7, 10), "states"),
    ({"strategy": "lap", "layer_start": 0, "layer_stride": 5}, (), (0, 5, 10), "states"),
    ({"strategy": "lap_injection"}, (3, 9), (3, 9), "states"),
    ({"strategy": "last_layer"}, (), (10,), "final_norm"),
    ({"strategy": "last_layer", "layer": 10}, (10,), (10,), "final_norm"),
    ({"strategy": "last_layer", "layer": -2}, (), (9,), "states"),
    ({"strategy": "last_layer", "layer": 3}, (), (3,), "states"),
    ({"strategy": "kv_fusion"}, (1, 3, 5, 10), (1, 3, 5, 10), "key_values"),
    ({"strategy": "kv_fusion", "learned_maps": True}, (), (1, 4, 7, 10), "key_values"),
    ({"strategy": "hidden_state_injection", "learned_maps": True}, (), (1, 4, 7, 10), "states"),
]


@pytest.mark.parametrize(("settings", "listed", "layers", "form"), LAYER_CASES)
def test_layers_of_a_strategy(settings, listed, layers, form):
    selection = ConditioningConfig(**settings).select(listed, 10, 4)
    assert (selection.layers, selection.form) == (layers, form)


@pytest.mark.parametrize(
    ("settings", "listed", "message"),
    [
        ({"strategy": "last_layer", "layer": 11}, (), r"layer=11 is not a layer of the encoder, which has 10"),
        ({"strategy": "last_layer", "layer": -12}, (), r"or -1 .. -11 counted"),
        ({"strategy": "last_layer"}, (1, 4), r"takes layer 10 .* lists \(1, 4\). Leave encoder.layers empty"),
        (
            {"strategy": "kv_fusion"},
            (),
            r"dit.num_layers is 4, the encoder has 10. What would fit: dit.num_layers=10, or",
        ),
        ({"strategy": "kv_fusion"}, (0, 1, 2, 3), r"an encoder layer from 1 on"),
        (
            {"strategy": "hidden_state_injection"},
            (1, 2),
            r"lists 2. What would fit: dit.num_layers=2, or encoder.layers",
        ),
        ({"strategy": "lap", "layer_start": 11}, (), r"layer_start=11 is beyond the encoder's 10 layers"),
        ({"strategy": "lap"}, (1, 12), r"within 0 .. 10, the encoder's last, got \[12\]"),
    ],
)
def test_layers_that_the_encoder_has_not(settings, listed, message):
    with pytest.raises(ValueError, match=message):
        ConditioningConfig(**settings).select(listed, 10, 4)


def test_an_encoder_with_too_few_layers_is_told_what_would_fit():
    with pytest.raises(
        ValueError, match=r"the encoder has 24. What would fit: dit.num_layers=24, or an encoder of at least 32"
    ):
        ConditioningConfig(strategy="kv_fusion", learned_maps=True).select((), 24, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conditioning__lap_heads": 3},
            r"lap_heads=3 does not divide the encoder's width, 32. What would fit: \[1, 2, 4, 8\]",
        ),
        (
            {"conditioning__refiner_heads": 4},
            r"refiner_heads=4 .* dit.hidden_size, 32 into even parts .* What would fit: \[1, 2\]",
        ),
        (
            {"conditioning__strategy": "hidden_state_injection", "encoder__layers": (1, 4), "dit__hidden_size": 64},
            r"the encoder's width is 32, dit.hidden_size is 64. What would fit: dit.hidden_size=32",
        ),
        (
            {"conditioning__strategy": "kv_fusion", "encoder__layers": (1, 4), "dit__num_heads": 1},
            r"a head of the encoder has 16 channels, one of the DiT 32; what would fit: dit.num_heads=2",
        ),
        ({"conditioning__strategy": "kv_fusion"}, r"dit.num_layers is 2, the encoder has 4"),
        ({"dit__latent_channels": 4}, r"latent channels .* is 16, the model takes 4"),
    ],
)
def test_shapes_that_do_not_fit_are_told_before_weights_are_read(frozen, tmp_path, changes, message):
    for name in ("encoder", "autoencoder"):  # folders without weights
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((frozen / name / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        load_frozen(parsed(tmp_path, **changes))


def test_t5_without_verifi_and_system_turn_alone(frozen, t5):
    for changes, message in (
        ({"encoder__verifi": True}, "set encoder.verifi=False"),
        ({"encoder__system_prompts": "full"}, "has no system turn, but encoder.system_prompts='full': set 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_frozen(config_of("t5", frozen, t5, **changes))


def test_flops_of_the_strategies():
    tokens, refiner = 3, 2 * (2 * 3 * (4 * 32 * 32 + 3 * 32 * 64) + 4 * 3 * 3 * 32)
    project = 2 * 3 * 24 * 32
    assert condition_flops(model_of("last_layer", 1, 24), tokens) == project + refiner
    injection = model_of("hidden_state_injection", 2, 24, learned_maps=True, refiner_blocks=0)
    assert condition_flops(injection, tokens) == 2 * project
    one = condition_flops(model_of("lap", 3, 24, refiner_blocks=0), tokens)
    assert one == lap_flops(model_of("lap", 3, 24).conditioning.lap(3, 24), tokens) + project
    assert condition_flops(model_of("lap_injection", 3, 24, blocks=5, refiner_blocks=0), tokens) == 5 * one
    fusion = model_of("kv_fusion", 2, 32, kv_heads=1)
    assert condition_flops(fusion, tokens) == 0
    # Fused keys are attended to by the 4 latent tokens, and are no tokens that pass through the blocks.
    tokens_less = 2 * (2 * 3 * (4 * 32 * 32 + 3 * 32 * 48) + 4 * 3 * (3 + 4) * 32)
    assert dit_flops(model_of("last_layer", 1, 24), 3, 4) - dit_flops(fusion, 3, 4) == tokens_less


def test_muon_finds_the_matrices_in_stacks_of_stacks():
    model = nnx.eval_shape(lambda: UniFusionModel(model_of("lap_injection", 3, 24, blocks=5), rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    laps = _muon_dimensions(params)["conditioner"]["laps"]["blocks"]
    gate = params["conditioner"]["laps"]["blocks"]["lap"]["blocks"]["blocks"]["ffn"]["gate"]["kernel"]
    assert gate.shape == (5, 2, 24, 48)
    assert laps["lap"]["blocks"]["blocks"]["ffn"]["gate"]["kernel"] == MuonDimensionNumbers((2,), 3)
    assert laps["lap"]["pool"]["kernel"] == MuonDimensionNumbers((1,), 2)


def test_key_value_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"has 3 key-value heads, dit.num_heads is 2; what would fit: a multiple of 3"):
        model_of("kv_fusion", 2, 2 * 3 * 16, kv_heads=3)


def test_a_run_recorded_before_a_key_existed_goes_on(frozen, tmp_path):
    config = parsed(frozen)
    recorded = traverse_util.flatten_dict(dataclasses.asdict(config), sep="/")
    older = {name: value for name, value in recorded.items() if name not in ("encoder/verifi", "conditioning/layer")}
    (tmp_path / "config.json").write_text(json.dumps(traverse_util.unflatten_dict(older, sep="/")))
    check_config(tmp_path, json.dumps(dataclasses.asdict(config)))
    changed = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, verifi=False))
    with pytest.raises(ValueError, match=r"encoder.verifi: True -> False"):
        check_config(tmp_path, json.dumps(dataclasses.asdict(changed)))
