"""The web page: one request at a time goes through the model, in chunks of steps between which it can be cancelled.

Needs Gradio: pip install 'unifusion_jax[app]'.
"""

import dataclasses
import html
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import PIL.Image

from unifusion_jax import images, modes
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.prompt import DEFAULT_GUIDANCE
from unifusion_jax.request import Request, parse_size

# Finished pictures are kept this long for the page to show; Gradio keeps copies of its own as long.
_KEEP_S = 6 * 3600
# One reference would else be as wide as the column, and the gallery's label would lie on the first picture.
_CSS = "#seen .grid-container { grid-template-columns: repeat(4, 1fr); } #gallery .grid-wrap { padding-top: 32px; }"
_CHUNKS = 20  # into which the steps are cut: how fine the progress is, and how soon a request ends when it is cancelled


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
      pictures: reference pictures.
      picture_pixels: pixels of each of them.
      picture_mb: size of each file.
      side_px: longest side of what is drawn.
      count: pictures drawn.
      steps: solver steps.
      prompt_characters: length of each text.
      waiting: requests in the queue, over which new ones are turned away.
    """

    pictures: int = 8
    picture_pixels: int = 1 << 25
    picture_mb: int = 20
    side_px: int = 2048
    count: int = 8
    steps: int = 200
    prompt_characters: int = 8000
    waiting: int = 32


@dataclasses.dataclass(frozen=True)
class Shown:
    """The description that a user sees, and what it was shown for; the page keeps it for each of its users.

    Attributes:
      description: the text.
      own: whether the user wrote it.
      prompt: the prompt beside it.
      files: the reference pictures beside it.
    """

    description: str
    own: bool
    prompt: str
    files: tuple[str, ...]


def is_own(shown: Shown | None, description: str, prompt: str, files: Sequence[str]) -> bool:
    """Whether `description` is the user's and to be drawn as it stands, not the model's and to be written anew.

    It is once they changed what was shown, and from then on until they change the prompt or the pictures.
    """
    if shown is None or description.split() != shown.description.split():
        return bool(description.strip())
    return shown.own and (prompt, tuple(files)) == (shown.prompt, shown.files)


@dataclasses.dataclass
class Page:
    """What the page does, apart from how it looks.

    Attributes:
      model: what draws.
      limits: of each request.
      folder: where pictures are written.
    """

    model: UniFusion
    limits: Limits
    folder: Path

    def look_at(self, files: Sequence[str] | None, thumbnail_px: int | None = None) -> list[PIL.Image.Image]:
        """Reads uploaded files, whole or small. Raises `gr.Error` for what is no picture, too large, or too many."""
        files = list(files or [])
        if len(files) > self.limits.pictures:
            raise _mistake(f"At most {self.limits.pictures} reference pictures, got {len(files)}.")
        read: list[PIL.Image.Image] = []
        try:
            for file in files:
                read.append(images.load(file, max_pixels=self.limits.picture_pixels))
                if thumbnail_px:
                    read[-1].thumbnail((thumbnail_px, thumbnail_px))
        except (ValueError, OSError) as error:
            raise _mistake(_without_folders(str(error), files)) from error
        return read

    def request_of(self, shown: Shown | None, prompt: str, files: Sequence[str] | None, *fields: Any) -> Request:
        """Makes a request of what the page's fields hold; `fields` are in the order of `FIELDS`."""
        values = dict(zip(FIELDS, fields, strict=True))
        description = values.pop("description") or ""
        limits = self.limits
        empty = [name for name in NUMBERS if values[name] is None]
        if empty:
            raise _mistake(f"Give a number for {' and '.join(empty)}.")
        for text in (prompt, description, values["system_prompt"]):
            if len(text or "") > limits.prompt_characters:
                raise _mistake(f"At most {limits.prompt_characters} characters, got {len(text)}.")
        values |= {name: int(values[name]) for name in ("seed", "steps", "count")}
        if values["steps"] > limits.steps or values["count"] > limits.count:
            raise _mistake(f"At most {limits.steps} steps and {limits.count} pictures at once.")
        tiles = int(values.pop("tiles") or 0)
        try:
            size = self.model.check_size(parse_size(values.pop("size")))
            if max(size) > limits.side_px:
                raise _mistake(f"Sides of at most {limits.side_px} px, got {size[0]}x{size[1]}.")
            return Request(
                prompt or "",
                self.look_at(files),
                target=description.strip() if is_own(shown, description, prompt or "", files or []) else None,
                system_prompt=values.pop("system_prompt") or None,
                tiles=tiles or None,
                size=size,
                **values,
            )
        except (ValueError, TypeError) as error:
            raise _mistake(str(error)) from error

    def draw(
        self, shown: Shown | None, prompt: str, files: Sequence[str] | None, *fields: Any
    ) -> Iterator[tuple[Any, Any, Any, str]]:
        """Draws; yields (shown, description, pictures, progress as HTML) while it goes on. Closing it stops the sampling."""
        request = self.request_of(shown, prompt, files, *fields)
        own = request.target is not None
        doing = "drawing your description" if own else "drawing"
        # Pictures made before stay until there are new ones: a request that fails or is cancelled takes nothing away.
        yield gr.skip(), gr.skip(), gr.skip(), _bar(0, request.steps, "reading the prompt")
        try:
            condition = request.condition(self.model)
            description = condition.prompts[0].target or ""
            shown = Shown(description, own, request.prompt, tuple(files or []))
            # Only once: what the user makes of it while it is drawn stays.
            yield shown, description, gr.skip(), _bar(0, request.steps, doing)
            made: list[PIL.Image.Image] = []
            for progress in request.sample_in_chunks(self.model, condition, math.ceil(request.steps / _CHUNKS)):
                made = progress.images or []
                yield gr.skip(), gr.skip(), gr.skip(), _bar(progress.steps, progress.total_steps, doing)
        except ValueError as error:
            raise _mistake(str(error)) from error
        self._forget_old()
        written = []
        for number, image in enumerate(made):
            handle, name = tempfile.mkstemp(
                prefix=f"unifusion-{request.seed + number}-", suffix=".png", dir=self.folder
            )
            os.close(handle)
            images.save(image, name, settings=request.settings(condition, number))
            written.append(name)
        yield gr.skip(), gr.skip(), written, _bar(request.steps, request.steps, "done")

    def _forget_old(self) -> None:
        for file in self.folder.glob("unifusion-*.png"):
            if file.stat().st_mtime < time.time() - _KEEP_S:
                file.unlink(missing_ok=True)


