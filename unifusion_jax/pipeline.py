"""Prompts and images in, images out: the only inference path, which the CLI, previews and evaluations share."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx
from jaxtyping import Array, Float

from unifusion_jax import autoencoders, encoders, exported, weights
from unifusion_jax.autoencoders import Autoencoder
from unifusion_jax.conditioning import Selection
from unifusion_jax.config import from_mapping
from unifusion_jax.dit import Condition as DiTCondition
from unifusion_jax.encoders import Encoder
from unifusion_jax.encoders.batch import LayerStates
from unifusion_jax.flow import SamplingConfig, guided, integrate
from unifusion_jax.images import to_pil
from unifusion_jax.model import ModelConfig, UniFusionModel
from unifusion_jax.prompt import Prompt
from unifusion_jax.training.checkpoints import Checkpoints
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.phases import config_at
from unifusion_jax.training.rng import stream_key
from unifusion_jax.verifi import SYSTEM_PROMPTS, task_of

BUNDLED_CHECKPOINT = "bundled:demo/unifusion"
# Condition lengths are padded to a multiple of this, so that few sizes are compiled.
_CONDITION_STEP_TOKENS = 16
_LATENTS = "latent channels (autoencoder.path, dit.latent_channels)"


@dataclasses.dataclass(frozen=True)
class Condition:
    """What the DiT is told.

    Attributes:
      texts: the description each row was conditioned on, as decoded or as given.
      states: layer states of image tokens and text tokens.
    """

    texts: list[str]
    states: LayerStates


class UniFusion:
    """A frozen encoder, a frozen autoencoder and the trained stack between them.

    Attributes:
      encoder: the vision-language model.
      autoencoder: images to latents and back.
      config: the training configuration of the checkpoint.
      model_config: sizes of the trained stack.
      params: its parameters, a pure nested dict.
    """

    def __init__(
        self,
        encoder: Encoder,
        autoencoder: Autoencoder,
        config: TrainConfig,
        model_config: ModelConfig,
        params: weights.Params,
    ):
        check_fit(encoder, autoencoder, model_config)
        self.encoder, self.autoencoder = encoder, autoencoder
        self.config, self.model_config, self.params = config, model_config, params
        self._sample = jax.jit(
            functools.partial(_sample, _graphdef(model_config), autoencoder), static_argnames=("sampling", "cells")
        )

    @classmethod
    def load(cls, checkpoint: str | os.PathLike[str] | None = None) -> "UniFusion":
        """Loads a model and the encoder and autoencoder its config names.

        Args:
          checkpoint: an exported folder, a training workdir (its newest checkpoint, averaged weights), or None for the demo
            that comes with the package.

        Raises:
          FileNotFoundError: something is not there.
          ValueError: weights or configs do not fit together.
        """
        folder = weights.resolve(BUNDLED_CHECKPOINT if checkpoint is None else checkpoint)
        if (folder / "checkpoints").is_dir():
            config = from_mapping(TrainConfig, weights.read_json(folder / "config.json"), f"{folder}/config.json")
            checkpoints = Checkpoints(folder)
            config = config_at(config, checkpoints.latest_step() or 0)
            encoder, autoencoder = load_frozen(config)
            model_config = model_config_of(config, encoder.config)
            params = checkpoints.restore_inference(exported.abstract_params(model_config))
            checkpoints.close()
        else:
            config, model_config = exported.read_configs(folder)
            params = exported.read_params(folder, model_config)
            encoder, autoencoder = load_frozen(config)
        return cls(encoder, autoencoder, config, model_config, params)

    def with_params(self, params: weights.Params) -> "UniFusion":
        """Returns the same model with other weights; what is compiled stays compiled."""
        other = object.__new__(type(self))
        other.__dict__ = self.__dict__ | {"params": params}
        return other

    def module(self) -> UniFusionModel:
        """Returns the trained stack as a module, to look into."""
        return nnx.merge(_graphdef(self.model_config), self.params)

    @property
    def multiple_of_px(self) -> int:
        """Sides of generated pictures are multiples of this."""
        return self.autoencoder.downsample * self.model_config.dit.patch_size

    def condition(
        self,
        prompts: Sequence[Prompt | str],
        *,
        rewrite: bool | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
        max_tiles: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Condition:
        """Encodes prompts; with `rewrite` the encoder first decodes a description of the picture (VERIFI).

        Prompts that carry a target are encoded with it as it is. Without `rewrite` the user's own words condition.

        Args:
          prompts: a str is short for `Prompt(str)`.
          rewrite: as above; None does as the model was trained (`encoder.verifi`).
          system_prompt: replaces the task's system message.
          max_new_tokens: longest description; what the checkpoint was trained with when None.
          max_tiles: bound of each picture's tile grid; what the checkpoint was trained with when None.
          temperature: of decoding; 0 is greedy.
          seed: of decoding.
        """
        asked = [self._with_system(Prompt(p) if isinstance(p, str) else p, system_prompt) for p in prompts]
        if not asked:
            raise ValueError("No prompts were given.")
        rewrite = self.config.encoder.verifi if rewrite is None else rewrite
        tiles = self.config.data.tiles_per_image if max_tiles is None else max_tiles
        if rewrite and all(prompt.target is None for prompt in asked):
            limit = max_new_tokens or _longest_target(self.config)
            written = self.encoder.rewrite(
                asked, max_new_tokens=limit, max_tiles=tiles, temperature=temperature, seed=seed
            )
            return Condition(written.texts, written.states)
        if rewrite:
            asked = [
                prompt if prompt.target is not None else self._decoded(prompt, max_new_tokens, temperature, seed)
                for prompt in asked
            ]
        batch = self.encoder.prepare(asked, max_tiles=tiles)
        texts = [prompt.instruction if prompt.target is None else prompt.target for prompt in asked]
        return Condition(texts, self.encoder.export(batch))

    def generate(
        self,
        prompts: Sequence[Prompt | str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int = 30,
        guidance: float = 3.0,
        size: int | tuple[int, int] | None = None,
        rewrite: bool | None = None,
        system_prompt: str | None = None,
        solver: str = "euler",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> list[PIL.Image.Image]:
        """Generates one picture for each prompt.

        Args:
          prompts: strings, or `Prompt`s with reference images.
          seed: of the initial noise. One number gives row i the seed `seed + i`, so any picture can be made again alone.
          steps: solver steps.
          guidance: classifier-free guidance scale; 1 is off.
          size: side in px, or (width, height); the training size when None.
          rewrite: the encoder describes the picture first (VERIFI); False conditions on the user's own words; None does as
            the model was trained.
          system_prompt: replaces the task's system message.
          solver: "euler" or "heun".
          guidance_interval: times between which guidance acts.

        Raises:
          ValueError: no prompts, a size that the model cannot make, or settings out of range.
        """
        sampling = SamplingConfig(steps, solver, guidance, guidance_interval)
        self.check_size(size)
        condition = self.condition(prompts, rewrite=rewrite, system_prompt=system_prompt)
        return self.sample(condition, seed=seed, size=size, sampling=sampling)

    def sample(
        self,
        condition: Condition,
        *,
        seed: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        sampling: SamplingConfig,
    ) -> list[PIL.Image.Image]:
        """Generates pictures from an encoded condition; see `generate`.

        The steps are moved towards noise for the picture's size as in training, on top of `sampling.shift`.
        """
        width, height = self.check_size(size)
        cells = (height // self.autoencoder.downsample, width // self.autoencoder.downsample)
        shift = sampling.shift * self.config.flow.shift_for(cells[0] * cells[1])
        sampling = dataclasses.replace(sampling, shift=shift)
        states = _padded(condition.states)
        count = states.mask.shape[0]
        seeds = [seed + row for row in range(count)] if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise ValueError(f"Got {len(seeds)} seeds for {count} prompts; give one seed, or one a prompt.")
        keys = jnp.stack([stream_key(value, "noise") for value in seeds])
        images = self._sample(self.params, self.autoencoder.params, states, keys, sampling=sampling, cells=cells)
        return to_pil(images)

    def _with_system(self, prompt: Prompt, system_prompt: str | None) -> Prompt:
        if prompt.system is not None:
            return prompt
        prompts = SYSTEM_PROMPTS[self.config.encoder.system_prompts]
        task = "reconstruction" if prompt.target == "" else task_of(len(prompt.images))
        return dataclasses.replace(prompt, system=prompts.of(task) if system_prompt is None else system_prompt)

    def _decoded(self, prompt: Prompt, max_new_tokens: int | None, temperature: float, seed: int) -> Prompt:
        one = self.condition([prompt], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return dataclasses.replace(prompt, target=one.texts[0])

    def check_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Returns (width, height) in px. Raises ValueError for a size that the model cannot make."""
        if size is None:
            return self.config.data.size_px, self.config.data.size_px
        width, height = (size, size) if isinstance(size, int) else size
        unit = self.multiple_of_px
        if width < unit or height < unit or width % unit or height % unit:
            nearest = tuple(max(unit, round(side / unit) * unit) for side in (width, height))
            raise ValueError(
                f"Pictures have sides that are multiples of {unit} px, got {width}x{height}. The nearest is "
                f"{nearest[0]}x{nearest[1]}."
            )
        return width, height


