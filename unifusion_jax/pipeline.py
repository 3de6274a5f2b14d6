"""Prompts and images in, images out: the only inference path, which the CLI, the web page, previews and evaluations share."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from unifusion_jax import exported, modes, sampler, weights
from unifusion_jax.autoencoders import Autoencoder
from unifusion_jax.config import from_mapping
from unifusion_jax.encoders import Encoder
from unifusion_jax.encoders.batch import LayerStates
from unifusion_jax.flow import SamplingConfig
from unifusion_jax.frozen import check_fit, load_frozen, model_config_of
from unifusion_jax.images import to_pil
from unifusion_jax.model import ModelConfig, UniFusionModel
from unifusion_jax.prompt import Prompt
from unifusion_jax.training.checkpoints import Checkpoints
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.phases import config_at
from unifusion_jax.training.rng import stream_key
from unifusion_jax.verifi import SYSTEM_PROMPTS

BUNDLED_CHECKPOINT = "bundled:demo/unifusion"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Condition:
    """What the DiT is told.

    Attributes:
      prompts: the prompts as the encoder was asked, each with the description it was conditioned on as its target. One of
        them, its target edited, can be given to `UniFusion.condition` again.
      states: layer states of image tokens and text tokens.
      first: those of the first steps, where the mode switches from one condition to another; else None.
      finished: whether each description ended by itself; False where it was cut off for its length.
    """

    prompts: list[Prompt]
    states: LayerStates
    first: LayerStates | None = None
    finished: list[bool] = dataclasses.field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """The description each row was conditioned on, as decoded or as given; the user's own words without rewriting."""
        return [prompt.instruction if prompt.target is None else prompt.target for prompt in self.prompts]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a sampling run is: solver steps done and in all, and after the last one the pictures."""

    steps: int
    total_steps: int
    images: list[PIL.Image.Image] | None = None


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
            checkpoints = Checkpoints(folder, read_only=True)
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
        return sampler.module(self.model_config, self.params)

    @property
    def multiple_of_px(self) -> int:
        """Sides of generated pictures are multiples of this."""
        return self.autoencoder.downsample * self.model_config.dit.patch_size

    def condition(
        self,
        prompts: Sequence[Prompt | str],
        *,
        mode: str = modes.AUTO,
        rewrite: bool | None = None,
        system_prompt: str | None = None,
        tiles: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Condition:
        """Encodes prompts; with `rewrite` the encoder first decodes a description of the picture (VERIFI).

        Prompts that carry a target are encoded with it as it is: so a description that was edited is passed back. Without
        `rewrite` the user's own words condition.

        Args:
          prompts: a str is short for `Prompt(str)`.
          mode: one of `modes.MODES`; "auto" takes what a prompt's pictures say.
          rewrite: as above; None does as the model was trained (`encoder.verifi`).
          system_prompt: replaces the task's system message.
          tiles: most tiles that a reference picture is cut into, its thumbnail included (the paper: 1, 5 or 10). By default
            the mode's, or what the checkpoint was trained with.
          max_new_tokens: longest description; what the checkpoint was trained with when None.
          temperature: of decoding; 0 is greedy.
          top_p: of decoding, see `Encoder.rewrite`.
          seed: of decoding.

        Raises:
          ValueError: no prompts, an empty one, another number of pictures than the mode takes, or a prompt that fills the
            encoder's context.
        """
        chosen = modes.find(mode)
        asked, pictures = self._asked(prompts, mode, system_prompt)
        rewrite = self.config.encoder.verifi if rewrite is None else rewrite
        if tiles is None and chosen is not None:
            tiles = chosen.tiles
        max_tiles = self.config.data.tiles_per_image if tiles is None else modes.grid_tiles(tiles)
        first = self._export(pictures, max_tiles) if pictures else None
        written = [row for row, prompt in enumerate(asked) if rewrite and prompt.target is None]
        read = [row for row in range(len(asked)) if row not in set(written)]
        parts, finished = [], [True] * len(asked)
        if written:
            answers = self.encoder.rewrite(
                [asked[row] for row in written],
                max_new_tokens=max_new_tokens or _longest_target(self.config),
                max_tiles=max_tiles,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
            parts.append((written, answers.states))
            for row, text, whole in zip(written, answers.texts, answers.finished, strict=True):
                asked[row], finished[row] = dataclasses.replace(asked[row], target=text), whole
                if not whole:
                    log.warning("The description of prompt %d did not end; it is cut off where room ends.", row)
        if read:
            parts.append((read, self._export([asked[row] for row in read], max_tiles)))
        return Condition(asked, sampler.joined(parts), first, finished)

    def _asked(
        self, prompts: Sequence[Prompt | str], mode: str, system_prompt: str | None
    ) -> tuple[list[Prompt], list[Prompt]]:
        """Returns the prompts as the encoder is asked, and those of the first steps where the mode switches."""
        systems = SYSTEM_PROMPTS[self.config.encoder.system_prompts]
        given = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        if not given:
            raise ValueError("No prompts were given.")
        names = [modes.mode_of(prompt) if mode == modes.AUTO else mode for prompt in given]
        for name, prompt in zip(names, given, strict=True):
            modes.check(name, prompt)
        asked = [modes.shaped(*pair, systems, system_prompt) for pair in zip(names, given, strict=True)]
        switches = mode != modes.AUTO and modes.MODES[mode].switches
        return asked, [modes.pictures_only(prompt, systems) for prompt in given] if switches else []

    def _export(self, prompts: Sequence[Prompt], max_tiles: int) -> LayerStates:
        """Encodes prompts as they are, with lengths rounded up so that few are compiled."""
        processor = self.encoder.processor
        rows = [processor.prepare_row(prompt, max_tiles=max_tiles) for prompt in prompts]
        longest = max(len(row.token_ids) for row in rows)
        room = min(sampler.round_up(longest), max(longest, self.encoder.config.max_positions))
        batch = processor.collate(rows, max_tokens=room)
        return self.encoder.export(batch, max_kept=sampler.round_up(batch.max_kept()))

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
        mode: str = modes.AUTO,
        tiles: int | None = None,
        switch: float = 0.15,
        images_per_prompt: int = 1,
        solver: str = "euler",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> list[PIL.Image.Image]:
        """Generates one picture for each prompt, or several.

        Args:
          prompts: strings, or `Prompt`s with reference images.
          seed: of the initial noise. One number gives row i the seed `seed + i`, so any picture can be made again alone.
          steps: solver steps.
          guidance: classifier-free guidance scale; 1 is off.
          size: side in px, or (width, height); the training size when None.
          rewrite: the encoder describes the picture first (VERIFI); False conditions on the user's own words; None does as
            the model was trained.
          system_prompt: replaces the task's system message.
          mode: one of `modes.MODES`; "auto" takes what a prompt's pictures say.
          tiles: most tiles of a reference picture, see `condition`.
          switch: in the mode "zero_shot_edit", the share of steps under the picture's tokens.
          images_per_prompt: pictures of each prompt, from seeds of their own; a prompt is encoded once. The pictures of the
            first prompt come first.
          solver: "euler" or "heun".
          guidance_interval: times between which guidance acts.

        Raises:
          ValueError: no prompts, a size that the model cannot make, or settings out of range.
        """
        sampling = SamplingConfig(steps, solver, guidance, guidance_interval, switch=switch)
        self.check_size(size)
        condition = self.condition(prompts, mode=mode, rewrite=rewrite, system_prompt=system_prompt, tiles=tiles)
        return self.sample(condition, seed=seed, size=size, sampling=sampling, images_per_prompt=images_per_prompt)

    def sample(
        self,
        condition: Condition,
        *,
        seed: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        sampling: SamplingConfig,
        images_per_prompt: int = 1,
    ) -> list[PIL.Image.Image]:
        """Generates pictures from an encoded condition; see `generate`.

        The steps are moved towards noise for the picture's size as in training, on top of `sampling.shift`.
        """
        options: dict[str, Any] = {"seed": seed, "size": size, "images_per_prompt": images_per_prompt}
        (done,) = self.sample_in_chunks(condition, **options, sampling=sampling, chunk_steps=sampling.steps)
        assert done.images is not None
        return done.images

    def sample_in_chunks(
        self,
        condition: Condition,
        *,
        seed: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        sampling: SamplingConfig,
        images_per_prompt: int = 1,
        chunk_steps: int = 1,
    ) -> Iterator[Progress]:
        """Generates pictures as `sample` does, bit for bit, and tells after every `chunk_steps` steps how far it is.

        Whoever stops asking stops the sampling. Between two chunks the host waits for the device, within one it does not; the
        compiled loop is the same for any length of them.
        """
        if chunk_steps < 1 or images_per_prompt < 1:
            raise ValueError(
                f"Expected chunk_steps and images_per_prompt of at least 1, got {chunk_steps} and {images_per_prompt}."
            )
        width, height = self.check_size(size)
        cells = (height // self.autoencoder.downsample, width // self.autoencoder.downsample)
        sampling = dataclasses.replace(sampling, shift=sampling.shift * self.config.flow.shift_for(cells[0] * cells[1]))
        keys = _noise_keys(seed, len(condition.prompts) * images_per_prompt)
        phases = (condition.states,) if condition.first is None else (condition.first, condition.states)
        tokens = sampler.round_up(max(_longest(states) for states in phases))
        states = tuple(sampler.padded(each, tokens) for each in phases)
        latents, conditions = sampler.begin(self.params, states, keys, model=self.model_config, cells=cells)
        for start in range(0, sampling.steps, chunk_steps):
            stop = min(start + chunk_steps, sampling.steps)
            latents = sampler.denoise(self.params, latents, conditions, sampling, start, stop, model=self.model_config)
            if stop < sampling.steps:
                jax.block_until_ready(latents)
                yield Progress(stop, sampling.steps)
        yield Progress(sampling.steps, sampling.steps, to_pil(self.autoencoder.decode(latents)))

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


def _longest(states: LayerStates) -> int:
    """Returns the largest number of tokens of a row; a row's tokens stand at its beginning."""
    return int(np.asarray(states.mask).sum(axis=1).max())


def _noise_keys(seed: int | Sequence[int], count: int) -> Any:
    seeds = [seed + row for row in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"Got {len(seeds)} seeds for {count} pictures; give one seed, or one a picture.")
    return jnp.stack([stream_key(value, "noise") for value in seeds])


def _longest_target(config: TrainConfig) -> int:
    budget = config.data.budgets.get("text_to_image")
    return int(budget["max_kept_tokens"]) if budget else 256
