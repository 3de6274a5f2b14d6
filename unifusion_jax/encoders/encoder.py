"""The frozen encoder as its users see it: prompts in, states of chosen layers out."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from unifusion_jax import weights
from unifusion_jax.encoders import decoding, folder
from unifusion_jax.encoders.batch import EncoderBatch, LayerStates
from unifusion_jax.encoders.decoder_config import check_layers
from unifusion_jax.encoders.forms import Form, exported_size, formed, sources
from unifusion_jax.encoders.internvl import InternVLConfig
from unifusion_jax.encoders.lm_loss import next_token_loss
from unifusion_jax.encoders.processor import Processor
from unifusion_jax.encoders.tiling import TilingConfig
from unifusion_jax.layers import ShapesOnly
from unifusion_jax.parallel.sharding import batch_sharding
from unifusion_jax.prompt import Prompt

# Prompts are padded to a multiple of this before decoding, so that few lengths are compiled.
_PROMPT_STEP_TOKENS = 32


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Every third layer, 1, 4, 7, ... (section 3.1 of the paper)."""
    return tuple(range(1, num_layers + 1, 3))


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """Answers to a batch of prompts.

    Attributes:
      texts: the decoded descriptions.
      token_ids: their tokens, the closing one left out.
      states: of image tokens and decoded tokens, as `Encoder.export` would give for the finished text.
      finished: whether each description ended by itself; False where `max_new_tokens` cut it off.
    """

    texts: list[str]
    token_ids: list[list[int]]
    states: LayerStates
    finished: list[bool]


