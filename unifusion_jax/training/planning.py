"""Compiling the real training step for devices that need not be here, and reading off what it takes."""

import copy
import dataclasses
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from unifusion_jax.data.buckets import Bucket
from unifusion_jax.parallel.chips import chip_of
from unifusion_jax.parallel.hlo import collective_bytes
from unifusion_jax.parallel.target import Target
from unifusion_jax.training.abstract import Step, abstract_step
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.flops import condition_flops, dit_flops, traced_flops
from unifusion_jax.training.objective import FlowMatching

log = logging.getLogger(__name__)

_GIB = 2**30
_TOO_LARGE = re.compile(
    r"RESOURCE_EXHAUSTED|[Oo]ut of memory|Ran out of memory|exceeded hbm|hbm capacity", re.IGNORECASE
)
_USED = re.compile(r"(?:[Uu]sed |HLO temporaries \()([\d.]+)([KMG])")


class DoesNotCompileError(RuntimeError):
    """The compiler refused the step for a reason other than memory."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step takes on each chip.

    Attributes:
      chips: devices.
      device: their kind.
      task: whose batches the step is compiled for.
      mesh: axis sizes.
      batch_size: samples per step over all chips.
      accumulate_steps: parts in which they are worked on.
      remat: what is computed again.
      attention: the kernel.
      parameters_trained: numbers that are trained.
      parameters_frozen: numbers of the frozen networks.
      memory_gib: of one chip by part; "temporary" is None where the step was not compiled, or did not fit.
      total_gib: their sum, or what the compiler said it would need.
      capacity_gib: what a chip has; None where unknown.
      fits: None where the capacity is unknown.
      model_flops: of one step over all chips: forward and backward of what is trained, without recomputation.
      executed_flops: with recomputation, the frozen networks and the update.
      collective_bytes: of one chip in one step, by kind.
      step_time_bound_s: the longest of the times that products, links and memory alone would take.
      bound_by: which it is.
      mfu_bound: model FLOPs utilisation at that time.
      compile_s: tracing and compiling.
    """

    chips: int
    device: str
    task: str
    mesh: Mapping[str, int]
    batch_size: int
    accumulate_steps: int
    remat: str
    attention: str
    parameters_trained: int
    parameters_frozen: int
    memory_gib: Mapping[str, float | None]
    total_gib: float | None
    capacity_gib: float | None
    fits: bool | None
    model_flops: float
    executed_flops: float
    collective_bytes: Mapping[str, int]
    step_time_bound_s: float | None
    bound_by: str | None
    mfu_bound: float | None
    compile_s: float | None


def plan(config: TrainConfig, devices: Sequence[jax.Device], *, capacity_gib: float | None, task: str = "") -> Plan:
    """Compiles the step and reports.

    Args:
      config: of the run.
      devices: of a topology, or of this machine.
      capacity_gib: memory of one chip; None where unknown.
      task: whose batches; those that take the most memory by default.

    Raises:
      ValueError: the config cannot run on these devices.
      DoesNotCompileError: the compiler refused it, not for want of memory.
    """
    step = abstract_step(config, devices, task)
    mesh = step.objective.mesh
    started = time.perf_counter()
    lowered = step.lower()
    traced_s = time.perf_counter() - started
    log.info("Traced in %.0f s; compiling for %d x %s.", traced_s, mesh.size, mesh.devices.flat[0].device_kind)
    compiled, needed_gib = _compile(lowered)
    compile_s = time.perf_counter() - started
    parts: dict[str, float | None] = dict(_parts(step))
    known = sum(value or 0.0 for value in parts.values())
    parts["temporary"] = None
    total = needed_gib
    collectives: dict[str, int] = {}
    if compiled is not None:
        total = needed_bytes(compiled.memory_analysis(), mesh.devices.flat[0].platform) / _GIB
        parts["temporary"] = total - known
        collectives = collective_bytes(compiled.as_text())
    fits = None if capacity_gib is None or total is None else total <= capacity_gib
    return _report(step, parts, total, capacity_gib, False if compiled is None else fits, collectives, compile_s)


def table(found: Plan) -> str:
    """Returns a plan as text."""
    gib = {name: "not known" if value is None else f"{value:9.3f} GiB" for name, value in found.memory_gib.items()}
    lines = [
        f"{found.chips} x {found.device}, mesh {dict(found.mesh)}, task {found.task}",
        f"batch {found.batch_size} in {found.accumulate_steps} part(s), remat {found.remat}, attention {found.attention}",
        f"parameters: {found.parameters_trained:,} trained, {found.parameters_frozen:,} frozen",
        "memory of a chip:",
        *(f"  {name:<12} {value}" for name, value in gib.items()),
        f"  {'together':<12} {'not known' if found.total_gib is None else f'{found.total_gib:9.3f} GiB'}"
        + (f" of {found.capacity_gib:.2f}" if found.capacity_gib else "")
        + (f" ({found.total_gib / found.capacity_gib:.0%})" if found.capacity_gib and found.total_gib else ""),
        f"FLOPs of a step: {found.model_flops:.3e} model, {found.executed_flops:.3e} executed",
        "bytes between chips, a chip and step: "
        + (", ".join(f"{kind} {size:.3e}" for kind, size in found.collective_bytes.items()) or "none"),
    ]
    if found.step_time_bound_s is not None:
        lines.append(
            f"a step takes at least {found.step_time_bound_s:.2f} s ({found.bound_by}), so MFU is at most {found.mfu_bound:.0%}"
        )
    lines.append(f"traced and compiled in {found.compile_s:.0f} s")
    lines.append({True: "fits", False: "DOES NOT FIT", None: "capacity not known: set --hbm_gib"}[found.fits])
    return "\n".join(lines)


