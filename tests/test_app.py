"""The web page over HTTP, through Gradio's own client: what a browser sends and gets, with the server in this process."""

import concurrent.futures
import subprocess
import sys
import time

import gradio
import gradio_client
import numpy as np
import PIL.Image
import pytest
from pipeline_support import shaken_model

from unifusion_jax import Prompt, app, images, web

DEFAULTS = {
    "mode": "auto", "rewrite": True, "description": "A red circle.", "system_prompt": "", "seed": 0,
    "count": 1, "steps": 2, "guidance": 2.0, "size": "64x64", "tiles": 0, "switch": 0.15, "solver": "euler",
    "temperature": 0.0, "top_p": 1.0,
}  # fmt: skip
LIMITS = web.Limits(pictures=2, picture_pixels=300 * 300, side_px=128, count=2, steps=4000, waiting=4)


@pytest.fixture(scope="module")
def model(frozen):
    return shaken_model(frozen)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    blocks = web.serve(model, tmp_path_factory.mktemp("pictures"), LIMITS, wait=False)
    yield blocks.local_url
    blocks.close()


def client(server, folder):
    return gradio_client.Client(server, verbose=False, download_files=str(folder), analytics_enabled=False)


def arguments(prompt, files=(), **changes):
    assert set(changes) <= set(DEFAULTS)
    fields = DEFAULTS | changes
    return prompt, [gradio_client.handle_file(str(file)) for file in files], *(fields[name] for name in web.FIELDS)


def draw(server, folder, *fields, user=None, **changes):
    """Draws for a `user` that `client` made, or a new one; returns (description shown, files, progress)."""
    job = (user or client(server, folder)).submit(*arguments(*fields, **changes), api_name="/draw")
    _, gallery, progress = job.result()
    description = next(output[0] for output in job.outputs() if isinstance(output[0], str))
    return description, [item["image"] for item in gallery], progress


def same(file, image):
    return np.abs(np.asarray(PIL.Image.open(file)).astype(int) - np.asarray(image)).max() <= 1


def test_draws_what_the_model_draws_and_stores_the_settings(model, server, tmp_path):
    description, files, progress = draw(server, tmp_path, "a ring", seed=3, count=2)
    assert description == "A red circle." and "step 2 of 2" in progress
    prompt = [Prompt("a ring", target="A red circle.")]
    expected = model.generate(prompt, seed=3, steps=2, guidance=2.0, size=64, images_per_prompt=2)
    assert [same(file, image) for file, image in zip(files, expected, strict=True)] == [True, True]
    settings = images.read_settings(files[1])
    assert (settings["prompt"], settings["seed"], settings["target"], settings["count"]) == (
        "a ring",
        4,
        "A red circle.",
        1,
    )


def test_draws_the_description_that_the_user_changed_until_they_ask_for_something_else(model, server, tmp_path):
    written, other = model.condition(["a ring", "a star"]).texts
    assert written.strip() and written != other
    user = client(server, tmp_path)
    described = []
    for prompt, description in [
        ("a ring", ""),  # nothing yet
        ("a ring", written),  # as it was shown
        ("a ring", "A blue star."),  # changed
        ("a ring", "A blue star."),  # drawn once more
        ("a star", "A blue star."),  # left from another prompt
        ("a ring", "A red ring."),  # prompt and description changed
        ("a ring", ""),  # emptied
    ]:
        shown, files, _ = draw(server, tmp_path, prompt, user=user, description=description)
        assert images.read_settings(files[0])["target"] == shown
        described.append(shown)
    assert described == [written, written, "A blue star.", "A blue star.", other, "A red ring.", written]
    own = web.Shown("A blue star.", True, "make it blue", ("red.png",))
    assert web.is_own(own, "A blue star.", "make it blue", ["red.png"])
    assert not web.is_own(own, "A blue star.", "make it blue", ["green.png"])


