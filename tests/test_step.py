"""One optimizer step: accumulated, recomputed and sharded, it stays the same step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_training import parsed
from training_support import SPLIT

from unifusion_jax.layers import Stack, linear
from unifusion_jax.parallel.mesh import make_mesh
from unifusion_jax.parallel.remat import remat
from unifusion_jax.parallel.sharding import global_batch
from unifusion_jax.training.program import make_program
from unifusion_jax.training.tasks import make_task


def stepped(frozen, **changes):
    """The state after one step on the same batch."""
    config = parsed(frozen, **changes)
    mesh = make_mesh(config.mesh)
    task = make_task(config, mesh)
    program = make_program(task, config, mesh)
    with task.batches() as batches:
        batch = next(batches)
    state = program.first_state(0)
    # Gates and the last map start at zero, so most gradients would be zero too.
    state = dataclasses.replace(
        state, params=jax.tree.map(lambda leaf, at: jax.device_put(leaf + 0.02, at), state.params, task.param_shardings)
    )
    before = jax.tree.leaves(state.params)[0]
    after, _ = program.step(state, task.frozen, global_batch(batch.data, mesh), task.static(batch.bucket))
    assert before.is_deleted()  # its memory went to the new state
    return after


def test_a_step_in_parts_on_another_mesh_is_the_step_of_the_whole_batch(frozen):
    whole, parts = stepped(frozen), stepped(frozen, **SPLIT)
    for name in ("loss", "grad_norm", "loss_t0"):
        # The parts' own numbers of samples in a bin of t add up to the batch's.
        np.testing.assert_allclose(ratio(parts, name), ratio(whole, name), rtol=2e-4)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(first_moment(parts)), jax.tree.leaves(first_moment(whole)), strict=True
    ):
        scale = float(jnp.abs(other).max()) + 1e-8
        assert float(np.abs(np.asarray(one) - np.asarray(other)).max()) < 1e-3 * scale, jax.tree_util.keystr(path)


def ratio(state, name):
    total, weight = np.asarray(state.metrics[name])
    return total / weight


def first_moment(state):
    """Adam's first moment, a tree like the parameters."""
    found = [leaf.mu for leaf in jax.tree.leaves(state.opt_state, is_leaf=_has_moment) if _has_moment(leaf)]
    assert len(found) == 1
    return found[0]


def _has_moment(node):
    return hasattr(node, "mu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate_steps": 3}, "batch_size=8 cannot be worked on in accumulate_steps=3 equal parts"),
        ({"accumulate_steps": 2, "task": "encoder"}, "accumulate_steps=2 is for task='unifusion'"),
        ({"accumulate_steps": 0}, "accumulate_steps must be at least 1"),
    ],
)
def test_parts_that_cannot_be_made_are_refused(frozen, changes, message):
    with pytest.raises(ValueError, match=message):
        parsed(frozen, **changes)


def test_recomputation_changes_no_gradient():
    stack = Stack(lambda rngs: linear(4, 4, (None, None), rngs=rngs), 3, rngs=nnx.Rngs(0))

    def loss(x, how):
        return stack.scan(lambda block, x, _: (jnp.tanh(block(x)), None), x, remat=remat(how))[0].sum()

    gradient = jax.grad(loss)
    x = jax.random.normal(jax.random.key(1), (2, 4))
    programs = {how: str(jax.make_jaxpr(lambda x, how=how: gradient(x, how))(x)) for how in ("none", "full", "offload")}
    # A CPU has one memory, so what is sent to the host's and fetched again can only be read here, not run.
    assert {how: "host" in program.lower() for how, program in programs.items()} == {
        "none": False,
        "full": False,
        "offload": True,
    }
    expected = gradient(x, "none")
    for how in ("dots", "full"):
        np.testing.assert_allclose(jax.jit(gradient, static_argnums=1)(x, how), expected, rtol=1e-5)
