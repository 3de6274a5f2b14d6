"""Prompts and images in, images out: the only inference path, which the CLI, the web page, previews and evaluations share."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import tqdm

from unifusion_jax import exported, modes, sampler, weights
from unifusion_jax.autoencoders import Autoencoder
from unifusion_jax.config import from_mapping
from unifusion_jax.drawing import Condition as Condition
from unifusion_jax.drawing import Drawn as Drawn
from unifusion_jax.drawing import Progress as Progress
from unifusion_jax.drawing import check_counts, groups, seeds_of
from unifusion_jax.encoders import Encoder
from unifusion_jax.encoders.batch import LayerStates
from unifusion_jax.flow import SamplingConfig
from unifusion_jax.frozen import check_fit, load_frozen, model_config_of
from unifusion_jax.images import to_pil
from unifusion_jax.model import ModelConfig, UniFusionModel
from unifusion_jax.prompt import DEFAULT_GUIDANCE, Prompt
from unifusion_jax.training.checkpoints import Checkpoints
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.phases import config_at
from unifusion_jax.training.rng import stream_key
from unifusion_jax.verifi import SYSTEM_PROMPTS

BUNDLED_CHECKPOINT = "bundled:demo/unifusion"
BATCH_SIZE = 16  # pictures drawn at a time, unless the caller says otherwise


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
        max_tiles = self._max_tiles(mode, tiles)
        asked, pictures = self._asked(prompts, mode, system_prompt)
        rewrite = self.config.encoder.verifi if rewrite is None else rewrite
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
        if read:
            parts.append((read, self._export([asked[row] for row in read], max_tiles)))
        condition = Condition(asked, sampler.joined(parts), first, finished)
        condition.warn_of_cut_off()
        return condition

    def _max_tiles(self, mode: str, tiles: int | None) -> int:
        """Returns the bound of a picture's tile grid, its thumbnail not counted."""
        chosen = modes.find(mode)
        if tiles is None and chosen is not None:
            tiles = chosen.tiles
        return self.config.data.tiles_per_image if tiles is None else modes.grid_tiles(tiles)

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
        guidance: float = DEFAULT_GUIDANCE,
        size: int | tuple[int, int] | None = None,
        rewrite: bool | None = None,
        system_prompt: str | None = None,
        mode: str = modes.AUTO,
        tiles: int | None = None,
        switch: float = 0.15,
        images_per_prompt: int = 1,
        solver: str = "euler",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        batch_size: int = BATCH_SIZE,
    ) -> list[PIL.Image.Image]:
        """Generates one picture for each prompt, or several; see `draw` for how long lists are batched.

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
          batch_size: most pictures at a time.

        Raises:
          ValueError: no prompts, a size that the model cannot make, or settings out of range.
        """
        sampling = SamplingConfig(steps, solver, guidance, guidance_interval, switch=switch)
        options: dict[str, Any] = {"size": size, "images_per_prompt": images_per_prompt, "batch_size": batch_size}
        asked: dict[str, Any] = {"mode": mode, "rewrite": rewrite, "system_prompt": system_prompt, "tiles": tiles}
        return [drawn.image for drawn in self.draw(prompts, seed=seed, sampling=sampling, **options, **asked)]

    def draw(
        self,
        prompts: Sequence[Prompt | str],
        *,
        seed: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        sampling: SamplingConfig,
        images_per_prompt: int = 1,
        batch_size: int = BATCH_SIZE,
        about: str = "drawing",
        **asked: Any,
    ) -> Iterator[Drawn]:
        """Draws any number of prompts, batch after batch; yields each picture when its batch is done.

        A picture depends on its own prompt and seed, not on its neighbours. All batches have one number of rows (the last is
        filled up and cut), and room for the longest condition so far, so that little is compiled. Where there is more than
        one, a bar shows how far it is.

        Args:
          prompts: as of `generate`.
          seed: as of `generate`.
          size: as of `generate`.
          sampling: the solver's settings.
          images_per_prompt: pictures of each prompt, which is encoded once.
          batch_size: most pictures at a time.
          about: what the bar says.
          **asked: options of `condition`.
        """
        self.check_size(size)
        check_counts(batch_size=batch_size, images_per_prompt=images_per_prompt)
        total = len(prompts) * images_per_prompt
        seeds, room = seeds_of(seed, total), 0
        options: dict[str, Any] = {"size": size, "images_per_prompt": images_per_prompt, "batch_size": batch_size}
        with tqdm.tqdm(total=total, desc=about, unit="picture", disable=total <= batch_size) as bar:
            for group in groups(len(prompts), max(1, batch_size // images_per_prompt)):
                condition = self.condition([prompts[row] for row in group], **asked)
                room = max(room, condition.room)
                condition = dataclasses.replace(condition, states=sampler.padded(condition.states, room))
                own = [seeds[row * images_per_prompt + number] for row in group for number in range(images_per_prompt)]
                (*_, done) = self.sample_in_chunks(
                    condition, seed=own, sampling=sampling, chunk_steps=sampling.steps, **options
                )
                new = len(set(group)) * images_per_prompt
                bar.update(new)
                texts = [text for text in condition.texts for _ in range(images_per_prompt)]
                yield from map(Drawn, (done.images or [])[:new], texts)

    def sample(
        self,
        condition: Condition,
        *,
        seed: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        sampling: SamplingConfig,
        images_per_prompt: int = 1,
        batch_size: int = BATCH_SIZE,
    ) -> list[PIL.Image.Image]:
        """Generates pictures from an encoded condition, `batch_size` at a time; see `generate`.

        The steps are moved towards noise for the picture's size as in training, on top of `sampling.shift`.
        """
        options: dict[str, Any] = {"images_per_prompt": images_per_prompt, "batch_size": batch_size}
        (*_, done) = self.sample_in_chunks(
            condition, seed=seed, size=size, sampling=sampling, chunk_steps=sampling.steps, **options
        )
        return done.images or []

    def sample_in_chunks(
        self,
        condition: Condition,
        *,
        seed: int | Sequence[int] = 0,
        size: int | tuple[int, int] | None = None,
        sampling: SamplingConfig,
        images_per_prompt: int = 1,
        chunk_steps: int = 1,
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[Progress]:
        """Generates pictures as `sample` does, bit for bit, and tells after every `chunk_steps` steps how far it is.

        Whoever stops asking stops the sampling. Between two chunks the host waits for the device, within one it does not; the
        compiled loop is the same for any length of them.
        """
        check_counts(chunk_steps=chunk_steps, images_per_prompt=images_per_prompt, batch_size=batch_size)
        width, height = self.check_size(size)
        cells = (height // self.autoencoder.downsample, width // self.autoencoder.downsample)
        sampling = dataclasses.replace(sampling, shift=sampling.shift * self.config.flow.shift_for(cells[0] * cells[1]))
        seeds = seeds_of(seed, len(condition.prompts) * images_per_prompt)
        phases = tuple(sampler.padded(states, condition.room) for states in condition.phases)
        batches = groups(len(seeds), batch_size)
        done, total, made = 0, len(batches) * sampling.steps, []
        keys = jnp.stack([stream_key(seed, "noise") for seed in seeds])
        noise, of_prompts = sampler.begin(self.params, phases, keys, model=self.model_config, cells=cells)
        for group in batches:
            pictures = np.asarray(group)
            latents, rows = noise[pictures], pictures // images_per_prompt
            conditions = jax.tree.map(lambda leaf, rows=rows: leaf[rows], of_prompts)
            for start in range(0, sampling.steps, chunk_steps):
                stop = min(start + chunk_steps, sampling.steps)
                latents = sampler.denoise(
                    self.params, latents, conditions, sampling, start, stop, model=self.model_config
                )
                if stop < sampling.steps:
                    jax.block_until_ready(latents)
                    yield Progress(done + stop, total)
            made += to_pil(self.autoencoder.decode(latents))
            done += sampling.steps
            yield Progress(done, total, made[: len(seeds)] if done == total else None)

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


def _longest_target(config: TrainConfig) -> int:
    budget = config.data.budgets.get("text_to_image")
    return int(budget["max_kept_tokens"]) if budget else 256
