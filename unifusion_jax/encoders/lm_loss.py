"""Next-token loss on the assistant's answers, for training an encoder from scratch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unifusion_jax import layers as nn
from unifusion_jax.encoders.batch import EncoderBatch
from unifusion_jax.encoders.model import LanguageModel


def next_token_loss(
    model: LanguageModel, batch: EncoderBatch, *, remat: nn.Remat | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy of the target tokens, the closing one included, given all tokens before each.

    Args:
      model: encoder with an output head.
      batch: prepared from prompts with a target; `is_target` tells which tokens count.
      remat: wraps the scanned blocks, e.g. `jax.checkpoint`.

    Returns:
      The loss in nats per target token, and metrics: `token_accuracy` (share of target tokens that are the most likely
      one), `target_tokens` (their number; with none the loss is 0).

    Raises:
      ValueError: when the batch marks no targets.
    """
    if batch.is_target is None:
        raise ValueError("The batch has no is_target marks. Prepare it from prompts that have a target.")
    mask = jnp.asarray(batch.mask)
    hidden = model.states(batch, (model.decoder.config.num_layers,), remat=remat)[:, :, 0]
    logits = model.decoder.logits(hidden[:, :-1])
    labels = jnp.asarray(batch.token_ids)[:, 1:]
    weights = (jnp.asarray(batch.is_target) & mask)[:, 1:].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[:, :, None], axis=-1)[:, :, 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    count = jnp.sum(weights)
    safe_count = jnp.maximum(count, 1.0)
    hits = (chosen >= jnp.max(logits, axis=-1)).astype(jnp.float32)  # an argmax would cost several times the maximum
    metrics = {"token_accuracy": jnp.sum(hits * weights) / safe_count, "target_tokens": count}
    return jnp.sum(losses * weights) / safe_count, metrics