def test_edits_an_uploaded_picture(model, server, tmp_path):
    picture = tmp_path / "red.png"
    PIL.Image.new("RGB", (96, 80), "red").save(picture)
    _, files, _ = draw(server, tmp_path, "make it blue", [picture], description="A blue star.")
    reference = Prompt("make it blue", [images.load(picture)], target="A blue star.")
    assert same(files[0], model.generate([reference], steps=2, guidance=2.0, size=64)[0])
    _, files, _ = draw(server, tmp_path, "", [picture], mode="variation", description="")
    assert images.read_settings(files[0])["mode"] == "variation"
    shown = client(server, tmp_path).predict([gradio_client.handle_file(str(picture))], api_name="/look")
    assert len(shown["value"] if isinstance(shown, dict) else shown) == 1


def test_progress_and_cancel(model, server, tmp_path):
    caller = client(server, tmp_path)
    job = caller.submit(*arguments("a ring", steps=4000), api_name="/draw")
    deadline = time.monotonic() + 240
    while not any("drawing your description: step" in str(output[-1]) for output in job.outputs()):
        assert time.monotonic() < deadline and not job.done()
        time.sleep(0.05)
    job.cancel()
    seen = [str(output[-1]) for output in job.outputs()]
    assert not any("done" in text for text in seen) and "reading the prompt: step 0 of 4000" in seen[0]
    # The model is free again at once: what was cancelled goes on for one stretch of steps at most.
    assert "step 2 of 2" in draw(server, tmp_path, "a ring")[2]


def test_two_users_at_once_get_each_their_own(model, server, tmp_path):
    wanted = {"A red circle.": 5, "A blue star.": 9}

    def user(description, seed):
        return draw(server, tmp_path / str(seed), "x", description=description, seed=seed)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(user, wanted, wanted.values()))
    for (description, seed), (shown, files, _) in zip(wanted.items(), answers, strict=True):
        assert shown == description
        expected = model.generate([Prompt("x", target=description)], seed=seed, steps=2, guidance=2.0, size=64)
        assert same(files[0], expected[0])


@pytest.mark.parametrize(
    ("prompt", "files", "changes", "message"),
    [
        ("x", ["text.png"], {}, "text.png cannot be used: not an image"),
        ("x", ["large.png"], {}, "400x400 px is above the limit of 90000 pixels"),
        ("x", ["a.png", "a.png", "a.png"], {}, "At most 2 reference pictures, got 3"),
        ("x", [], {"mode": "edit"}, "takes exactly 1 reference pictures, got 0"),
        ("", [], {"description": ""}, "The prompt is empty"),
        ("x", [], {"size": "50"}, "multiples of 16 px, got 50x50. The nearest is 48x48"),
        ("x", [], {"size": "256"}, "Sides of at most 128 px, got 256x256"),
        ("x", [], {"size": "wide"}, "size must be a side in px"),
        ("x" * 9000, [], {}, "At most 8000 characters"),
    ],
)
def test_bad_requests_are_told(server, tmp_path, prompt, files, changes, message):
    (tmp_path / "text.png").write_text("no picture")
    PIL.Image.new("RGB", (400, 400)).save(tmp_path / "large.png")
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(Exception, match=message) as raised:
        draw(server, tmp_path / "out", prompt, [tmp_path / file for file in files], **changes)
    assert str(tmp_path) not in str(raised.value)


def test_listens_on_this_machine_only_unless_told(model):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gradio.Blocks, "launch", lambda self, **options: launched.append(options))
        patched.setattr("unifusion_jax.pipeline.UniFusion.load", lambda checkpoint: model)
        launched: list[dict] = []
        assert app.main(["--port=0"]) == 0
    assert launched[0]["server_name"] == "127.0.0.1" and launched[0]["share"] is False


def test_mistakes_on_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "unifusion_jax.app", f"--checkpoint={tmp_path / 'none'}"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "No folder" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "unifusion_jax.app", "--max_pictures=0"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "limits must be at least 1, got pictures=0" in done.stderr
