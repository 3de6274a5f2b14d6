import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unifusion_jax.flow import (
    FlowConfig,
    SamplingConfig,
    flow_matching_loss,
    guided,
    integrate,
    interpolate,
    is_first,
    loss_by_bin,
    sample_timesteps,
    shift_timesteps,
    timesteps,
)

SHAPE = (2, 3, 3, 4)


def pair():
    return jax.random.normal(jax.random.key(0), SHAPE), jax.random.normal(jax.random.key(1), SHAPE)


def test_time_runs_from_data_at_0_to_noise_at_1():
    x0, noise = pair()
    np.testing.assert_array_equal(interpolate(x0, noise, jnp.zeros(2)), x0)
    np.testing.assert_array_equal(interpolate(x0, noise, jnp.ones(2)), noise)


def test_velocity_is_noise_minus_data():
    x0, noise = pair()
    t = jnp.array([0.1, 0.8])
    assert float(flow_matching_loss(lambda x, t: noise - x0, x0, noise, t).max()) == 0.0
    wrong = flow_matching_loss(lambda x, t: x0 - noise, x0, noise, t)
    np.testing.assert_allclose(wrong, jnp.mean((2 * (x0 - noise)) ** 2, axis=(1, 2, 3)), rtol=1e-5)


def test_a_sample_of_batch_one_has_the_loss_it_has_in_any_batch():
    x0, noise = pair()
    t = jnp.array([0.3, 0.6])
    both = flow_matching_loss(lambda x, t: x, x0, noise, t)
    alone = flow_matching_loss(lambda x, t: x, x0[:1], noise[:1], t[:1])
    np.testing.assert_allclose(alone[0], both[0], rtol=1e-6)
    assert np.isfinite(alone).all()


@given(st.floats(0.05, 20.0), st.floats(0.0, 1.0))
@settings(max_examples=50, deadline=None)
def test_shift_keeps_the_ends_and_order(shift, t):
    ends = shift_timesteps(jnp.array([0.0, 1.0]), shift)
    np.testing.assert_allclose(ends, [0.0, 1.0], atol=1e-6)
    moved = float(shift_timesteps(jnp.array(t), shift))
    assert moved >= t - 1e-6 if shift >= 1 else moved <= t + 1e-6


def test_logit_normal_times_have_their_median_at_the_shifted_half():
    config = FlowConfig(base_cells=16)
    t = sample_timesteps(jax.random.key(0), 20_000, config, cells=64)
    assert config.shift_for(64) == 2.0
    assert t.dtype == jnp.float32
    assert float(jnp.median(t)) == pytest.approx(2 / 3, abs=0.01)
    assert 0 < float(t.min()) < float(t.max()) < 1


def test_loss_bins_count_each_sample_once():
    t = jnp.array([0.0, 0.24, 0.26, 0.99, 1.0])
    sums, counts = loss_by_bin(jnp.arange(5.0), t, 4)
    np.testing.assert_array_equal(counts, [2, 1, 0, 2])
    np.testing.assert_array_equal(sums, [1, 2, 0, 7])


def curved(x, t):
    """dx/dt = x: from t=1 to 0 the exact solution is x(1) / e."""
    return x


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_with_their_order(solver, order):
    x = jnp.ones((1, 1, 1, 1))
    errors = []
    for steps in (16, 32):
        # The last Heun step is Euler's, with an error of the square of one step, so the order shows all the same.
        got = float(integrate(curved, x, SamplingConfig(steps, solver, guidance=1.0))[0, 0, 0, 0])
        errors.append(abs(got - np.exp(-1)))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_one_step_of_the_true_velocity_is_exact():
    x0, noise = pair()
    for solver in ("euler", "heun"):
        got = integrate(lambda x, t: noise - x0, noise, SamplingConfig(3, solver, guidance=1.0))
        np.testing.assert_allclose(got, x0, atol=1e-5)


def test_guidance_acts_inside_its_interval_only():
    config = SamplingConfig(10, guidance=3.0, guidance_interval=(0.3, 0.7))
    velocity = guided(lambda x, t: jnp.ones_like(x), lambda x, t: jnp.zeros_like(x), config)
    x = jnp.zeros(SHAPE)
    for t, expected in ((0.1, 1.0), (0.5, 3.0), (0.9, 1.0)):
        np.testing.assert_allclose(velocity(x, jnp.full(2, t)), expected)


def test_guidance_one_never_runs_the_unconditional_branch():
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return x

    for guidance, expected in ((1.0, 0), (2.0, 3)):
        config = SamplingConfig(3, guidance=guidance)
        jax.block_until_ready(integrate(guided(curved, counted, config), jnp.ones(SHAPE), config))
        jax.effects_barrier()
        assert len(calls) == expected


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_one_compiled_loop_serves_all_settings_and_any_stretch(solver):
    traces = []

    @jax.jit
    def run(x, config, start, stop):
        traces.append(1)
        without = jnp.zeros_like
        return integrate(guided(curved, lambda x, t: without(x), config), x, config, start=start, stop=stop)

    x = jax.random.normal(jax.random.key(0), SHAPE)
    for config in (
        SamplingConfig(6, solver, 2, (0, 1)),
        SamplingConfig(9, solver, 1.0, (0.2, 0.7), 3.0),
        SamplingConfig(4, solver, 3.5, (0.5, 1.0), 0.5, switch=0.5),
    ):
        whole = run(x, config, 0, config.steps)
        parts = run(run(run(x, config, 0, 1), config, 1, 3), config, 3, config.steps)
        np.testing.assert_array_equal(whole, parts)
        expected = integrate(guided(curved, lambda x, t: jnp.zeros_like(x), config), x, config)
        np.testing.assert_allclose(whole, expected, rtol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("steps", "switch", "expected"), [(10, 0.2, 2), (30, 0.15, 5), (30, 0.1, 3), (4, 0.1, 1), (5, 0.0, 0)]
)
def test_the_first_condition_has_its_share_of_the_steps(steps, switch, expected):
    config = SamplingConfig(steps, shift=2.5, switch=switch)
    times = timesteps(steps, 2.5)
    first = [bool(is_first(times[step : step + 1], config)) for step in range(steps)]
    assert first == [True] * expected + [False] * (steps - expected)
    assert config.switch_steps == expected


def test_sampling_is_one_compiled_loop():
    calls = []

    def velocity(x, t):
        calls.append(t)
        return x

    jax.jit(lambda x: integrate(velocity, x, SamplingConfig(50, guidance=1.0)))(jnp.ones(SHAPE))
    assert len(calls) == 1


def test_timesteps_descend_in_float32():
    times = timesteps(4, shift=3.0)
    assert times.dtype == jnp.float32
    assert np.all(np.diff(times) < 0)
    assert (float(times[0]), float(times[-1])) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingConfig(0), "steps must be at least 1, got 0"),
        (lambda: SamplingConfig(1, "eular"), r"one of \['euler', 'heun'\], got 'eular'"),
        (lambda: SamplingConfig(1, guidance_interval=(0.9, 0.1)), "0 <= low <= high <= 1"),
        (lambda: SamplingConfig(1, guidance=float("nan")), "guidance must be a number of at least 0"),
        (lambda: SamplingConfig(1, switch=1.5), r"switch is a share of the steps in \[0, 1\], got 1.5"),
        (lambda: FlowConfig(condition_dropout=1.0), r"a share in \[0, 1\), got 1.0"),
        (lambda: FlowConfig(logit_std=0.0), "logit_std must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