def load_frozen(config: TrainConfig, mesh: Any = None) -> tuple[Encoder, Autoencoder]:
    """Loads the encoder and the autoencoder that a config names.

    Raises:
      ValueError: something does not fit together, told from the networks' configs before any weights are read.
    """
    chosen = config.encoder
    sizes = encoders.read_config(chosen.path)
    model_config_of(config, sizes)
    channels = autoencoders.read_config(config.autoencoder.path).latent_channels
    _check_equal(_LATENTS, channels, config.dit.latent_channels)
    if not sizes.decodes and chosen.verifi:
        raise ValueError(
            f"encoder.verifi=True needs an encoder that decodes text, but {chosen.path} only reads it: set "
            "encoder.verifi=False."
        )
    if not sizes.decodes and chosen.system_prompts != "none":
        raise ValueError(
            f"{chosen.path} has no system turn, but encoder.system_prompts={chosen.system_prompts!r}: set 'none'."
        )
    selection = _selection(config, sizes)
    encoder = encoders.load(
        chosen.path,
        layers=selection.layers,
        form=selection.form,
        dtype=chosen.dtype,
        mesh=mesh,
        quantize=chosen.quantize,
    )
    return encoder, autoencoders.load(config.autoencoder.path, dtype=config.autoencoder.dtype, mesh=mesh)


