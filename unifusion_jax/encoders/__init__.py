"""Frozen vision-language encoders: prompts in, states of chosen layers out."""

from unifusion_jax.encoders.batch import EncoderBatch, LayerStates
from unifusion_jax.encoders.encoder import Encoder, Rewrite, default_layers
from unifusion_jax.encoders.forms import Form, exported_size
from unifusion_jax.encoders.internvl import InternVL, InternVLConfig
from unifusion_jax.encoders.lm_loss import next_token_loss
from unifusion_jax.encoders.loading import load, read_config
from unifusion_jax.encoders.processor import Processor, Row
from unifusion_jax.encoders.tiling import TilingConfig
from unifusion_jax.encoders.tokenizer import train_tokenizer
from unifusion_jax.prompt import Prompt

__all__ = [
    "Encoder",
    "EncoderBatch",
    "Form",
    "InternVL",
    "InternVLConfig",
    "LayerStates",
    "Processor",
    "Prompt",
    "Rewrite",
    "Row",
    "TilingConfig",
    "default_layers",
    "exported_size",
    "load",
    "next_token_loss",
    "read_config",
    "train_tokenizer",
]
