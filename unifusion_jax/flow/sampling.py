"""Integrating the learned flow from noise (t=1) to data (t=0): solvers and classifier-free guidance, as one compiled loop."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unifusion_jax.flow.matching import Latents, shift_timesteps
from unifusion_jax.prompt import DEFAULT_GUIDANCE

Velocity = Callable[[Latents, Float[Array, " B"]], Latents]
SOLVERS = ("euler", "heun")


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How an image is integrated.

    A pytree whose leaves are all fields but `solver`: a compiled function that takes one as an argument serves every number
    of steps, guidance scale and so on without being compiled again.

    Attributes:
      steps: solver steps; Heun evaluates the network twice in each but the last.
      solver: "euler" (first order) or "heun" (second order).
      guidance: classifier-free guidance scale; 1 is off.
      guidance_interval: times (low, high) between which guidance acts (Kynkaanniemi et al. 2024); outside, only the
        conditional velocity is evaluated.
      shift: moves the steps towards noise, as `unifusion_jax.flow.matching.shift_timesteps`.
      switch: share of the steps under the first of two conditions, where there are two (paper, section 5: 0.1 to 0.2).
    """

    steps: int = 30
    solver: str = "euler"
    guidance: float = DEFAULT_GUIDANCE
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0
    switch: float = 0.15

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {list(SOLVERS)}, got {self.solver!r}.")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be a number of at least 0 (1 is off), got {self.guidance}.")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be 0 <= low <= high <= 1, got {self.guidance_interval}.")
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}.")
        if not 0 <= self.switch <= 1:
            raise ValueError(f"switch is a share of the steps in [0, 1], got {self.switch}.")
        # One type per leaf: an int where a float is meant would be another compilation.
        for name in ("guidance", "shift", "switch"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "guidance_interval", (float(low), float(high)))

    def tree_flatten(self) -> tuple[tuple[Any, ...], str]:
        """Returns the leaves and the solver, as jax asks for them."""
        return (self.steps, self.guidance, self.guidance_interval, self.shift, self.switch), self.solver

    @classmethod
    def tree_unflatten(cls, solver: str, leaves: Any) -> "SamplingConfig":
        """Rebuilds one around any leaves, without the checks of `__init__`."""
        config = object.__new__(cls)
        names = ("steps", "guidance", "guidance_interval", "shift", "switch")
        for name, leaf in (("solver", solver), *zip(names, leaves, strict=True)):
            object.__setattr__(config, name, leaf)
        return config

    @property
    def switch_steps(self) -> int:
        """Steps under the first of two conditions: `switch` of them, rounded up."""
        return math.ceil(self.switch * self.steps - 1e-6)


def time_of(step: Any, config: SamplingConfig) -> Float[Array, "*steps"]:
    """Returns the time, float32, at which a step begins: 1 at step 0, 0 at step `config.steps`, shifted in between."""
    return shift_timesteps(1.0 - jnp.asarray(step, jnp.float32) / config.steps, config.shift)


def timesteps(steps: int, shift: float = 1.0) -> Float[Array, " steps_plus_one"]:
    """Returns the descending times from 1 to 0, float32, shifted."""
    return time_of(jnp.arange(steps + 1), SamplingConfig(steps, shift=shift))


def guided(conditional: Velocity, unconditional: Velocity, config: SamplingConfig) -> Velocity:
    """Combines two velocity functions: v = v_u + guidance (v_c - v_u) inside the interval, v_c outside it.

    Where the interval or a scale of 1 turn guidance off, the unconditional velocity is not evaluated.
    """
    low, high = config.guidance_interval

    def velocity(x: Latents, t: Float[Array, " B"]) -> Latents:
        with_condition = conditional(x, t)

        def push() -> Latents:
            without = unconditional(x, t)
            return without + config.guidance * (with_condition - without)

        inside = (t[0] >= low) & (t[0] <= high) & (jnp.asarray(config.guidance) != 1)
        return jax.lax.cond(inside, push, lambda: with_condition)

    return velocity


def is_first(t: Float[Array, " B"], config: SamplingConfig) -> Array:
    """Returns whether time t, of a step's beginning, lies in the part of the steps that the first of two conditions has."""
    steps = jnp.ceil(jnp.asarray(config.switch, jnp.float32) * config.steps - 1e-4)
    # Half a step away from every step's time, so that rounding decides nothing.
    return t[0] > time_of(steps - 0.5, config)


def integrate(
    velocity: Velocity,
    noise: Latents,
    config: SamplingConfig,
    *,
    start: int | Int[Array, ""] = 0,
    stop: int | Int[Array, ""] | None = None,
) -> Latents:
    """Runs the solver in one compiled loop.

    Args:
      velocity: of the flow at (x, t).
      noise: where step `start` begins: noise at t=1 for step 0.
      config: solver and steps.
      start: first step. Like `config`'s numbers, it and `stop` may be traced values.
      stop: the step before which to stop; None runs to t=0, the data-side latents.
    """
    batch = noise.shape[0]

    def at(x: Latents, t: Float[Array, ""]) -> Latents:
        return velocity(x, jnp.broadcast_to(t, (batch,)))

    def step(index: Int[Array, ""], x: Latents) -> Latents:
        now, after = time_of(index, config), time_of(index + 1, config)
        slope = at(x, now)
        if config.solver == "heun":
            # The last step goes to t=0 by Euler: there the velocity is the mean over all data, which a second look does
            # not improve.
            first = slope
            last = index + 1 >= config.steps
            slope = jax.lax.cond(last, lambda: first, lambda: 0.5 * (first + at(x + (after - now) * first, after)))
        return x + (after - now) * slope

    return jax.lax.fori_loop(start, config.steps if stop is None else stop, step, noise)