class Encoder:
    """A frozen language model, with or without vision, and its processor.

    Attributes:
      config: sizes of the model.
      params: pure nested dict of arrays.
      layers: the layers that `export` and `rewrite` give, in order.
      form: what they give of these layers. "states": the residual stream. "final_norm": the same after the model's final
        norm. "key_values": the attention's keys of all key-value heads, before the rotation, then its values.
    """

    def __init__(
        self,
        config: Any,
        params: weights.Params,
        processor: Processor | Callable[[], Processor],
        *,
        layers: Sequence[int] | None = None,
        form: Form = "states",
        mesh: Mesh | None = None,
    ):
        self.config = config
        self.params = params
        self.layers = check_layers(default_layers(config.num_layers) if layers is None else layers, config.num_layers)
        self.form: Form = form
        if form == "key_values" and 0 in self.layers:
            raise ValueError(f"Layer 0, the embeddings, has no keys and values; got layers {self.layers}.")
        self._processor = processor
        self._mesh = mesh

    @property
    def exported_size(self) -> int:
        """Length of what is exported of one layer of one token."""
        return exported_size(self.config, self.form)

    @classmethod
    def create(
        cls,
        config: InternVLConfig,
        tokenizer: Any,
        seed: int = 0,
        *,
        tiling: TilingConfig | None = None,
        system: str = "",
        layers: Sequence[int] | None = None,
        dtype: str = "float32",
    ) -> "Encoder":
        """Makes an encoder with random weights, for training from scratch.

        Args:
          config: sizes; the vocabulary must hold the tokenizer's.
          tokenizer: transformers tokenizer with InternVL's control tokens, e.g. from `train_tokenizer`.
          seed: of the weights.
          tiling: how images are cut; up to 12 tiles of the tower's size by default.
          system: default system message.
          layers: exported layers; every third by default.
          dtype: of the parameters.
        """
        if len(tokenizer) > config.decoder.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, the model rows for {config.decoder.vocab_size}: raise "
                "vocab_size."
            )

        @jax.jit  # the key is an argument: XLA would spend its time folding the weights of a constant one
        def initialise(key: jax.Array) -> weights.Params:
            model = config.build(param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(key))
            return nnx.to_pure_dict(nnx.state(model, nnx.Param))

        tiling = tiling or TilingConfig(tile_px=config.vision.image_px)
        processor = Processor(tokenizer, tiling, config.tokens_per_tile, config.decoder.max_positions, system)
        return cls(config, initialise(jax.random.key(seed)), processor, layers=layers)

    @property
    def processor(self) -> Processor:
        """Tokenizer, tiling and chat template, without arrays; read from the folder when first needed."""
        if not isinstance(self._processor, Processor):
            self._processor = self._processor()
        return self._processor

    def with_params(self, params: weights.Params) -> "Encoder":
        """Returns this encoder with other parameters of the same shapes."""
        return Encoder(self.config, params, self._processor, layers=self.layers, form=self.form, mesh=self._mesh)

    def module(self, params: weights.Params) -> Any:
        """Rebuilds the network around a parameter tree; works under jit and grad."""
        return _rebuild(self.config, params)

    def prepare(
        self, prompts: Sequence[Prompt], *, max_tokens: int | None = None, max_tiles: int | None = None
    ) -> EncoderBatch:
        """Renders prompts to a numpy batch.

        Args:
          prompts: at least one.
          max_tokens: S, to which rows are padded; the longest row's length when None.
          max_tiles: bound of each image's tile grid, its thumbnail not counted; the model's own (12) when None.

        Raises:
          ValueError: a prompt longer than `max_tokens`; nothing is ever cut off.
        """
        return self.processor.prepare(prompts, max_tokens=max_tokens, max_tiles=max_tiles)

    def layer_states(self, batch: EncoderBatch, *, layers: Sequence[int] | None = None) -> Float[Array, "B S N H"]:
        """Returns the states of all tokens after each of `layers` (this encoder's by default); padding is noise."""
        chosen = self.layers if layers is None else check_layers(layers, self.config.num_layers)
        return _layer_states(self.params, self._placed(batch), config=self.config, layers=chosen)

    def export(self, batch: EncoderBatch, *, max_kept: int | None = None) -> LayerStates:
        """Returns the states of kept tokens, moved together.

        Args:
          batch: from `prepare` or `EncoderBatch.from_tokens`.
          max_kept: C; the largest number of kept tokens of a row when None.

        Raises:
          ValueError: a row keeps more than `max_kept` tokens.
        """
        needed = batch.max_kept()
        if max_kept is not None and max_kept < needed:
            raise ValueError(
                f"A row keeps {needed} tokens, room is for max_kept={max_kept}. Raise it or lower max_tiles."
            )
        return _export_jit(self.params, self._placed(batch), **self._what, max_kept=max_kept or needed)

    def export_fn(self, params: weights.Params, batch: EncoderBatch, max_kept: int) -> LayerStates:
        """The pure function behind `export`, for use inside other jitted functions.

        `max_kept` is static and not checked: tokens beyond it are dropped. Check `EncoderBatch.max_kept` on the host.
        """
        return _export(params, batch, **self._what, max_kept=max_kept)

    def loss_fn(
        self, params: weights.Params, batch: EncoderBatch, *, remat: Any = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Pure next-token loss and metrics, see `lm_loss.next_token_loss`."""
        return next_token_loss(self.module(params), batch, remat=remat)

    def rewrite(
        self,
        prompts: Sequence[Prompt],
        *,
        system_prompt: str | None = None,
        max_new_tokens: int,
        max_tiles: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> Rewrite:
        """Decodes a description for each prompt and returns it with its states, all in one pass (VERIFI).

        Args:
          prompts: their targets are ignored.
          system_prompt: system message of prompts that give none; the encoder's default when None.
          max_new_tokens: longest description.
          max_tiles: as in `prepare`.
          temperature: 0 decodes greedily.
          top_p: draws from the fewest tokens that together have this probability; 1 draws from all.
          seed: of the sampling, one for all rows or one a row. A row's text depends on its prompt and its seed, not on
            other rows.

        Raises:
          ValueError: prompt and description together exceed the decoder's positions, or the encoder has no decoder.
        """
        self._check_decoding(max_new_tokens, temperature, top_p)
        processor = self.processor
        rows = [processor.prepare_row(_question(prompt, system_prompt), max_tiles=max_tiles) for prompt in prompts]
        batch = processor.collate(rows, max_tokens=self._prompt_tokens(rows, max_new_tokens))
        seeds = [seed] * len(rows) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(rows):
            raise ValueError(f"Got {len(seeds)} seeds for {len(rows)} prompts; give one seed, or one a prompt.")
        decoded = _decode(
            self.params,
            self._placed(batch),
            decoding.Drawing(
                jnp.stack([jax.random.key(value) for value in seeds]), jnp.float32(temperature), jnp.float32(top_p)
            ),
            np.asarray(processor.stop_ids, np.int32),
            **self._what,
            image_tokens=int(batch.is_image.sum(axis=1).max()),
            max_new_tokens=max_new_tokens,
        )
        lengths = np.asarray(decoded.lengths)
        token_ids = [ids[:length].tolist() for ids, length in zip(np.asarray(decoded.token_ids), lengths, strict=True)]
        kept = max(1, int((lengths + batch.is_image.sum(axis=1)).max()))
        return Rewrite(
            [processor.decode(ids) for ids in token_ids],
            token_ids,
            # On the host: on the device, each number of tokens would be another compilation.
            jax.tree.map(lambda leaf: np.asarray(leaf)[:, :kept], decoded.states),
            np.asarray(decoded.finished).tolist(),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder in the transformers layout, which `load` and InternVLForConditionalGeneration read.

        Raises ValueError for models other than InternVL.
        """
        if not isinstance(self.config, InternVLConfig):
            raise ValueError("Only InternVL models can be written; other published encoders are read only.")
        folder.write(Path(path), self.config, self.params, self.processor)

    @property
    def _what(self) -> dict[str, Any]:
        return {"config": self.config, "layers": self.layers, "form": self.form}

    def _check_decoding(self, max_new_tokens: int, temperature: float, top_p: float) -> None:
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(
                f"Expected max_new_tokens >= 1 and temperature >= 0, got {max_new_tokens} and {temperature}."
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is a probability in (0, 1], got {top_p}; 1 draws from all tokens.")
        if not self.config.decodes:
            raise ValueError(
                "This encoder has no decoder (T5 only reads), so it cannot rewrite. Export its states instead."
            )

    def _prompt_tokens(self, rows: Sequence[Any], max_new_tokens: int) -> int:
        longest = max(len(row.token_ids) for row in rows)
        limit = self.config.max_positions - max_new_tokens
        if longest > limit:
            raise ValueError(
                f"A prompt of {longest} tokens leaves no room for max_new_tokens={max_new_tokens} within the decoder's "
                f"{self.config.max_positions} positions. Shorten the prompt, lower max_tiles or max_new_tokens."
            )
        return min(-(-longest // _PROMPT_STEP_TOKENS) * _PROMPT_STEP_TOKENS, limit)

    def _placed(self, batch: EncoderBatch) -> EncoderBatch:
        """Spreads a batch over the mesh where its rows divide evenly; else it is copied to every device."""
        length = batch.token_ids.shape[1]
        if length > self.config.max_positions:
            raise ValueError(
                f"The batch has {length} tokens a row, the decoder takes {self.config.max_positions}. Shorten its prompts."
            )
        if self._mesh is None:
            return batch
        sharding = batch_sharding(self._mesh)
        ways = int(np.prod([self._mesh.shape[axis] for axis in sharding.spec[0]]))
        return jax.device_put(batch, sharding) if batch.token_ids.shape[0] % ways == 0 else batch


def _question(prompt: Prompt, system_prompt: str | None) -> Prompt:
    """Returns the prompt without its target, with `system_prompt` where it has no system message of its own."""
    system = system_prompt if prompt.system is None else prompt.system
    return dataclasses.replace(prompt, target="", system=system)


# The jitted functions stand outside the class and take the configuration as a static argument, so that encoders of one
# configuration (loaded twice, or with other parameters) share what is compiled.


@functools.cache
def _graphdef(config: Any) -> nnx.GraphDef:
    return nnx.split(abstract_model(config, "float32"), nnx.Param, ...)[0]


def _rebuild(config: Any, params: weights.Params) -> Any:
    return nnx.merge(_graphdef(config), params)


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def _layer_states(params: weights.Params, batch: EncoderBatch, *, config: Any, layers: tuple[int, ...]) -> jax.Array:
    model = _rebuild(config, params)
    return model.states(batch, layers)


def _export(
    params: weights.Params, batch: EncoderBatch, *, config: Any, layers: tuple[int, ...], form: Form, max_kept: int
) -> LayerStates:
    model = _rebuild(config, params)
    mask, is_image = jnp.asarray(batch.mask), jnp.asarray(batch.is_image)
    index, exists = decoding.compact_index(jnp.asarray(batch.keep) & mask, max_kept)
    states = model.states(batch, sources(layers, form), keep_index=index)
    states = jnp.where(exists[:, :, None, None], states, 0)
    kept = LayerStates(states, exists, jnp.take_along_axis(is_image, index, axis=1) & exists)
    return formed(model, kept, layers, form)


_export_jit = jax.jit(_export, static_argnames=("config", "layers", "form", "max_kept"))


@functools.partial(jax.jit, static_argnames=("config", "layers", "form", "image_tokens", "max_new_tokens"))
def _decode(
    params: weights.Params, *arguments: Any, config: Any, layers: tuple[int, ...], form: Form, **options: Any
) -> decoding.Decoded:
    model = _rebuild(config, params)
    decoded = decoding.decode(model, *arguments, layers=sources(layers, form), **options)
    return dataclasses.replace(decoded, states=formed(model, decoded.states, layers, form))


def abstract_model(config: Any, dtype: str) -> Any:
    """Returns the network with shapes in the place of parameters; costs no memory at any size."""
    return nnx.eval_shape(lambda: config.build(param_dtype=jnp.dtype(dtype), rngs=ShapesOnly()))
