import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unifusion_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer


def step_of(config, params, gradients, tx=None):
    tx = tx or make_optimizer(config, total_steps=10)
    state = tx.init(params)
    for _ in range(2):  # the first step of the warm-up has rate 0
        updates, state = tx.update(gradients, state, params)
    return updates


@pytest.fixture
def params():
    return {
        "stack": {"blocks": {"up": {"kernel": jnp.zeros((3, 8, 12))}, "norm": {"scale": jnp.ones((3, 8))}}},
        "out": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros((4,))},
        "stem": {"kernel": jnp.zeros((3, 3, 2, 6))},
        "embedding": jnp.zeros((16, 8)),
        "head": {"kernel": jnp.zeros((8, 16))},  # of a language model
    }


@pytest.fixture
def gradients(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


def muon(**changes):
    return OptimizerConfig(**{"name": "muon", "warmup_steps": 1, "learning_rate": 0.1, "weight_decay": 0.0} | changes)


def test_muon_orthogonalises_every_layers_kernel_by_itself(params, gradients):
    updates = step_of(muon(), params, gradients)
    matrices = [*updates["stack"]["blocks"]["up"]["kernel"], updates["out"]["kernel"]]
    matrices.append(updates["stem"]["kernel"].reshape(-1, 6))  # window and input channels are the rows
    for matrix in matrices:
        values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        assert values[-1] > 0.5 * values[0]  # Newton-Schulz leaves them within [0.7, 1.2] of each other
    raw = np.linalg.svd(np.asarray(gradients["out"]["kernel"]), compute_uv=False)
    assert raw[-1] < 0.5 * raw[0]


def test_muon_updates_are_as_large_as_adamws(params, gradients):
    updates = step_of(muon(), params, gradients)
    for matrix in (updates["stack"]["blocks"]["up"]["kernel"], updates["out"]["kernel"], updates["stem"]["kernel"]):
        assert float(jnp.sqrt(jnp.mean(jnp.square(matrix)))) == pytest.approx(0.1 * 0.2, rel=0.3)


def test_muon_leaves_other_parameters_to_adamw(params, gradients):
    updates = step_of(muon(), params, gradients)
    config = muon()
    adamw = optax.adamw(learning_rate(config, 10), b1=config.b1, b2=config.b2, weight_decay=0.0, nesterov=True)
    expected = step_of(config, params, gradients, tx=optax.chain(optax.clip_by_global_norm(1.0), adamw))
    for found, adamw in (
        (updates["embedding"], expected["embedding"]),
        (updates["head"]["kernel"], expected["head"]["kernel"]),
        (updates["stack"]["blocks"]["norm"]["scale"], expected["stack"]["blocks"]["norm"]["scale"]),
        (updates["out"]["bias"], expected["out"]["bias"]),
    ):
        np.testing.assert_allclose(found, adamw, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_first_moment_may_take_16_bits(params, gradients, name):
    found, sizes = [], []
    for dtype in ("float32", "bfloat16"):
        tx = make_optimizer(muon(name=name, first_moment_dtype=dtype), total_steps=10)
        kept = [leaf.dtype for leaf in jax.tree.leaves(tx.init(params)) if leaf.ndim]
        sizes.append((kept.count(jnp.float32), kept.count(jnp.bfloat16)))
        found.append(step_of(None, params, gradients, tx=tx))
    (moments, _), (others, halved) = sizes
    assert halved == len(jax.tree.leaves(params)) and others == moments - halved
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert float(jnp.abs(one - other).max()) < 0.02 * float(jnp.abs(one).max())  # bfloat16 has 8 bits


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_kernels_decay(params, name):
    params = jax.tree.map(jnp.ones_like, params)
    updates = step_of(muon(name=name, weight_decay=0.5), params, jax.tree.map(jnp.zeros_like, params))
    moved = optax.apply_updates(params, updates)
    assert float(moved["out"]["kernel"].max()) < 1
    for kept in (moved["embedding"], moved["out"]["bias"], moved["stack"]["blocks"]["norm"]["scale"]):
        np.testing.assert_array_equal(kept, 1.0)
