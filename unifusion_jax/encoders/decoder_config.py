"""Sizes and switches of the causal decoder, and the frequencies of its rotary positions."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Frequency scaling of Gemma 3: all frequencies divided by `factor`."""

    factor: float

    def __call__(self, frequencies: Float[np.ndarray, "half"]) -> Float[np.ndarray, "half"]:
        """Returns the scaled frequencies."""
        return (frequencies / self.factor).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Frequency scaling of Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.

    Source: `apply_scaling` of meta-llama/llama-models.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __call__(self, frequencies: Float[np.ndarray, "half"]) -> Float[np.ndarray, "half"]:
        """Returns the scaled frequencies."""
        turns = self.original_max_positions * frequencies / (2 * np.pi)
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(ramp, 0.0, 1.0)
        return ((1 - kept) * frequencies / self.factor + kept * frequencies).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder.

    Attributes:
      vocab_size: rows of the embedding table.
      hidden_size: width H.
      num_layers: blocks.
      num_heads: query heads A.
      num_kv_heads: key-value heads G, a divisor of A.
      head_dim: E, even; A * E need not equal H.
      ffn_size: inner width of the gated feed-forward layer.
      max_positions: longest sequence in tokens.
      rms_eps: of all norms.
      norm_offset: 0, or 1 for norms that multiply by 1 + scale.
      rope_theta: base of the rotary frequencies.
      rope_scaling: changes those frequencies.
      sliding_layers: a flag a layer, True where a query sees the last `window_tokens` tokens only; () for none.
      window_tokens: keys that a query of a sliding layer sees, its own included.
      sliding_rope_theta: rotary base of the sliding layers, never scaled; as in the other layers when None.
      mrope_section: how many rotary pairs turn by the time, row and column position (M-RoPE of Qwen2-VL, arXiv
        2409.12191); () where all turn by one position.
      attention_bias: biases on the q, k and v maps.
      output_bias: a bias on the attention's output map.
      qk_norm: RMS norm of each query and key head before the rotation.
      attention_scale: factor on the attention scores; head_dim**-0.5 when None.
      post_norms: RMS norms on what attention and feed-forward layer add to the stream, too.
      activation: of the gate.
      embedding_scale: factor on token embeddings, rounded to the type of the table.
      tie_embeddings: logits use the embedding table, without that factor.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int = 32768
    rms_eps: float = 1e-6
    norm_offset: float = 0.0
    rope_theta: float = 1e6
    rope_scaling: Llama3Scaling | LinearScaling | None = None
    sliding_layers: tuple[bool, ...] = ()
    window_tokens: int = 0
    sliding_rope_theta: float | None = None
    mrope_section: tuple[int, ...] = ()
    attention_bias: bool = True
    output_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    post_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    tie_embeddings: bool = False

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size", "max_positions")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderConfig.{name} must be positive, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "DecoderConfig.num_heads must be a multiple of num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim must be even for rotary positions, got {self.head_dim}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.activation!r}, expected one of {sorted(ACTIVATIONS)}.")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"DecoderConfig.sliding_layers needs a flag for each of the {self.num_layers} layers, got "
                f"{len(self.sliding_layers)}."
            )
        if self.slides and self.window_tokens < 1:
            raise ValueError(f"DecoderConfig.window_tokens must be positive, got {self.window_tokens}.")
        if self.mrope_section and (len(self.mrope_section) != 3 or sum(self.mrope_section) != self.head_dim // 2):
            raise ValueError(
                "DecoderConfig.mrope_section must be three numbers that sum up to head_dim / 2 = "
                f"{self.head_dim // 2}, got {self.mrope_section}."
            )

    @property
    def key_value_shape(self) -> tuple[int, int]:
        """Key-value heads G and their width E."""
        return self.num_kv_heads, self.head_dim

    @property
    def slides(self) -> bool:
        """Whether any layer has a sliding window."""
        return any(self.sliding_layers)

    @property
    def sliding(self) -> Bool[np.ndarray, "layers"]:
        """Which layers have a sliding window."""
        return np.array(self.sliding_layers or (False,) * self.num_layers)

    @property
    def rope_axis(self) -> Int[np.ndarray, "half"]:
        """Which of the three position rows turns each rotary pair; all zero without M-RoPE."""
        return np.repeat(np.arange(3), self.mrope_section) if self.mrope_section else np.zeros(self.head_dim // 2, int)

    def rope_frequencies(self, *, sliding: bool = False) -> Float[np.ndarray, "half"]:
        """Radians per position of each rotary pair of the sliding or the other layers, float32, (head_dim / 2,)."""
        own_base = sliding and self.sliding_rope_theta is not None
        theta = self.sliding_rope_theta if own_base else self.rope_theta
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        frequencies = 1.0 / np.float32(theta) ** exponents
        return frequencies if own_base or self.rope_scaling is None else self.rope_scaling(frequencies)

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Returns `layers` as a tuple; raises ValueError unless they are distinct and within 0 .. num_layers."""
        return check_layers(layers, self.num_layers)


def check_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Returns `layers` as a tuple; raises ValueError unless they are distinct and within 0 .. num_layers."""
    layers = tuple(int(layer) for layer in layers)
    wrong = [layer for layer in layers if not 0 <= layer <= num_layers]
    if wrong or not layers or len(set(layers)) != len(layers):
        raise ValueError(
            f"Layers must be distinct numbers from 0 (the embeddings) to {num_layers} (the last block), at least one, "
            f"got {layers}."
        )
    return layers
