import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu.parameter_overview import count_parameters
from flax import nnx

from unifusion_jax.conditioning import LAP, ConditioningConfig, LAPConditioner, LAPConfig, Refiner, RefinerConfig
from unifusion_jax.dit import Condition, DiT, DiTConfig
from unifusion_jax.dit.rope import RopeConfig, apply_rope, joint_positions, rope_table
from unifusion_jax.dit.transformer import patchify, unpatchify
from unifusion_jax.model import ModelConfig, UniFusionModel
from unifusion_jax.parallel import attention as attention_module
from unifusion_jax.parallel.attention import few_token_attention
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh
from unifusion_jax.parallel.sharding import param_shardings
from unifusion_jax.parallel.target import compiling_for

TINY = DiTConfig(latent_channels=4, num_layers=2, hidden_size=32, num_heads=2, ffn_size=48, time_features=16)
MODEL = ModelConfig(3, 16, ConditioningConfig(lap_heads=2, refiner_heads=2), TINY)


def randomised(module: nnx.Module, seed: int = 7) -> nnx.Module:
    """Zero-initialised gates make every input look alike; tests need weights that do something."""
    graphdef, params = nnx.split(module, nnx.Param)
    leaves, treedef = jax.tree.flatten(nnx.to_pure_dict(params))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, noisy))


