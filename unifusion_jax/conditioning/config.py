"""Which strategy conditions the DiT, which encoder layers it takes, and whether sizes fit together."""

import dataclasses
import difflib
from typing import Literal

from unifusion_jax.conditioning.lap import LAPConfig
from unifusion_jax.conditioning.refiner import RefinerConfig
from unifusion_jax.dit.transformer import DiTConfig

STRATEGIES = ("lap", "last_layer", "kv_fusion", "hidden_state_injection", "lap_injection")
_PAIRED = ("kv_fusion", "hidden_state_injection")
_LEAST_HEAD_DIM = 16  # three rotary axes


@dataclasses.dataclass(frozen=True)
class Selection:
    """What the encoder exports: which layers, and what of them (`encoders.Form`)."""

    layers: tuple[int, ...]
    form: Literal["states", "final_norm", "key_values"]


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """How the encoder's layer states become what the DiT is told (paper, section 2.1).

    Attributes:
      strategy: "lap" (the paper's model) pools layers into the input tokens. "last_layer" takes one layer, see `layer`.
        "kv_fusion" concatenates keys and values of one encoder layer a block to the block's own.
        "hidden_state_injection" adds one encoder layer a block to the condition tokens. "lap_injection" does the same with
        what a LAP of the block's own pools (appendix A.1.1).
      layer: for "last_layer": -1 is the last, with the encoder's final norm, -2 the one before, 0 or more a layer's number.
      layer_start: first of the layers that the LAPs take, unless encoder.layers lists them.
      layer_stride: steps between them; the paper settles on every third.
      learned_maps: for "kv_fusion" and "hidden_state_injection": a learned linear map a block from the encoder's sizes to
        the DiT's, and where the encoder has more layers than the DiT blocks, layers spread evenly. Without it sizes must
        be equal.
      lap_blocks: transformer blocks over the layer axis.
      lap_heads: their attention heads.
      lap_ffn_ratio: their feed-forward width over the encoder's width.
      lap_chunk_tokens: tokens of a sample that a LAP pools at a time, 0 for all: less memory for long conditions, same result.
      layer_embedding: a learned vector per layer at LAP's input.
      refiner_blocks: bidirectional blocks over the input tokens; 0 turns the refiner off. "kv_fusion" puts no tokens into the
        sequence and has none.
      refiner_heads: their attention heads.
      refiner_ffn_ratio: their feed-forward width over the width they work in.
      refiner_position: "after_lap" (paper, section 4) or "before_lap" (section 3), where the refiner sees every layer's
        sequence at the encoder's width. The other strategies with tokens take the same places.
    """

    strategy: str = "lap"
    layer: int = -1
    layer_start: int = 1
    layer_stride: int = 3
    learned_maps: bool = False
    lap_blocks: int = 2
    lap_heads: int = 28
    lap_ffn_ratio: float = 2.0
    lap_chunk_tokens: int = 0
    layer_embedding: bool = True
    refiner_blocks: int = 2
    refiner_heads: int = 32
    refiner_ffn_ratio: float = 2.0
    refiner_position: str = "after_lap"

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            near = difflib.get_close_matches(self.strategy, STRATEGIES, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"conditioning.strategy must be one of {list(STRATEGIES)}, got {self.strategy!r}.{hint}")
        if self.refiner_position not in ("after_lap", "before_lap"):
            raise ValueError(
                f"conditioning.refiner_position must be 'after_lap' or 'before_lap', got {self.refiner_position!r}."
            )
        if self.layer_start < 0 or self.layer_stride < 1:
            raise ValueError(
                "conditioning.layer_start must be 0 or more and layer_stride 1 or more, got "
                f"{self.layer_start} and {self.layer_stride}."
            )
        for name in ("lap_heads", "refiner_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"conditioning.{name} must be 1 or more, got {getattr(self, name)}.")

    @property
    def has_tokens(self) -> bool:
        """Whether the strategy puts tokens into the DiT's input sequence."""
        return self.strategy != "kv_fusion"

    @property
    def refines(self) -> bool:
        """Whether there is a refiner."""
        return self.has_tokens and self.refiner_blocks > 0

    def select(self, listed: tuple[int, ...], num_layers: int, dit_blocks: int) -> Selection:
        """Returns what an encoder of `num_layers` layers has to export.

        Args:
          listed: `encoder.layers`; empty leaves the choice to the strategy.
          num_layers: layers of the encoder.
          dit_blocks: blocks of the DiT.

        Raises:
          ValueError: the encoder has not the layers that the strategy needs; says what would fit.
        """
        wrong = [layer for layer in listed if not 0 <= layer <= num_layers]
        if wrong:
            raise ValueError(f"encoder.layers must be within 0 .. {num_layers}, the encoder's last, got {wrong}.")
        if self.strategy == "last_layer":
            return self._one_layer(listed, num_layers)
        if self.strategy in _PAIRED:
            return self._pairs(listed, num_layers, dit_blocks)
        layers = listed or tuple(range(self.layer_start, num_layers + 1, self.layer_stride))
        if not layers:
            raise ValueError(
                f"conditioning.layer_start={self.layer_start} is beyond the encoder's {num_layers} layers; 1 would fit."
            )
        return Selection(layers, "states")

    def _one_layer(self, listed: tuple[int, ...], num_layers: int) -> Selection:
        layer = self.layer if self.layer >= 0 else num_layers + 1 + self.layer
        if not 0 <= layer <= num_layers:
            raise ValueError(
                f"conditioning.layer={self.layer} is not a layer of the encoder, which has {num_layers}: expected 0 .. "
                f"{num_layers}, or -1 .. -{num_layers + 1} counted from the last."
            )
        if listed and listed != (layer,):
            raise ValueError(
                f"conditioning.strategy='last_layer' takes layer {layer} (conditioning.layer={self.layer}), but encoder.layers "
                f"lists {listed}. Leave encoder.layers empty."
            )
        return Selection((layer,), "final_norm" if layer == num_layers else "states")

    def _pairs(self, listed: tuple[int, ...], num_layers: int, dit_blocks: int) -> Selection:
        form = "key_values" if self.strategy == "kv_fusion" else "states"
        if len(listed) == dit_blocks and not (form == "key_values" and 0 in listed):
            return Selection(listed, form)
        if not listed and num_layers == dit_blocks:
            return Selection(tuple(range(1, num_layers + 1)), form)
        if not listed and self.learned_maps and num_layers > dit_blocks:
            steps = max(1, dit_blocks - 1)
            return Selection(tuple(1 + block * (num_layers - 1) // steps for block in range(dit_blocks)), form)
        got = f"encoder.layers lists {len(listed)}" if listed else f"the encoder has {num_layers}"
        fits = [f"dit.num_layers={len(listed) or num_layers}"]
        if num_layers >= dit_blocks:
            fits.append(f"encoder.layers with {dit_blocks} of 1 .. {num_layers}")
            fits.append("conditioning.learned_maps=True with encoder.layers empty")
        else:
            fits.append(f"an encoder of at least {dit_blocks} layers")
        raise ValueError(
            f"conditioning.strategy={self.strategy!r} pairs every DiT block with an encoder layer from 1 on: dit.num_layers is "
            f"{dit_blocks}, {got}. What would fit: {', or '.join(fits)}."
        )

    def check_sizes(self, num_layers: int, encoder_size: int, kv_heads: int, dit: DiTConfig) -> None:
        """Checks that the strategy can connect an encoder's exports to a DiT.

        Args:
          num_layers: exported layers.
          encoder_size: length of what is exported of a layer.
          kv_heads: key-value heads in it; 0 where states are exported.
          dit: sizes of the DiT.

        Raises:
          ValueError: names the dimension that does not fit, and what would.
        """
        if self.strategy in ("lap", "lap_injection"):
            _check_heads("conditioning.lap_heads", self.lap_heads, "the encoder's width", encoder_size)
        if self.refines:
            where = "dit.hidden_size" if self.refiner_position == "after_lap" else "the encoder's width"
            width = dit.hidden_size if self.refiner_position == "after_lap" else encoder_size
            _check_heads("conditioning.refiner_heads", self.refiner_heads, where, width, least=_LEAST_HEAD_DIM)
        if self.strategy == "last_layer" and num_layers != 1:
            raise ValueError(f"conditioning.strategy='last_layer' takes one exported layer, got {num_layers}.")
        if self.strategy in _PAIRED and num_layers != dit.num_layers:
            raise ValueError(
                f"conditioning.strategy={self.strategy!r} needs an exported layer for each DiT block: dit.num_layers is "
                f"{dit.num_layers}, exported layers are {num_layers}. What would fit: dit.num_layers={num_layers}."
            )
        if self.strategy == "hidden_state_injection" and not self.learned_maps and encoder_size != dit.hidden_size:
            raise ValueError(
                "conditioning.strategy='hidden_state_injection' adds encoder states to the DiT's stream: the encoder's width "
                f"is {encoder_size}, dit.hidden_size is {dit.hidden_size}. What would fit: dit.hidden_size={encoder_size}, an "
                f"encoder of width {dit.hidden_size}, or conditioning.learned_maps=True."
            )
        if self.strategy == "kv_fusion":
            self._check_key_values(encoder_size, kv_heads, dit)

    def _check_key_values(self, encoder_size: int, kv_heads: int, dit: DiTConfig) -> None:
        if kv_heads < 1:
            raise ValueError("conditioning.strategy='kv_fusion' needs an encoder that exports keys and values.")
        head_dim = encoder_size // (2 * kv_heads)
        if self.learned_maps:
            return
        problems = []
        if head_dim != dit.head_dim:
            problems.append(
                f"a head of the encoder has {head_dim} channels, one of the DiT {dit.head_dim}; what would fit: "
                f"dit.num_heads={dit.hidden_size / head_dim:g}"
            )
        if dit.num_heads % kv_heads:
            problems.append(
                f"the encoder has {kv_heads} key-value heads, dit.num_heads is {dit.num_heads}; what would fit: a multiple of "
                f"{kv_heads}"
            )
        if problems:
            raise ValueError(
                f"conditioning.strategy='kv_fusion' joins heads: {'; and '.join(problems)}; or conditioning.learned_maps=True."
            )

    def lap(self, num_layers: int, encoder_size: int) -> LAPConfig:
        """Sizes of LAP for an encoder that exports `num_layers` states of width `encoder_size`."""
        return LAPConfig(
            num_layers,
            encoder_size,
            self.lap_heads,
            _round_to(encoder_size * self.lap_ffn_ratio, 16),
            self.lap_blocks,
            self.layer_embedding,
            self.lap_chunk_tokens,
        )

    def refiner(self, encoder_size: int, model_size: int) -> RefinerConfig:
        """Sizes of the refiner at the width its position implies."""
        width = model_size if self.refiner_position == "after_lap" else encoder_size
        return RefinerConfig(
            width, self.refiner_heads, _round_to(width * self.refiner_ffn_ratio, 16), self.refiner_blocks
        )


def _round_to(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


def _check_heads(name: str, heads: int, of: str, width: int, *, least: int = 1) -> None:
    fitting = [count for count in range(1, width + 1) if width % count == 0 and width // count >= least]
    fitting = [count for count in fitting if least == 1 or (width // count) % 2 == 0]
    if heads not in fitting:
        near = sorted(sorted(fitting, key=lambda count: abs(count - heads))[:4])
        bound = f" into even parts of at least {least} channels" if least > 1 else ""
        raise ValueError(f"{name}={heads} does not divide {of}, {width}{bound}. What would fit: {near}.")
