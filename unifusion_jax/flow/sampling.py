"""Integrating the learned flow from noise (t=1) to data (t=0): solvers and classifier-free guidance, as one compiled loop."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unifusion_jax.flow.matching import Latents, shift_timesteps

Velocity = Callable[[Latents, Float[Array, " B"]], Latents]
SOLVERS = ("euler", "heun")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How an image is integrated.

    Attributes:
      steps: solver steps; Heun evaluates the network twice in each but the last.
      solver: "euler" (first order) or "heun" (second order).
      guidance: classifier-free guidance scale; 1 is off.
      guidance_interval: times (low, high) between which guidance acts (Kynkaanniemi et al. 2024); outside, only the
        conditional velocity is evaluated.
      shift: moves the steps towards noise, as `unifusion_jax.flow.matching.shift_timesteps`.
    """

    steps: int = 30
    solver: str = "euler"
    guidance: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {list(SOLVERS)}, got {self.solver!r}.")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval must be 0 <= low <= high <= 1, got {self.guidance_interval}.")
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}.")


def timesteps(steps: int, shift: float = 1.0) -> Float[Array, " steps_plus_one"]:
    """Returns the descending times from 1 to 0, float32, shifted."""
    return shift_timesteps(jnp.linspace(1.0, 0.0, steps + 1, dtype=jnp.float32), shift)


def guided(conditional: Velocity, unconditional: Velocity, config: SamplingConfig) -> Velocity:
    """Combines two velocity functions: v = v_u + guidance (v_c - v_u) inside the interval, v_c outside it."""
    if config.guidance == 1.0:
        return conditional
    low, high = config.guidance_interval

    def velocity(x: Latents, t: Float[Array, " B"]) -> Latents:
        def both() -> Latents:
            without = unconditional(x, t)
            return without + config.guidance * (conditional(x, t) - without)

        inside = (t[0] >= low) & (t[0] <= high)
        return jax.lax.cond(inside, both, lambda: conditional(x, t))

    return velocity


def integrate(velocity: Velocity, noise: Latents, config: SamplingConfig) -> Latents:
    """Runs the solver from `noise` at t=1 to t=0 in one `lax.scan` and returns the data-side latents."""
    times = timesteps(config.steps, config.shift)
    batch = noise.shape[0]

    def at(x: Latents, t: Float[Array, ""]) -> Latents:
        return velocity(x, jnp.broadcast_to(t, (batch,)))

    def euler(x: Latents, span: tuple[Float[Array, ""], Float[Array, ""]]) -> tuple[Latents, None]:
        now, after = span
        return x + (after - now) * at(x, now), None

    def heun(x: Latents, span: tuple[Float[Array, ""], Float[Array, ""]]) -> tuple[Latents, None]:
        now, after = span
        first = at(x, now)
        guess = x + (after - now) * first
        return x + (after - now) * 0.5 * (first + at(guess, after)), None

    if config.solver == "euler":
        return jax.lax.scan(euler, noise, (times[:-1], times[1:]))[0]
    # The last step goes to t=0 by Euler: there the velocity is the mean over all data, which a second look does not improve.
    x = jax.lax.scan(heun, noise, (times[:-2], times[1:-1]))[0] if config.steps > 1 else noise
    return euler(x, (times[-2], times[-1]))[0]