@pytest.mark.parametrize(("config", "expected"), [(DiTConfig.dit_5b(), 5e9), (DiTConfig.dit_8b(), 8e9)])
def test_named_sizes_have_their_parameter_count(config, expected):
    module = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    count = count_parameters(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    assert abs(count / expected - 1) < 0.03, f"{count:,}"


def test_final_model_builds_and_shards_with_another_config_only():
    module = nnx.eval_shape(lambda: UniFusionModel(ModelConfig.final_8b(), rngs=nnx.Rngs(0)))
    shardings = param_shardings(module, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    spec = shardings["dit"]["blocks"]["blocks"]["block"]["ffn"]["gate"]["kernel"].spec
    assert spec == jax.sharding.PartitionSpec(None, ("fsdp",), ("tensor",))


def test_parameters_carry_axes_everywhere():
    module = nnx.eval_shape(lambda: UniFusionModel(MODEL, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        assert "axes" in variable.get_metadata(), path


def test_patchify_round_trip_and_order():
    latents = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    tokens = patchify(latents, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[0, 1, :3], latents[0, 0, 2])
    np.testing.assert_array_equal(unpatchify(tokens, 2, 2, 3), latents)
    with pytest.raises(ValueError, match="4x5 cells are not divisible into 2x2"):
        patchify(latents[:, :, :5], 2)


def test_dit_starts_at_zero_velocity_and_uses_condition_and_time_once_trained():
    x, condition = jnp.ones((2, 4, 4, 4)), jnp.ones((2, 5, 32))
    mask, t = jnp.ones((2, 5), bool), jnp.array([0.2, 0.9])
    fresh = DiT(TINY, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(fresh(x, t, Condition(condition, mask)), 0)
    model = randomised(fresh)
    base = model(x, t, Condition(condition, mask))
    assert not np.allclose(base, model(x, t, Condition(2 * condition + jnp.arange(32), mask)))
    assert not np.allclose(base, model(x, t + 0.1, Condition(condition, mask)))
    assert base.dtype == jnp.float32


def test_masked_condition_tokens_do_not_matter():
    model = randomised(DiT(TINY, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    condition = jax.random.normal(jax.random.key(1), (1, 5, 32))
    mask = jnp.array([[True, True, True, False, False]])
    t = jnp.array([0.5])
    short = model(x, t, Condition(condition[:, :3], mask[:, :3]))
    np.testing.assert_allclose(model(x, t, Condition(condition, mask)), short, atol=1e-5)


def test_rope_is_relative_and_tells_axes_apart():
    config = RopeConfig.for_head_dim(32)
    assert sum(config.dims) == 32
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 32))

    def score(a, b):
        rotated = [apply_rope(x, rope_table(jnp.array([p]), config)) for x, p in ((q, a), (k, b))]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score((1, 2, 3), (0, 1, 5)) == pytest.approx(score((4, 6, 3), (3, 5, 5)), abs=1e-4)
    assert score((0, 1, 0), (0, 0, 0)) != pytest.approx(score((0, 0, 1), (0, 0, 0)), abs=1e-3)


def test_joint_positions_keep_condition_and_picture_apart():
    positions = np.asarray(joint_positions(2, 2, 2))
    np.testing.assert_array_equal(positions, [[1, 0, 0], [2, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])


def test_lap_pools_each_token_alone():
    lap = randomised(LAP(LAPConfig(4, 16, 2, 32), rngs=nnx.Rngs(0)))
    states = jax.random.normal(jax.random.key(0), (2, 5, 4, 16))
    pooled = lap(states)
    assert pooled.shape == (2, 5, 16)
    changed = lap(states.at[0, 2].add(1.0))
    differs = np.any(np.abs(np.asarray(changed - pooled)) > 1e-6, axis=-1)
    np.testing.assert_array_equal(np.argwhere(differs), [[0, 2]])


def test_lap_pools_the_same_in_chunks():
    remat = functools.partial(jax.checkpoint, prevent_cse=False)
    whole = randomised(LAP(LAPConfig(4, 16, 2, 32), rngs=nnx.Rngs(0)))
    chunked = nnx.merge(nnx.graphdef(LAP(LAPConfig(4, 16, 2, 32, chunk_tokens=2), rngs=nnx.Rngs(0))), nnx.state(whole))
    states = jax.random.normal(jax.random.key(0), (2, 5, 4, 16))  # two chunks and one token

    @nnx.jit
    def both(lap):
        return nnx.value_and_grad(lambda lap: jnp.sum(jnp.sin(lap(states, remat=remat))))(lap), lap(states)

    for ours, expected in zip(*(jax.tree.leaves(both(lap)) for lap in (chunked, whole)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_lap_starts_as_the_mean_over_layers_and_ignores_their_scale():
    lap = LAP(LAPConfig(4, 16, 2, 32), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(lap.pool.kernel[...], 0.25)
    states = jax.random.normal(jax.random.key(0), (1, 3, 4, 16))
    np.testing.assert_allclose(lap(states), lap(states * jnp.array([1.0, 10.0, 100.0, 0.5])[:, None]), atol=1e-4)


def test_lap_refuses_another_encoder():
    lap = LAP(LAPConfig(4, 16, 2, 32), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="built for 4 layers of width 16, got 3 of 16"):
        lap(jnp.zeros((1, 2, 3, 16)))


def test_refiner_looks_both_ways_and_not_at_padding():
    refiner = randomised(Refiner(RefinerConfig(32, 2, 48), rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 4, 32))
    mask = jnp.array([[True, True, True, False]])
    base = refiner(x, mask)
    assert not np.allclose(refiner(x.at[0, 2].add(1.0), mask)[0, 0], base[0, 0])
    np.testing.assert_allclose(refiner(x.at[0, 3].add(1.0), mask)[0, :3], base[0, :3], atol=1e-6)


@pytest.mark.parametrize("position", ["after_lap", "before_lap"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_conditioner_variants(position, blocks):
    config = ConditioningConfig(lap_heads=2, refiner_heads=2, refiner_blocks=blocks, refiner_position=position)
    dit = DiTConfig(4, 2, 64, 2, 48)
    conditioner = LAPConditioner(config, num_layers=3, encoder_size=32, dit=dit, rngs=nnx.Rngs(0))
    out = conditioner(jnp.ones((2, 5, 3, 32)), jnp.ones((2, 5), bool))
    assert out.tokens.shape == (2, 5, 64) and out.added is None and out.key is None


def test_dropped_and_empty_rows_become_the_null_token():
    model = UniFusionModel(MODEL, rngs=nnx.Rngs(0))
    states = jax.random.normal(jax.random.key(0), (3, 4, 3, 16))
    mask = jnp.array([[True] * 4, [True] * 4, [False] * 4])
    told = model.condition(states, mask, drop=jnp.array([False, True, False]))
    null = model.null_condition(told)
    np.testing.assert_array_equal(told.mask, [[True] * 4, *[[True, False, False, False]] * 2])
    for row in (1, 2):
        np.testing.assert_array_equal(told.tokens[row], null.tokens[row])
    assert not np.allclose(told.tokens[0], null.tokens[0])


def test_before_and_after_jit_and_remat_agree():
    model = randomised(UniFusionModel(MODEL, rngs=nnx.Rngs(0)))
    states, mask = jax.random.normal(jax.random.key(0), (2, 4, 3, 16)), jnp.ones((2, 4), bool)
    plain = model.condition(states, mask).tokens
    again = jax.jit(lambda s: model.condition(s, mask, remat=jax.checkpoint).tokens)(states)
    np.testing.assert_allclose(plain, again, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiTConfig(4, 2, 33, 2, 48), "hidden_size 33 is not a multiple of dit.num_heads 2"),
        (lambda: DiTConfig(4, 2, 16, 2, 48), "even and at least 16 .* got 8"),
        (lambda: DiTConfig(4, 0, 32, 2, 48), "dit.num_layers must be positive, got 0"),
        (lambda: LAPConfig(4, 15, 2, 32), "15 is not a multiple of num_heads 2"),
        (lambda: ConditioningConfig(strategy="lapp"), "got 'lapp'. Did you mean 'lap'"),
        (lambda: ConditioningConfig(refiner_position="middle"), "'after_lap' or 'before_lap', got 'middle'"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("layers", [1, 4, 10])
def test_attention_over_few_tokens_equals_the_general_one(layers):
    parts = [jax.random.normal(jax.random.key(seed), (6, layers, 3, 8)) for seed in range(3)]

    def both_ways(function):
        loss = jax.value_and_grad(lambda *parts: jnp.sum(jnp.sin(function(*parts))), argnums=(0, 1, 2))
        return jax.jit(loss)(*parts)

    few, general = both_ways(few_token_attention), both_ways(jax.nn.dot_product_attention)
    np.testing.assert_allclose(few[0], general[0], rtol=1e-5)
    for ours, theirs in zip(few[1], general[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_lap_is_the_same_by_either_attention(monkeypatch):
    lap = randomised(LAP(LAPConfig(4, 16, 2, 32), rngs=nnx.Rngs(0)))
    states = jax.random.normal(jax.random.key(0), (2, 5, 4, 16))
    with compiling_for(few_tokens=4):
        fast = lap(states)
    calls = []
    monkeypatch.setattr(attention_module, "few_token_attention", lambda query, *_, **options: calls.append(1) or query)
    np.testing.assert_allclose(lap(states), fast, atol=1e-5)
    assert not calls  # on CPU it takes matrix products
    with compiling_for(few_tokens=4):
        attention_module.attention(*[jnp.ones((1, 4, 1, 2))] * 3)
    assert len(calls) == 1  # what LAP calls does take the other way


def test_lap_is_the_same_by_the_kernel_of_its_rows():
    lap = randomised(LAP(LAPConfig(4, 256, 2, 32), rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(lap)
    states = jax.random.normal(jax.random.key(0), (2, 5, 4, 256))

    def both_ways():
        return jax.jit(jax.value_and_grad(lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(states)))))(params)

    general = both_ways()
    with compiling_for(kernel="splash", few_tokens=4):
        fast = both_ways()
    for ours, theirs in zip(jax.tree.leaves(fast), jax.tree.leaves(general), strict=True):
        # sums of 40 sines, some near 0; float32 rounding of the two other ways differs by as much
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, float(jnp.abs(theirs).max())))
