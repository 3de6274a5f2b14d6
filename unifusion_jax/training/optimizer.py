"""AdamW or Muon, with warm-up, decay and global-norm clipping."""

import dataclasses
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

_ADAMW_UPDATE_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019), which the paper uses, or Muon (Jordan et al. 2024).

    Muon orthogonalises the momentum of every kernel but a language model's output head and leaves the other parameters to
    AdamW with Nesterov momentum. Its
    updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so both read the same learning rate and
    decay alike; small networks take, and need, several times AdamW's rate.

    Attributes:
      name: "adamw" or "muon".
      learning_rate: peak rate.
      warmup_steps: linear warm-up from 0.
      schedule: "constant" or "cosine" after the warm-up.
      final_scale: the cosine ends at learning_rate * final_scale.
      b1: decay of the first moment; Muon's momentum is 0.95.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of matrices (of those that Muon moves); vectors and scalars are not decayed.
      clip_norm: gradients are scaled down to this global norm.
      first_moment_dtype: type in which the first moment (Muon's momentum) is kept; "bfloat16" halves its memory.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 1000
    schedule: Literal["constant", "cosine"] = "constant"
    final_scale: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError(
                f"optimizer.learning_rate and clip_norm must be positive, got {self.learning_rate} and {self.clip_norm}."
            )
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"optimizer.warmup_steps and weight_decay must be 0 or more, got {self.warmup_steps} and {self.weight_decay}."
            )


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the rate as a function of the step."""
    warmup = min(config.warmup_steps, total_steps)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, total_steps - warmup), config.final_scale)
    else:
        after = optax.constant_schedule(config.learning_rate)
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, max(1, warmup)), after], [warmup])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns clip -> AdamW or Muon."""
    rate = learning_rate(config, total_steps)
    if config.name == "muon":
        update = muon(
            rate,
            consistent_rms=_ADAMW_UPDATE_RMS,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            mu_dtype=config.first_moment_dtype,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    else:
        update = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            mu_dtype=config.first_moment_dtype,
            weight_decay=config.weight_decay,
            mask=_kernels,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _is_kernel(path: Any) -> bool:
    # A stacked block adds a leading layer axis, so the name decides, not the rank alone.
    return getattr(path[-1], "key", "") == "kernel"


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _is_kernel(path), params)


def _muon_dimensions(params: Any) -> Any:
    """Says of each kernel which axes are its matrix's rows and columns; None leaves a parameter to AdamW."""

    def dimensions(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        keys = [getattr(key, "key", "") for key in path]
        # Of an output head, which scores a vocabulary, rare words must not move like common ones.
        if not _is_kernel(path) or "head" in keys:
            return None
        # layers.Stack has a matrix for each layer, and stacks of stacks one for each of theirs.
        return MuonDimensionNumbers(
            tuple(range(leaf.ndim - 2 if "blocks" in keys else 0, leaf.ndim - 1)), leaf.ndim - 1
        )

    return jax.tree_util.tree_map_with_path(dimensions, params)
