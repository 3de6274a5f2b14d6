"""What a training run trains: the part that differs between the diffusion model and the two frozen networks it needs."""

from typing import Any, Protocol, runtime_checkable

import PIL.Image
from jaxtyping import Array, Float, Key

from unifusion_jax.data.buckets import Bucket
from unifusion_jax.data.pipeline import BatchIterator
from unifusion_jax.training.state import Params

# Metrics of a step by name, each as (sum, weight).
Sums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


@runtime_checkable
class Objective(Protocol):
    """What one optimizer step needs to know.

    Attributes:
      metric_names: metrics that `loss` returns, besides "loss" and "grad_norm".
      frozen: pytree of frozen parameters, on the devices.
      param_shardings: tree of shardings of the trained parameters.
    """

    metric_names: list[str]
    frozen: Any
    param_shardings: Params

    def init(self, key: Key[Array, ""]) -> Params:
        """Makes float32 parameters; runs compiled, with the shardings above."""
        ...

    def draw(self, batch: Any, key: Key[Array, ""], static: Any) -> Any:
        """Returns the random numbers that the loss of a global batch takes, every array with the batch's rows first.

        A task whose loss draws as it goes returns the key; its gradients cannot be accumulated.
        """
        ...

    def loss(self, params: Params, frozen: Any, batch: Any, draws: Any, static: Any) -> tuple[Float[Array, ""], Sums]:
        """Returns the loss of a batch with its draws, and metrics as (sum, weight)."""
        ...


@runtime_checkable
class Task(Objective, Protocol):
    """One kind of training. The loop calls these and knows nothing else about what it trains.

    Attributes:
      flops_per_sample: model FLOPs of one training sample, forward and backward, or None where they are not counted.
    """

    flops_per_sample: float | None

    def static(self, bucket: Bucket) -> Any:
        """Returns what `loss` needs to know of a bucket besides array shapes; each different value is one compilation."""
        ...

    def batches(self) -> BatchIterator:
        """Opens this host's share of the data."""
        ...

    def preview(self, params: Params) -> PIL.Image.Image | None:
        """Draws a picture of what the parameters can do."""
        ...

    def evaluate(self, params: Params) -> dict[str, float]:
        """Scores the final parameters on held-out data."""
        ...

    def export(self, params: Params, folder: Any) -> None:
        """Writes the parameters in the format that inference loads."""
        ...
