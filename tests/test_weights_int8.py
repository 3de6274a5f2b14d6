"""8-bit weights of a frozen encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders_support import photo, write_reference
from flax import nnx

from unifusion_jax import Prompt, encoders
from unifusion_jax import layers as nn
from unifusion_jax.encoders.quantization import quantizer, state_errors
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh

LAYERS = (0, 1, 3, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_reference(tmp_path_factory.mktemp("int8"), "grouped")


@pytest.fixture(scope="module")
def exact(folder):
    return encoders.load(folder, dtype="float32", layers=LAYERS)


@pytest.fixture(scope="module")
def quantised(folder):
    return encoders.load(folder, dtype="float32", layers=LAYERS, quantize="int8")


@pytest.fixture(scope="module")
def batch(exact):
    prompts = [Prompt("a red square", images=[photo(0, 40, 40)]), Prompt("two green triangles, one above the other")]
    return exact.prepare(prompts, max_tiles=1)


def is_int8(leaf):
    return isinstance(leaf, nn.Int8)


def test_values_are_within_half_a_step_of_the_kernel():
    kernel = jax.random.normal(jax.random.key(0), (3, 24, 10)) * jnp.arange(10)  # channel 0 is all zero
    stored = nn.quantize_int8(kernel)
    assert stored.values.dtype == jnp.int8
    assert stored.scale.shape == (3, 1, 10)
    error = np.abs(np.asarray(stored.values * stored.scale - kernel))
    assert np.all(error <= np.asarray(stored.scale) / 2 * (1 + 1e-5))
    assert np.all(np.abs(np.asarray(stored.values)).max(axis=1)[:, 1:] == 127)
    np.testing.assert_array_equal(nn.quantize_int8(kernel[1]).values, stored.values[1])


@pytest.mark.parametrize("bias", [False, True])
def test_linear_computes_with_the_dequantised_kernel(bias):
    layer = nn.linear(24, 10, ("embed", "mlp"), bias=bias, dtype=None, rngs=nnx.Rngs(0))
    if bias:
        layer.bias[...] = jnp.arange(10.0)
    graphdef, state = nnx.split(layer)
    params = nnx.to_pure_dict(state)
    stored = nn.quantize_int8(params["kernel"])
    x = jax.random.normal(jax.random.key(1), (2, 5, 24))
    plain = nnx.merge(graphdef, params | {"kernel": stored.values * stored.scale})(x)
    ours = jax.jit(lambda params: nnx.merge(graphdef, params)(x))(params | {"kernel": stored})
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
    assert nnx.merge(graphdef, params | {"kernel": stored})(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_every_linear_map_is_stored_in_8_bits_and_nothing_else(exact, quantised):
    changed = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(quantised.params, is_leaf=is_int8)
    }
    plain = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(exact.params)}
    assert changed.keys() == plain.keys()
    for name, leaf in changed.items():
        assert is_int8(leaf) == (name.endswith("['kernel']") and "'patch'" not in name), name
        if is_int8(leaf):
            assert leaf.values.shape == plain[name].shape
        else:
            np.testing.assert_array_equal(leaf, plain[name])


def test_states_stay_close(exact, quantised, batch):
    errors = state_errors(quantised.layer_states(batch), exact.layer_states(batch), batch.mask)
    print(errors)
    assert max(errors["relative_rms"]) < 0.03
    assert min(errors["worst_cosine"]) > 0.999
    assert max(errors["relative_rms"]) > 1e-4  # it is quantised indeed


def test_state_errors_by_hand():
    reference = np.zeros((1, 2, 2, 3), np.float32)
    reference[..., 0] = 2.0
    states = reference.copy()
    states[0, 0, 1] = [0.0, 2.0, 0.0]  # a right angle, in layer 1 of token 0
    mask = np.array([[True, True]])
    errors = state_errors(states, reference, mask)
    assert errors["cosine"] == [1.0, 0.5]
    assert errors["worst_cosine"] == [1.0, 0.0]
    np.testing.assert_allclose(errors["relative_rms"], [0.0, 1.0])
    assert state_errors(states, reference, ~mask | np.array([[False, True]]))["cosine"] == [1.0, 1.0]


def test_sharded_kernels_get_the_scale_of_the_whole_channel(folder, quantised, batch):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    sharded = encoders.load(folder, dtype="float32", layers=LAYERS, quantize="int8", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, sharded.params, quantised.params)
    kernel = sharded.params["decoder"]["layers"]["blocks"]["ffn"]["gate"]["kernel"]
    assert kernel.values.addressable_shards[0].data.size == kernel.values.size // 4


def test_quantised_weights_are_not_written(quantised, tmp_path):
    with pytest.raises(ValueError, match=r"is quantised \(Int8\): .* Load the weights without quantize"):
        quantised.save(tmp_path)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"quantize='int3' is not known; expected 'none' or 'int8'"):
        quantizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "int3")
