"""The training loop, the same for every task."""

import logging
import time
from pathlib import Path

import jax
import tqdm
from jax.sharding import Mesh

from unifusion_jax.parallel.sharding import global_batch
from unifusion_jax.training.checkpoints import Checkpoints
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.metrics import MetricWriter, Stopwatch, averages
from unifusion_jax.training.optimizer import make_optimizer
from unifusion_jax.training.phases import Phase, Shapes, carry_on
from unifusion_jax.training.rng import stream_key
from unifusion_jax.training.state import TrainState, create_state, state_shardings
from unifusion_jax.training.step import compiled_train_step, reset_metrics
from unifusion_jax.training.task import Task

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite."""


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
    the still open metric writer. Raises NonFiniteError, naming the interval, when the loss or
    the gradient norm is not finite; the checkpoint before stays as it is.
    """
    tx = make_optimizer(config.optimizer, config.total_steps)
    names = ["loss", "grad_norm", *task.metric_names]

    def init(key: jax.Array) -> TrainState:
        return create_state(task.init(key), tx, config.ema_decay > 0, names)

    key = stream_key(config.seed, "init")
    abstract = jax.eval_shape(init, key)
    shardings = state_shardings(abstract, task.param_shardings, mesh)
    checkpoints = Checkpoints(workdir, every_steps=config.checkpoint.every_steps, keep=config.checkpoint.keep)
    batches = task.batches()
    phase = phase or Phase(config, 0, config.total_steps)
    if checkpoints.latest_step() is None:
        state = jax.jit(init, out_shardings=shardings)(key)
    elif before is not None and checkpoints.latest_step() == phase.start:
        state, position = carry_on(checkpoints, before, init, shardings, tx, mesh, seed=config.seed)
        batches.set_state(position)
        log.info("Encoder and conditioning swapped at step %d.", phase.start)
    else:
        placed = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), abstract, shardings
        )
        state, position = checkpoints.restore(placed)
        batches.set_state(position)
        log.info("Resumed from step %d of %s.", int(state.step), workdir)
    train_step = compiled_train_step(task, tx, config, shardings)
    reset = jax.jit(reset_metrics, donate_argnums=0, out_shardings=shardings)

    start = int(state.step)
    writer = MetricWriter(workdir, start_step=start)
    watch = Stopwatch()
    progress = tqdm.tqdm(total=config.total_steps, initial=start, unit="step", disable=jax.process_index() > 0)
    logged = start
    with batches, progress:
        for step in range(start + 1, phase.until + 1):
            waiting = time.perf_counter()
            batch = next(batches)
            watch.data_wait_s += time.perf_counter() - waiting
            state = train_step(state, task.frozen, global_batch(batch.data, mesh), task.static(batch.bucket))
            progress.update()
            if step == 1:
                jax.block_until_ready(state)
                log.info("First step done, %.1f s after the loop began.", time.perf_counter() - waiting)
            if step % config.log_every_steps == 0 or step == config.total_steps:
                values = averages(state.metrics)
                _check_finite(values, logged, step)
                writer.write(step, values | watch.rates(step - logged, config.batch_size, task.flops_per_sample))
                progress.set_postfix(loss=f"{values['loss']:.4f}")
                state, logged = reset(state), step
                watch.restart()
            pause = time.perf_counter()
            if config.preview.every_steps and step % config.preview.every_steps == 0:
                _preview(task, state, step, workdir, writer)
            checkpoints.maybe_save(step, state, batches.get_state(), force=step == phase.until)
            watch.pause(pause)
    checkpoints.close()
    return state, writer


def _check_finite(values: dict[str, float | None], first: int, last: int) -> None:
    for name in ("loss", "grad_norm"):
        value = values[name]
        if value is None or value != value or abs(value) == float("inf"):
            raise NonFiniteError(
                f"{name} became {value} somewhere within steps [{first + 1}, {last}]. The last checkpoint is untouched: lower "
                "optimizer.learning_rate or optimizer.clip_norm, or look at the batches of these steps, and restart."
            )


def _preview(task: Task, state: TrainState, step: int, workdir: Path, writer: MetricWriter) -> None:
    image = task.preview(state.inference_params)
    if image is None or jax.process_index() > 0:
        return
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"step_{step:08d}.png")
    writer.write_image(step, "samples", image)