def _report(
    step: Step,
    parts: Mapping[str, float | None],
    total: float | None,
    capacity_gib: float | None,
    fits: bool | None,
    collectives: Mapping[str, int],
    compile_s: float,
) -> Plan:
    objective, config, mesh = step.objective, step.objective.config, step.objective.mesh
    device = mesh.devices.flat[0]
    flops, executed = model_flops(objective, step.bucket), executed_flops(step)
    chip = chip_of(device)
    bound = reason = None
    if chip is not None and fits is not False:
        times = {
            "products": executed / mesh.size / chip.flops,
            "links": sum(collectives.values()) / chip.link_bytes_per_s,
            "memory": (2 * (total or 0.0) - _read_only(parts)) * _GIB / chip.memory_bytes_per_s,
        }
        reason = max(times, key=lambda name: times[name])
        bound = times[reason]
    return Plan(
        chips=int(mesh.size),
        device=device.device_kind,
        task=step.bucket.task,
        mesh={name: size for name, size in mesh.shape.items() if size > 1},
        batch_size=config.batch_size,
        accumulate_steps=config.accumulate_steps,
        remat=config.remat,
        attention=Target(mesh, config.attention).chosen_kernel,
        parameters_trained=_count(step.state.params),
        parameters_frozen=_count(objective.frozen),
        memory_gib=parts,
        total_gib=total,
        capacity_gib=capacity_gib,
        fits=fits,
        model_flops=flops,
        executed_flops=executed,
        collective_bytes=collectives,
        step_time_bound_s=bound,
        bound_by=reason,
        mfu_bound=None if bound is None or chip is None else flops / bound / mesh.size / chip.flops,
        compile_s=compile_s,
    )


def _read_only(parts: Mapping[str, float | None]) -> float:
    """GiB that a step reads and does not write."""
    return sum(parts[name] or 0.0 for name in ("encoder", "autoencoder", "batch"))


def _compile(lowered: Any) -> tuple[Any, float | None]:
    """Compiles; where the memory does not suffice, returns None and the GiB that the compiler asks for, if it says so."""
    try:
        return lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        if not _TOO_LARGE.search(str(error)):
            raise DoesNotCompileError(f"The step does not compile: {str(error)[:2000]}") from error
        log.info("The compiler says: %s", str(error)[:1500])
        used = _USED.search(str(error))
        scale = {"K": 2**-20, "M": 2**-10, "G": 1.0}
        return None, float(used[1]) * scale[used[2]] if used else None


def needed_bytes(memory: Any, platform: str) -> int:
    """Bytes of a chip that a compiled step takes: what is held, what it works with, and its code."""
    held = memory.argument_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    if platform == "tpu":
        # What libtpu calls temporary is up to half more than what it allots. Its peak counts arguments and results, and falls
        # short by what lies unused between arrays.
        return max(held, memory.peak_memory_in_bytes) + memory.generated_code_size_in_bytes
    return held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def _parts(step: Step) -> dict[str, float]:
    """GiB of one chip for what is held from step to step, and for a batch."""
    frozen = step.objective.frozen
    parts = {
        "parameters": step.state.params,
        "average": step.state.ema,
        "optimizer": step.state.opt_state,
        "encoder": frozen["encoder"],
        "autoencoder": frozen["autoencoder"],
        "batch": step.batch,
    }
    return {name: sum(map(_bytes, jax.tree.leaves(tree))) / _GIB for name, tree in parts.items()}


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def model_flops(objective: FlowMatching, bucket: Bucket) -> float:
    """Model FLOPs of one step: forward and backward of what is trained, over the whole batch."""
    config, model = objective.config, objective.model_config
    down = objective.autoencoder.downsample * config.dit.patch_size
    latent_tokens = (bucket.height_px // down) * (bucket.width_px // down)
    forward = condition_flops(model, bucket.max_kept_tokens)
    forward += config.flow.timesteps_per_sample * dit_flops(model, bucket.max_kept_tokens, latent_tokens)
    return 3 * forward * config.batch_size


def executed_flops(step: Step) -> float:
    """FLOPs of all products and convolutions that one step runs, over all chips, counted in the traced program."""
    objective = copy.copy(step.objective)
    objective.config = dataclasses.replace(objective.config, attention="xla")
    static = objective.static(step.bucket)

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> jax.Array:
        return objective.loss(params, frozen, batch, objective.draw(batch, key, static), static)[0]

    traced = jax.make_jaxpr(jax.grad(loss))(step.state.params, objective.frozen, step.batch, jax.random.key(0))
    return traced_flops(traced.jaxpr)