# Inputs of `Page.draw` behind prompt and pictures, in order.
FIELDS = (
    *("mode", "rewrite", "description", "system_prompt", "seed", "count", "steps", "guidance", "size", "tiles"),
    *("switch", "solver", "temperature", "top_p"),
)
NUMBERS = ("seed", "count", "steps", "guidance", "switch", "temperature", "top_p")  # those that a user can leave empty


def _mistake(message: str) -> gr.Error:
    """Returns an error that the user is told; the server's console is spared its traceback."""
    return gr.Error(message, print_exception=False)


def _bar(steps: int, total: int, what: str) -> str:
    done = f'<div style="width: {100 * steps / total:.1f}%; height: 10px; background: var(--color-accent)"></div>'
    style = "background: var(--border-color-primary); border-radius: 5px; overflow: hidden"
    values = f'aria-valuenow="{steps}" aria-valuemax="{total}"'
    return (
        f'<div role="progressbar" {values} style="{style}">{done}</div>'
        f"<div>{html.escape(what)}: step {steps} of {total}</div>"
    )


def _without_folders(message: str, files: Sequence[str]) -> str:
    """Names files as the user does: where the server keeps uploads is nobody's business."""
    for file in files:
        message = message.replace(str(file), Path(file).name)
    return message


def serve(
    model: UniFusion,
    folder: Path,
    limits: Limits | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    wait: bool = True,
) -> gr.Blocks:
    """Opens the page to a browser.

    Args:
      model: what draws.
      folder: where pictures are written; whoever reaches the page can read what is in it.
      limits: of each request.
      host: address to listen on; by default only this machine is answered.
      port: None takes a free one.
      wait: until interrupted. Without, the page is served by a thread until its `close`.
    """
    limits = limits or Limits()
    blocks = build(model, folder, limits)
    blocks.launch(
        server_name=host,
        server_port=port,
        max_file_size=limits.picture_mb << 20,
        allowed_paths=[str(folder)],
        prevent_thread_lock=not wait,
        footer_links=["gradio", "settings"],
        quiet=not wait,
        css=_CSS,
        share=False,
        show_error=True,
    )
    return blocks


