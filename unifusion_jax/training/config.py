"""The training configuration: one frozen dataclass per component, as configs/*.py fill it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from unifusion_jax.conditioning import ConditioningConfig
from unifusion_jax.dit import DiTConfig
from unifusion_jax.flow import FlowConfig
from unifusion_jax.parallel.mesh import MeshConfig
from unifusion_jax.parallel.remat import RematName
from unifusion_jax.prompt import DEFAULT_GUIDANCE
from unifusion_jax.training.optimizer import OptimizerConfig


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


@dataclasses.dataclass(frozen=True)
class EncoderRef:
    """The frozen encoder.

    Attributes:
      path: folder, hub id, or "bundled:demo/encoder".
      layers: exported layers; empty leaves them to the conditioning strategy (LAP takes every third one, 1, 4, 7, ...).
      dtype: type its weights are kept and run in.
      system_prompts: which set of `unifusion_jax.verifi.SYSTEM_PROMPTS` it is asked with; "none" for encoders that have no
        system turn.
      verifi: the description that the encoder decodes conditions the DiT (in training a stored one); False: the user's own
        words do, and nothing is decoded.
      quantize: "int8" keeps its matrices in 8 bits, see `encoders.load`.
    """

    path: str = "bundled:demo/encoder"
    system_prompts: Literal["full", "short", "none"] = "full"
    verifi: bool = True
    layers: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Literal["none", "int8"] = "none"


@dataclasses.dataclass(frozen=True)
class AutoencoderRef:
    """The frozen autoencoder: a diffusers folder, hub id, or "bundled:demo/autoencoder"."""

    path: str = "bundled:demo/autoencoder"
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where records come from and the static shapes they are brought to.

    Attributes:
      sources: one mapping per source, see docs/data.md: {"name": "shapes" | "records", "weight": share of the batches,
        "tasks": {task: share}, "derive": {task: share}, and what the source itself takes}.
      budgets: for each task that is trained: {"max_tokens": encoder sequence, "max_tiles": tiles of all reference pictures of
        a sample, "max_kept_tokens": condition tokens}.
      size_px: side of a square picture; other aspect ratios keep its area.
      max_aspect: longest over shortest side of the aspect buckets; 1 trains squares only.
      tiles_per_image: bound of one picture's tile grid, its thumbnail not counted (the paper: up to 10 tiles in all).
      num_workers: data-loading processes per host; 0 loads in threads.
      crop_px: side of the random crops that an autoencoder is trained on (it is convolutional, so it then takes any size);
        0 takes whole pictures.
    """

    sources: tuple[Mapping[str, Any], ...] = ()
    budgets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size_px: int = 1024
    max_aspect: float = 1.0
    tiles_per_image: int = 9
    num_workers: int = 0
    crop_px: int = 0

    def __post_init__(self):
        _at_least("data.size_px", self.size_px, 1)
        _at_least("data.max_aspect", self.max_aspect, 1.0)
        _at_least("data.tiles_per_image", self.tiles_per_image, 1)
        _at_least("data.num_workers", self.num_workers, 0)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how many checkpoints to keep."""

    every_steps: int = 1000
    keep: int = 3

    def __post_init__(self):
        _at_least("checkpoint.every_steps", self.every_steps, 1)
        _at_least("checkpoint.keep", self.keep, 1)


@dataclasses.dataclass(frozen=True)
class PreviewConfig:
    """Pictures drawn while training, by the inference path.

    Attributes:
      every_steps: 0 draws none.
      steps: solver steps.
      guidance: guidance scale.
      prompts: prompts to draw; empty takes prompts of the data's own world.
    """

    every_steps: int = 0
    steps: int = 20
    guidance: float = DEFAULT_GUIDANCE
    prompts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The score printed at the end of training: held-out prompts of the built-in world, read back by its detector.

    Attributes:
      prompts: number of held-out prompts; 0 skips the score.
      steps: solver steps.
      guidance: guidance scale.
    """

    prompts: int = 0
    steps: int = 20
    guidance: float = DEFAULT_GUIDANCE


@dataclasses.dataclass(frozen=True)
class FirstPhase:
    """What a run begins with before its encoder and conditioning are swapped (paper, appendix A.1.3).

    From the swap on the run's own encoder and conditioning hold; the DiT, its average, its optimizer state, the step and the
    data go on.

    Attributes:
      steps: length of this phase; 0 for a run that swaps nothing.
      encoder: its encoder.
      conditioning: its conditioning.
    """

    steps: int = 0
    encoder: EncoderRef = dataclasses.field(default_factory=EncoderRef)
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)

    def __post_init__(self):
        _at_least("first.steps", self.steps, 0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on; saved with every checkpoint.

    Attributes:
      task: what is trained: "unifusion" (conditioning and DiT), "encoder" (the demo vision-language model) or "autoencoder".
      seed: all randomness is folded from it, the stream's name and the step.
      total_steps: optimizer steps.
      batch_size: samples per step over all hosts.
      log_every_steps: interval of metrics.jsonl lines.
      dtype: compute type of the trained network; its weights stay float32.
      ema_decay: decay of the weights' moving average; 0 turns it off.
      init_from: folder that a run of the same task exported, to start from; empty starts from scratch.
      model: sizes of the "encoder" or "autoencoder" that those tasks train from scratch, by name of a constructor.
      first: another encoder and conditioning for the first steps.
    """

    task: Literal["unifusion", "encoder", "autoencoder"] = "unifusion"
    seed: int = 0
    total_steps: int = 200_000
    batch_size: int = 1024
    log_every_steps: int = 50
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    ema_decay: float = 0.999
    remat: RematName = "none"
    init_from: str = ""
    model: str = ""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    encoder: EncoderRef = dataclasses.field(default_factory=EncoderRef)
    first: FirstPhase = dataclasses.field(default_factory=FirstPhase)
    autoencoder: AutoencoderRef = dataclasses.field(default_factory=AutoencoderRef)
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)
    dit: DiTConfig = dataclasses.field(default_factory=DiTConfig.dit_8b)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    preview: PreviewConfig = dataclasses.field(default_factory=PreviewConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def __post_init__(self):
        _at_least("total_steps", self.total_steps, 1)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("log_every_steps", self.log_every_steps, 1)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}.")
        if self.first.steps and self.task != "unifusion":
            raise ValueError(f"first.steps={self.first.steps} swaps encoders, which task={self.task!r} has none of.")
