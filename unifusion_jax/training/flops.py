"""Model FLOPs: what the mathematics of a training step needs, counted in one place for MFU and planning.

A multiply-add counts as two. Attention counts the full S x S square, since the DiT is bidirectional. The backward pass counts
as twice the forward; recomputation (remat) and the frozen networks are not model FLOPs of the trained stack and are left out.
"""

import math
from typing import Any

from unifusion_jax.conditioning import LAPConfig
from unifusion_jax.data.mixture import Mixture
from unifusion_jax.model import ModelConfig


def block_flops(tokens: int, width: int, ffn_size: int, *, context: int | None = None) -> float:
    """Forward FLOPs of one transformer block over `tokens` tokens that attend to `context` tokens each."""
    projections = 2 * tokens * (4 * width * width + 3 * width * ffn_size)
    return projections + 4 * tokens * (context or tokens) * width


def lap_flops(lap: LAPConfig, tokens: int) -> float:
    """Forward FLOPs of one LAP over `tokens` tokens: blocks over N layers of each, then the pooling map."""
    blocks = block_flops(tokens * lap.num_layers, lap.encoder_size, lap.ffn_size, context=lap.num_layers)
    return lap.num_blocks * blocks + 2 * tokens * lap.num_layers * lap.encoder_size


def refiner_flops(model: ModelConfig, tokens: int) -> float:
    """Forward FLOPs of the refiner for `tokens` condition tokens."""
    if not model.conditioning.refines:
        return 0.0
    refiner = model.conditioning.refiner(model.encoder_size, model.dit.hidden_size)
    sequences = model.num_layers if model.conditioning.refiner_position == "before_lap" else 1
    return refiner.num_blocks * sequences * block_flops(tokens, refiner.hidden_size, refiner.ffn_size)


def condition_flops(model: ModelConfig, tokens: int) -> float:
    """Forward FLOPs of the conditioning, LAP, projections and refiner, for `tokens` condition tokens."""
    conditioning, width = model.conditioning, model.dit.hidden_size
    project = 2 * tokens * model.encoder_size * width
    refiner = refiner_flops(model, tokens)
    if conditioning.strategy == "last_layer":
        return project + refiner
    if conditioning.strategy in (
        "hidden_state_injection",
        "kv_fusion",
    ):  # a layer's keys and values are its size together
        return refiner + (model.num_layers * project if conditioning.learned_maps else 0.0)
    laps = model.dit.num_layers if conditioning.strategy == "lap_injection" else 1
    return laps * (lap_flops(conditioning.lap(model.num_layers, model.encoder_size), tokens) + project) + refiner


def dit_flops(model: ModelConfig, condition_tokens: int, latent_tokens: int) -> float:
    """Forward FLOPs of the DiT for one sample. Fused keys are attended to, but are no tokens of the sequence."""
    dit = model.dit
    context = condition_tokens + latent_tokens
    tokens = context if model.conditioning.has_tokens else latent_tokens
    blocks = dit.num_layers * block_flops(tokens, dit.hidden_size, dit.ffn_size, context=context)
    patches = 4 * latent_tokens * dit.latent_channels * dit.patch_size**2 * dit.hidden_size
    modulation = 2 * dit.hidden_size * (dit.time_features + 9 * dit.hidden_size)
    return blocks + patches + modulation


def training_flops(model: ModelConfig, mixture: Mixture, downsample: int, timesteps_per_sample: int) -> float:
    """Forward and backward FLOPs of one training sample, averaged over the mixture's streams."""
    total = 0.0
    for stream in mixture.streams:
        bucket = stream.bucket
        cells = (bucket.height_px // downsample) * (bucket.width_px // downsample)
        latent_tokens = cells // model.dit.patch_size**2
        forward = condition_flops(model, bucket.max_kept_tokens)
        forward += timesteps_per_sample * dit_flops(model, bucket.max_kept_tokens, latent_tokens)
        total += stream.weight * 3 * forward
    return total


def traced_flops(jaxpr: Any) -> float:
    """FLOPs of the products and convolutions of a traced program (`jax.core.Jaxpr`), loops counted as often as they run.

    Unlike the functions above this counts what is executed: recomputation and frozen networks too. Kernels are not looked
    into; trace with XLA's attention.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[out_axis]
        inner = [traced_flops(part) for value in equation.params.values() for part in _programs(value)]
        total += times * (max(inner) if equation.primitive.name == "cond" else sum(inner)) if inner else 0.0
    return total


def _programs(value: Any) -> list[Any]:
    """Returns the programs in a parameter of an equation; rules for derivatives, which are functions, are none."""
    if isinstance(value, tuple | list):
        return [program for part in value for program in _programs(part)]
    inner = getattr(value, "jaxpr", value)
    return [inner] if hasattr(inner, "eqns") else []