def build(model: UniFusion, folder: Path, limits: Limits | None = None) -> gr.Blocks:
    """Returns the page; `serve` opens it, or mount it in another application.

    Args:
      model: what draws.
      folder: where pictures are written; Gradio must be allowed to read it (`allowed_paths`).
      limits: of each request.
    """
    limits = limits or Limits()
    page = Page(model, limits, folder)
    with gr.Blocks(title="UniFusion", analytics_enabled=False, delete_cache=(3600, _KEEP_S)) as blocks:
        gr.Markdown("# UniFusion\nOne vision-language model reads your words and pictures; what it describes is drawn.")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(
                    label="Prompt (Shift + Enter draws)",
                    placeholder="a large red circle on the left and a small blue star on the right",
                    lines=3,
                    max_length=limits.prompt_characters,
                    elem_id="prompt",
                )
                files = gr.File(
                    label=f"Reference pictures, at most {limits.pictures} (to edit, combine or vary)",
                    file_count="multiple",
                    file_types=["image"],
                    height=180,
                    elem_id="pictures",
                )
                seen = gr.Gallery(
                    label="As they are read",
                    interactive=False,
                    columns=4,
                    object_fit="contain",
                    buttons=[],
                    visible=False,
                    elem_id="seen",
                )
                with gr.Row():
                    run = gr.Button("Draw", variant="primary", scale=3, elem_id="draw")
                    cancel = gr.Button("Cancel", scale=1, min_width=120, elem_id="cancel")
                settings = _settings(model, limits)
            with gr.Column():
                gallery = gr.Gallery(
                    label="Pictures",
                    columns=2,
                    height="auto",
                    object_fit="contain",
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
                progress = gr.HTML(elem_id="progress")
                settings["description"] = gr.Textbox(
                    label="Description that is drawn",
                    info="The model writes it from your prompt (VERIFI). Change it and your words are drawn, until you "
                    "change the prompt or the pictures; empty it and the model writes again.",
                    lines=4,
                    max_length=limits.prompt_characters,
                    elem_id="description",
                )
        shown = gr.State(None)
        inputs = [shown, prompt, files, *(settings[name] for name in FIELDS)]
        started = gr.on(
            [run.click, prompt.submit],
            # Gradio asks whether it is a generator function itself.
            lambda *fields: (yield from page.draw(*fields)),  # pyright: ignore[reportReturnType]
            inputs,
            [shown, settings["description"], gallery, progress],
            api_name="draw",
            show_progress_on=gallery,
            concurrency_limit=1,
            concurrency_id="model",
        )
        # A cancelled request fails too, a while later; that it was cancelled is what its user is to read.
        started.failure(
            None,
            progress,
            progress,
            js="(said) => [said === 'cancelled' ? said : 'stopped, nothing new was drawn']",
            queue=False,
            api_visibility="private",
        )
        cancel.click(lambda: "cancelled", outputs=progress, cancels=[started], queue=False, api_name="cancelled")
        # A queue of its own: few pictures are decoded at once, and a mistake is told as those of drawing are.
        files.change(
            lambda chosen: _shown(page, chosen),
            files,
            seen,
            api_name="look",
            concurrency_limit=2,
            concurrency_id="look",
        )
    return blocks.queue(max_size=limits.waiting, api_open=False)


def _shown(page: Page, files: Sequence[str] | None) -> Any:
    """Shows references as they are read, so that a bad file is told when it is dropped, not when all is filled in."""
    read = page.look_at(files, thumbnail_px=320)
    return gr.Gallery(value=read, visible=bool(read))


def _settings(model: UniFusion, limits: Limits) -> dict[str, Any]:
    """Lays out the fields of `FIELDS` that say how to draw."""
    made: dict[str, Any] = {}
    choices = [
        ("auto: text_to_image without pictures, edit with one, compose with several", modes.AUTO),
        *((f"{name}: {mode.about}", name) for name, mode in modes.MODES.items()),
    ]
    made["mode"] = gr.Dropdown(choices, value=modes.AUTO, label="Mode", elem_id="mode")
    with gr.Row():
        made["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, elem_id="seed")
        made["count"] = gr.Slider(1, limits.count, 1, step=1, label="Pictures", elem_id="count")
    with gr.Row():
        made["steps"] = gr.Slider(1, limits.steps, 30, step=1, label="Steps", elem_id="steps")
        made["guidance"] = gr.Slider(1.0, 15.0, DEFAULT_GUIDANCE, step=0.1, label="Guidance", elem_id="guidance")
    side = model.config.data.size_px
    with gr.Accordion("More settings", open=False):
        made["size"] = gr.Textbox(
            f"{side}x{side}",
            label=f"Size, width x height in px (multiples of {model.multiple_of_px})",
            elem_id="size",
        )
        made["rewrite"] = gr.Checkbox(
            model.config.encoder.verifi, label="Let the encoder describe the picture first (VERIFI)"
        )
        made["system_prompt"] = gr.Textbox(
            label="System prompt", placeholder="the task's own", max_length=limits.prompt_characters
        )
        made["temperature"] = gr.Slider(0.0, 2.0, 0.0, step=0.05, label="Temperature of the description")
        made["top_p"] = gr.Slider(0.05, 1.0, 1.0, step=0.05, label="Top-p of the description")
        made["tiles"] = gr.Dropdown(
            [("the model's own", 0), ("1", 1), ("5", 5), ("10", 10)], value=0, label="Tiles of a reference picture"
        )
        made["switch"] = gr.Slider(0.0, 1.0, 0.15, step=0.01, label="Share of steps under the picture (zero_shot_edit)")
        made["solver"] = gr.Radio(["euler", "heun"], value="euler", label="Solver")
    return made
