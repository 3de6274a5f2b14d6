import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unifusion_jax.autoencoders import AutoencoderKL, AutoencoderKLConfig
from unifusion_jax.encoders import InternVLConfig
from unifusion_jax.encoders.decoder import DecoderConfig
from unifusion_jax.encoders.qwen_vl import QwenVisionConfig, QwenVLConfig
from unifusion_jax.encoders.t5 import T5Config
from unifusion_jax.layers import RMSNorm, ShapesOnly, Stack, SwiGLU, linear
from unifusion_jax.parallel.attention import attention
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh
from unifusion_jax.parallel.sharding import global_batch, param_axes, param_shardings, spec_of


class Tower(nnx.Module):
    def __init__(self, depth: int, rngs: nnx.Rngs):
        self.stack = Stack(lambda rngs: SwiGLU(16, 32, rngs=rngs), depth, rngs=rngs)

    def __call__(self, x, **options):
        return self.stack.scan(lambda block, x, _: (x + block(x), jnp.max(x)), x, **options)


def test_stack_equals_a_python_loop_over_its_blocks():
    tower = Tower(3, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 16))
    graphdef, params = nnx.split(tower.stack.blocks)
    expected = x
    for layer in range(3):
        expected = expected + nnx.merge(graphdef, jax.tree.map(lambda leaf, i=layer: leaf[i], params))(expected)
    np.testing.assert_allclose(tower(x)[0], expected, rtol=1e-5)


def test_stack_blocks_start_different():
    kernel = Tower(3, nnx.Rngs(0)).stack.blocks.gate.kernel[...]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)])
@pytest.mark.parametrize("remat", [False, True])
def test_a_linear_maps_gradient_is_that_of_a_plain_product(shape, remat):
    layer = linear(6, 4, ("embed", "mlp"), bias=True, rngs=nnx.Rngs(0))
    x, target = jax.random.normal(jax.random.key(1), shape), jax.random.normal(jax.random.key(2), (*shape[:-1], 4))
    kernel, bias = layer.kernel[...], layer.bias[...]

    def ours(kernel, x):
        module = nnx.clone(layer)
        module.kernel[...] = kernel
        return jnp.sum(jnp.square(module(x) - target))

    def plain(kernel, x):
        return jnp.sum(jnp.square(x @ kernel + bias - target))

    found = jax.grad(jax.checkpoint(ours) if remat else ours, argnums=(0, 1))(kernel, x)
    for a, b in zip(found, jax.grad(plain, argnums=(0, 1))(kernel, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_linear_map_in_bfloat16_keeps_its_types():
    layer = linear(6, 4, ("embed", "mlp"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 6), jnp.bfloat16)
    graphdef, params = nnx.split(layer)
    value, gradient = jax.value_and_grad(lambda p: nnx.merge(graphdef, p)(x).astype(jnp.float32).sum())(params)
    assert nnx.merge(graphdef, params)(x).dtype == jnp.bfloat16
    assert gradient.kernel[...].dtype == jnp.float32  # of the float32 master weights
    np.testing.assert_allclose(gradient.kernel[...], 2.0)
    assert np.isfinite(value)


def test_stack_can_stop_early_and_collects_outputs():
    tower = Tower(4, nnx.Rngs(0))
    x = jnp.ones((2, 16))
    short, outputs = tower(x, length=2)
    assert outputs.shape == (2,)
    assert not np.allclose(short, tower(x)[0])


def test_stack_remat_changes_nothing():
    tower = Tower(3, nnx.Rngs(0))
    graphdef, params = nnx.split(tower)

    def loss(params, remat):
        return jnp.sum(nnx.merge(graphdef, params)(jnp.ones((2, 16)), remat=remat)[0] ** 2)

    plain, again = (jax.grad(loss)(params, remat) for remat in (None, jax.checkpoint))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain, again)


def test_compile_size_does_not_grow_with_depth():
    def lines(depth):
        tower = Tower(depth, nnx.Rngs(0))
        return jax.jit(lambda x: tower(x)[0]).lower(jnp.ones((2, 16))).as_text().count("dot_general")

    assert lines(2) == lines(12)


def test_stacked_parameters_name_their_layer_axis():
    assert param_axes(Tower(3, nnx.Rngs(0)))["stack.blocks.gate.kernel"] == ("layers", "embed", "mlp")


def test_every_axis_name_has_the_rank_of_its_parameter_and_shards_on_8_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = param_shardings(nnx.eval_shape(lambda: Tower(3, nnx.Rngs(0))), mesh)
    kernel = jax.device_put(jnp.zeros((3, 16, 32)), shardings["stack"]["blocks"]["gate"]["kernel"])
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 8, 16)