def _selection(config: TrainConfig, sizes: Any) -> Selection:
    return config.conditioning.select(config.encoder.layers, sizes.num_layers, config.dit.num_layers)


def model_config_of(config: TrainConfig, sizes: Any) -> ModelConfig:
    """Returns the sizes that a training config implies for an encoder of these (`Encoder.config`).

    Raises ValueError, naming the dimension and what would fit, where the strategy cannot connect encoder and DiT.
    """
    selection = _selection(config, sizes)
    return ModelConfig(
        len(selection.layers),
        encoders.exported_size(sizes, selection.form),
        config.conditioning,
        config.dit,
        sizes.key_value_shape[0] if selection.form == "key_values" else 0,
    )


@functools.cache
def _graphdef(config: ModelConfig) -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: UniFusionModel(config, rngs=nnx.Rngs(0))))


def _sample(
    graphdef: Any,
    autoencoder: Autoencoder,
    params: weights.Params,
    autoencoder_params: weights.Params,
    states: LayerStates,
    keys: Any,
    *,
    sampling: SamplingConfig,
    cells: tuple[int, int],
) -> Float[Array, "B h w 3"]:
    """Condition, the whole solver loop and the decoder as one compiled function."""
    model: UniFusionModel = nnx.merge(graphdef, params)
    told = model.condition(jnp.asarray(states.states, jnp.float32), jnp.asarray(states.mask))

    def velocity(condition: DiTCondition) -> Any:
        return lambda x, t: model.velocity(x, t, condition)

    shape = (*cells, model.config.dit.latent_channels)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
    latents = integrate(guided(velocity(told), velocity(model.null_condition(told)), sampling), noise, sampling)
    return autoencoder.decode_fn(autoencoder_params, latents)


def _padded(states: LayerStates) -> LayerStates:
    missing = -states.mask.shape[1] % _CONDITION_STEP_TOKENS
    return jax.tree.map(
        lambda leaf: np.pad(np.asarray(leaf), [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2)), states
    )


def _longest_target(config: TrainConfig) -> int:
    budget = config.data.budgets.get("text_to_image")
    return int(budget["max_kept_tokens"]) if budget else 256


def check_fit(encoder: Encoder, autoencoder: Autoencoder, model: ModelConfig) -> None:
    """Raises ValueError naming the dimension in which frozen and trained parts disagree."""
    pairs = (
        ("exported layers (encoder.layers)", len(encoder.layers), model.num_layers),
        ("encoder width (encoder.path)", encoder.exported_size, model.encoder_size),
        (_LATENTS, autoencoder.latent_channels, model.dit.latent_channels),
    )
    for name, got, expected in pairs:
        _check_equal(name, got, expected)


def _check_equal(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"The frozen networks do not fit the model: {name} is {got}, the model takes {expected}.")
