"""The training loop, the same for every task."""

import logging
import time
from pathlib import Path

import jax
import tqdm
from jax.sharding import Mesh

from unifusion_jax.data.pipeline import BatchIterator
from unifusion_jax.parallel.hosts import agreed
from unifusion_jax.parallel.sharding import global_batch
from unifusion_jax.training.checkpoints import Checkpoints
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.health import Health
from unifusion_jax.training.metrics import MetricWriter, Stopwatch, averages
from unifusion_jax.training.phases import Phase, Shapes, carry_on
from unifusion_jax.training.preemption import Preempted, Preemption
from unifusion_jax.training.profiling import Profiler
from unifusion_jax.training.program import Program, make_program
from unifusion_jax.training.state import TrainState
from unifusion_jax.training.task import Task

log = logging.getLogger(__name__)


def fit(
    task: Task,
    config: TrainConfig,
    workdir: Path,
    mesh: Mesh,
    *,
    phase: Phase | None = None,
    before: Shapes | None = None,
) -> tuple[TrainState, MetricWriter]:
    """Trains until `config.total_steps`, or the end of `phase`, resuming from the newest checkpoint of `workdir`.

    `before` are the parameters of the phase before, from whose last checkpoint this one starts. Returns the final state and
    the still open metric writer.

    Raises:
      NonFiniteError: loss, gradient or update were not finite; the checkpoint before stays as it is.
      Preempted: the run was told to end, and has saved its state.
      SaveError: a checkpoint could not be written; the one before stays as it is.
    """
    phase = phase or Phase(config, 0, config.total_steps)
    program = make_program(task, config, mesh)
    checkpoints = Checkpoints(workdir, every_steps=config.checkpoint.every_steps, keep=config.checkpoint.keep)
    batches = task.batches()
    state = _first_state(program, checkpoints, batches, phase, before)
    logged = start = int(state.step)
    writer, health, watch = MetricWriter(workdir, start_step=start), Health(workdir, config.on_nonfinite), Stopwatch()
    preemption, profiler, bar = Preemption(), Profiler(config.profile, workdir), _bar(config, start)
    with checkpoints, batches, preemption, profiler, bar:
        for step in range(start + 1, phase.until + 1):
            with watch.waiting():
                batch = next(batches)
            with profiler.step(step, state):
                data, static = global_batch(batch.data, mesh), task.static(batch.bucket)
                state, measures = program.step(state, task.frozen, data, static)
            health.note(step, batch, measures)
            bar.update()
            if step == 1:
                _log_first_step(state, watch)
            if step % config.log_every_steps == 0 or step == config.total_steps:
                health.check()
                values = averages(state.metrics) | health.counts()
                writer.write(step, values | watch.rates(step - logged, config.batch_size, task.flops_per_sample))
                bar.set_postfix(loss=values["loss"])
                state, logged = program.reset(state), step
                watch.restart()
            told = preemption.reached(step)
            saving = checkpoints.due(step, force=told or step == phase.until)
            drawing = config.preview.every_steps and step % config.preview.every_steps == 0
            if saving or drawing:
                health.check()  # waits for the device, which is no pause
                with watch.pause():
                    if drawing:
                        _preview(task, state, step, workdir, writer)
                    if saving:
                        writer.sync()  # a run that goes on from here has the lines up to here
                        checkpoints.save(step, state, batches.get_state())
            if told and step < config.total_steps:
                writer.close()
                raise Preempted(step, workdir)
    return state, writer


def _first_state(
    program: Program, checkpoints: Checkpoints, batches: BatchIterator, phase: Phase, before: Shapes | None
) -> TrainState:
    """Makes, carries on or restores the state, and goes to its place in the data."""
    newest = agreed(checkpoints.latest_step() or 0)
    if not newest:
        return program.first_state(phase.config.seed)
    if before is not None and newest == phase.start:
        state, position = carry_on(checkpoints, before, program, seed=phase.config.seed)
        log.info("Encoder and conditioning swapped at step %d.", phase.start)
    else:
        state, position = checkpoints.restore(program.placed())
        log.info("Resumed from step %d.", newest)
    batches.set_state(position)
    return state


def _bar(config: TrainConfig, start: int) -> tqdm.tqdm:
    return tqdm.tqdm(total=config.total_steps, initial=start, unit="step", disable=jax.process_index() > 0)


def _log_first_step(state: TrainState, watch: Stopwatch) -> None:
    jax.block_until_ready(state)
    log.info("First step done, %.1f s after the loop began.", time.perf_counter() - watch.since)


def _preview(task: Task, state: TrainState, step: int, workdir: Path, writer: MetricWriter) -> None:
    image = task.preview(state.inference_params)
    if image is None or jax.process_index() > 0:
        return
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"step_{step:08d}.png")
    writer.write_image(step, "samples", image)