@pytest.mark.parametrize(
    "build",
    [
        InternVLConfig.demo(400).build,
        QwenVLConfig(QwenVisionConfig(num_layers=2, full_layers=(1,)), DecoderConfig(50, 16, 3, 2, 1, 8, 24)).build,
        T5Config(50, 16, 2, 2, 8, 24).build,
        functools.partial(AutoencoderKL, AutoencoderKLConfig.demo()),
    ],
    ids=["internvl", "qwen_vl", "t5", "autoencoder_kl"],
)
def test_a_network_traced_for_its_shapes_alone_is_the_random_one_without_values(build):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    other, shapes = nnx.split(nnx.eval_shape(lambda: build(rngs=ShapesOnly())))
    assert graphdef == other  # metadata such as the names of axes included
    assert jax.tree.leaves(params) == jax.tree.leaves(shapes) != []


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((3, 4), ("embed",), "name every dimension"),
        ((4, 4), ("embed", "embed"), "both map to mesh axis 'fsdp'"),
        ((6, 5), (None, "mlp"), r"layer.kernel with shape \(6, 5\): axis 'mlp' of size 5 is not divisible by 2"),
        ((4,), ("emebd",), "unknown logical axis 'emebd'"),
    ],
)
def test_sharding_mistakes_are_named(shape, axes, message):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with pytest.raises(ValueError, match=message):
        spec_of("layer.kernel", shape, axes, mesh)


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(fsdp=16)])
def test_mesh_that_does_not_fit_the_devices_is_refused(config):
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(config)


def test_mesh_with_two_free_axes_is_refused():
    with pytest.raises(ValueError, match="at most one of them -1"):
        MeshConfig(data=-1, fsdp=-1)


def test_global_batch_is_spread_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    batch = global_batch({"x": np.arange(32).reshape(16, 2)}, mesh)
    assert batch["x"].sharding.shard_shape((16, 2)) == (2, 2)
    np.testing.assert_array_equal(batch["x"], np.arange(32).reshape(16, 2))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_matches_its_formula(offset):
    norm = RMSNorm(8, offset=offset)
    norm.scale[...] = jnp.arange(8.0)
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (np.arange(8) + offset)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def reference_attention(q, k, v, visible):
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("bsae,bkae->bask", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bask,bkae->bsae", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_matches_a_plain_reference(heads, causal):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, heads[0], 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 7, heads[1], 8)).astype(np.float32)
    kv_mask = np.array([[1] * 7, [1] * 4 + [0] * 3], bool)
    visible = np.broadcast_to(kv_mask[:, None, None, :], (2, 1, 5, 7))
    if causal:
        visible = visible & (np.arange(7) <= np.arange(5)[:, None] + 2)
    got = attention(*map(jnp.asarray, (q, k, v)), causal=causal, kv_mask=jnp.asarray(kv_mask), query_offset=2)
    np.testing.assert_allclose(got, reference_attention(q, k, v, visible), rtol=1e-4, atol=1e-5)


def test_attention_refuses_heads_that_do_not_group():
    x = jnp.zeros((1, 2, 3, 4))
    with pytest.raises(ValueError, match="multiple of key-value heads, got 3 and 2"):
        attention(x, x[:, :, :2], x[:, :, :2])
