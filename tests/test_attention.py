"""Every attention kernel against a plain reference; the TPU kernel runs interpreted."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifusion_jax.parallel import attention as attention_module
from unifusion_jax.parallel import row_attention, splash
from unifusion_jax.parallel.attention import attention, flash_attention
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh
from unifusion_jax.parallel.target import FEW_TOKENS, Target, compiling_for, current

TOKENS = 200
MASKS = {
    "none": {},
    "padding": {"kv_mask": "right"},
    "causal, padding on the left": {"causal": True, "kv_mask": "left"},
    "causal window": {"causal": True, "window_tokens": 40, "kv_mask": "right"},
    "window": {"window_tokens": 40},
}


def reference(query, key, value, *, causal=False, window_tokens=None, kv_mask=None, scale=None):
    """Softmax over what is visible, written out; float64 would need another configuration of jax."""
    key, value = (jnp.repeat(part, query.shape[2] // key.shape[2], axis=2) for part in (key, value))
    scores = jnp.einsum("bsae,bkae->bask", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    ahead = np.arange(key.shape[1]) - np.arange(query.shape[1])[:, None]
    seen = np.ones(ahead.shape, bool)
    seen &= (ahead <= 0) if causal else True
    seen &= (np.abs(ahead) < window_tokens) if window_tokens else True
    seen = seen[None, None] & (True if kv_mask is None else kv_mask[:, None, None, :])
    return jnp.einsum("bask,bkae->bsae", jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), value)


def inputs(mask, rows=2):
    keys = jax.random.split(jax.random.key(0), 3)
    parts = [jax.random.normal(key, (rows, TOKENS, heads, 16)) for key, heads in zip(keys, (4, 2, 2), strict=True)]
    options = dict(MASKS[mask])
    places, existing = np.arange(TOKENS), 120 + 10 * np.arange(rows)[:, None]
    sides = {"right": places < existing, "left": places >= TOKENS - existing}
    exists = sides.get(options.get("kv_mask"))
    options["kv_mask"] = None if exists is None else jnp.asarray(exists)
    # Queries of padding may see nothing; nothing reads them.
    read = options["kv_mask"] if "causal" in mask else jnp.ones((rows, TOKENS), bool)
    return parts, options, read[:, :, None, None]


def both_ways(function, parts, options, read):
    """The result where it is read, and the gradient of a function of it."""

    def weighed(*parts):
        out = jnp.where(read, function(*parts, **options), 0)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.grad(weighed, argnums=(0, 1, 2), has_aux=True))(*parts)


def assert_close(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_kernels_equal_the_reference(mask, monkeypatch):
    monkeypatch.setattr(splash, "_BLOCKS", (128,))  # two blocks, so that there is something to skip
    case = inputs(mask)
    expected = both_ways(reference, *case)
    with compiling_for(kernel="splash"):
        assert_close(both_ways(attention, *case), expected)
    monkeypatch.setattr(attention_module, "_BLOCK_TOKENS", 64)
    assert_close(both_ways(attention, *case), expected)
    parts, options, read = case
    called = functools.partial(flash_attention, implementation="xla", scale=0.25)
    options = {"causal": False, "window_tokens": None} | options
    assert_close(both_ways(called, parts, options, read), expected)


@pytest.mark.parametrize("mask", ["padding", "causal, padding on the left"])
@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_split_over_samples_queries_and_heads(mask, kernel, monkeypatch):
    monkeypatch.setattr(splash, "_BLOCKS", (128,))
    monkeypatch.setattr(attention_module, "flash_attention", functools.partial(flash_attention, implementation="xla"))
    monkeypatch.setattr(attention_module, "_cudnn_takes", lambda *_, **__: True)
    case = inputs(mask)
    with compiling_for(make_mesh(MeshConfig(data=2, sequence=2, tensor=2)), kernel=kernel):
        found = both_ways(attention, *case)
    assert_close(found, both_ways(reference, *case))


def test_key_value_heads_that_tensor_does_not_divide_are_repeated():
    parts, options, read = inputs("none", rows=1)
    parts = [parts[0], *(part[:, :, :1] for part in parts[1:])]
    with compiling_for(make_mesh(MeshConfig(data=1, sequence=2, tensor=4)), kernel="splash"):
        found = both_ways(attention, parts, options, read)
    assert_close(found, both_ways(reference, parts, options, read))


def test_what_no_kernel_serves_is_done_by_xla(monkeypatch):
    monkeypatch.setattr(splash, "attend", None)
    parts, _, _ = inputs("none")

    def calls(*parts):
        attention(*(part[:, :100] for part in parts))  # shorter than a block
        attention(*parts, mask=jnp.ones((2, TOKENS, TOKENS), bool))
        attention(*parts, bias=jnp.zeros((1, 4, TOKENS, TOKENS)))
        attention(parts[0][:, -1:], *parts[1:], causal=True, query_offset=jnp.int32(TOKENS - 1))

    with compiling_for(kernel="splash"):
        jax.eval_shape(calls, *parts)
        with pytest.raises(TypeError):
            jax.eval_shape(attention, *parts)


@pytest.mark.parametrize(
    ("platform", "queries", "keys", "most"),
    [("cpu", 511, 9000, 511), ("cpu", 512, 512, 256), ("gpu", 1024, 1024, 4096), ("tpu", 16384, 16384, 256)],
)
def test_a_block_of_queries(platform, queries, keys, most):
    assert attention_module._most_block_tokens(platform, queries, keys) == most


def test_blocks_of_queries_have_their_own_masks_biases_and_places(monkeypatch):
    monkeypatch.setattr(attention_module, "_BLOCK_TOKENS", 8)  # 19 queries: three blocks, the last one not full
    parts = [part[:, :21] for part in inputs("none")[0]]
    parts[0] = parts[0][:, :19]
    random = jax.random.split(jax.random.key(1), 2)
    mask, bias = jax.random.bernoulli(random[0], 0.7, (2, 19, 21)), jax.random.normal(random[1], (1, 4, 19, 21))
    found = jax.jit(functools.partial(attention, causal=True))(*parts, mask=mask, bias=bias, query_offset=jnp.int32(2))
    seen = (mask & (np.arange(21) <= np.arange(19)[:, None] + 2))[:, None]
    key, value = (jnp.repeat(part, 2, axis=2) for part in parts[1:])
    scores = jnp.einsum("bsae,bkae->bask", parts[0], key) / 4 + bias
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    read = seen.any(axis=-1)[:, 0, :, None, None]  # a query that sees nothing returns some average
    assert_close(jnp.where(read, found, 0), jnp.where(read, jnp.einsum("bask,bkae->bsae", weights, value), 0))


@pytest.mark.parametrize(
    ("platform", "kind", "kernel", "few"),
    [
        ("tpu", "TPU v6 lite", "splash", FEW_TOKENS),
        ("gpu", "NVIDIA H200", "cudnn", FEW_TOKENS),
        ("gpu", "AMD Instinct MI300X", "xla", FEW_TOKENS),
        ("cpu", "cpu", "xla", 0),
    ],
)
def test_the_platform_that_is_compiled_for_decides(platform, kind, kernel, few, monkeypatch):
    monkeypatch.setattr(Target, "device", SimpleNamespace(platform=platform, device_kind=kind))
    mesh = make_mesh()
    assert Target(mesh).chosen_kernel == kernel and Target(mesh).few_tokens_limit == few
    assert Target().chosen_kernel == "xla"  # eight devices, and nothing said about them
    assert Target(mesh, "xla", 3).chosen_kernel == "xla" and Target(mesh, "xla", 3).few_tokens_limit == 3


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one device", "mesh"])
def test_rows_of_few_tokens_in_one_kernel(mesh):
    rows, heads = (37, 3) if mesh is None else (8, 2)  # 37: three blocks, the last one not full
    random = jax.random.split(jax.random.key(0), 6)
    parts = [jax.random.normal(key, (rows, 10, heads, 128)) for key in random[:3]]
    scales = [1 + 0.1 * jax.random.normal(key, (128,)) for key in random[3:5]]
    wanted = jax.random.normal(random[5], parts[0].shape)

    def plain(query, key, value, *scales):
        query, key = (
            scale * part / jnp.sqrt(jnp.mean(part**2, -1, keepdims=True) + 1e-6)
            for part, scale in zip((query, key), scales, strict=True)
        )
        weights = jax.nn.softmax(jnp.einsum("rnae,rmae->ranm", query, key) / 128**0.5)
        return jnp.einsum("ranm,rmae->rnae", weights, value)

    def both(function):
        out, back = jax.vjp(function, *parts, *scales)
        return out, back(wanted)

    kernel = functools.partial(row_attention.attend, eps=1e-6)
    with compiling_for(mesh and make_mesh(mesh), kernel="splash", few_tokens=10):
        aim = current()
        assert aim.has_row_kernel(10, 128)
        assert not aim.has_row_kernel(11, 128) and not aim.has_row_kernel(10, 64)
        found = jax.jit(both, static_argnums=0)(kernel)
        half = kernel(*(part.astype(jnp.bfloat16) for part in (*parts, *scales)))
    expected = both(plain)
    assert_close(found, expected)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected[0], atol=0.05)


def test_the_target_is_set_for_what_is_inside():
    assert current() == Target()
    with compiling_for(kernel="xla"), compiling_for(few_tokens=2) as inner:
        assert current() == inner == Target(None, "auto", 2)
    assert current() == Target()


@pytest.mark.parametrize(("tokens", "block"), [(130, 256), (4608, 768), (4607, 768), (1025, 384), (7168, 512)])
def test_blocks_pad_little(tokens, block):
    assert splash.block_tokens(tokens) == block
