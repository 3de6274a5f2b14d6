"""The commands as a user calls them, in processes of their own."""

import json
import signal
import subprocess
import time

import jax
import numpy as np
import PIL.Image
import pytest
from commands import ENVIRONMENT, Process, call, command
from test_training import logged

from unifusion_jax.analysis import FIGURES
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.train import run as run_training  # noqa: F401  (imported here so that a broken import fails once)

CONFIG = "tests/tiny_run.py"


@pytest.fixture(scope="module")
def trained(frozen, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cli") / "run"
    done = call("train", f"--config={CONFIG}:{frozen}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_run_killed_at_any_time_and_restarted_logs_the_same_losses(trained, frozen, tmp_path):
    arguments = ["train", f"--config={CONFIG}:{frozen}", f"--workdir={tmp_path / 'run'}"]
    metrics = tmp_path / "run/metrics.jsonl"
    for lines in (3, 11):
        process = Process(*arguments)
        deadline = time.monotonic() + 240
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= lines):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert call(*arguments).returncode == 0
    assert logged(tmp_path / "run") == logged(trained)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--config.batch_sise=4"], 2, "config has no key 'batch_sise'. Did you mean config.batch_size? Known keys: "),
        (["--config.seed.x=4"], 2, "--config.seed.x cannot be set: config.seed is a value without keys."),
        (["--config.batch_size=four"], 1, "four"),
        (["--config.optimizer.learning_rate=-1"], 1, "learning_rate and clip_norm must be positive, got -1.0"),
        (["--config.encoder.path=/no/such"], 1, "No folder '/no/such'"),
        (["--num_processes=2"], 1, "--coordinator and --process_id missing"),
        (["--workdir=gs://bucket/run"], 1, "Mount the bucket"),
        (["surplus"], 1, "Unexpected argument 'surplus'"),
    ],
)
def test_train_refuses_with_a_message_and_a_status(frozen, tmp_path, arguments, status, message):
    done = call("train", f"--config={CONFIG}:{frozen}", f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == status
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_train_resume_under_another_config_is_refused(trained, frozen):
    before = (trained / "metrics.jsonl").read_bytes()
    done = call("train", f"--config={CONFIG}:{frozen}", f"--workdir={trained}", "--config.seed=5")
    assert done.returncode == 1
    assert "holds a run of another config" in done.stderr and "seed: 0 -> 5" in done.stderr
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_sample_draws_and_edits(trained, tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.jpg"
    done = call("sample", f"--checkpoint={trained}", "--prompt=a red circle", f"--output={first}", "--steps=2")
    assert done.returncode == 0, done.stderr
    assert "Description: " in done.stdout
    assert PIL.Image.open(first).size == (96, 96)
    done = call(
        "sample", f"--checkpoint={trained / 'export'}", "--prompt=make it blue", f"--image={first}", f"--output={second}",
        "--steps=2", "--size=128x96", "--norewrite",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert PIL.Image.open(second).size == (128, 96)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "steps must be at least 1, got 0"),
        (["--size=100"], "multiples of 16 px, got 100x100. The nearest is 96x96"),
        (["--size=big"], "size must be a side in px"),
        (["--image=missing.png"], "no image file 'missing.png'"),
        (["--image=tests/test_cli.py"], "test_cli.py cannot be used: not an image"),
        (["--prompt="], "The prompt is empty. Mode 'text_to_image'"),
        (
            ["--mode=edit"],
            "Mode 'edit' (one picture, changed as the words say) takes exactly 1 reference pictures, got 0",
        ),
        (["--mode=edti"], "no mode 'edti'; modes are auto, text_to_image"),
        (["--tiles=0"], "tiles must be at least 1, got 0"),
        (["--top_p=0"], "top_p is a probability in (0, 1], got 0"),
        (["--count=0"], "count must be at least 1, got 0"),
        (["--max_new_tokens=600"], "leaves no room for max_new_tokens=600"),
        (["--compile_cache=/dev/null/x"], "not a folder that can be written to"),
        (["--checkpoint=tests"], "config.json does not exist"),
    ],
)
def test_sample_refuses_and_leaves_no_file(trained, tmp_path, arguments, message):
    output = tmp_path / "out.png"
    given = [f"--checkpoint={trained}", "--prompt=a red circle", f"--output={output}", "--steps=2", *arguments]
    done = call("sample", *given)
    assert done.returncode == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_sample_stores_its_settings_and_takes_the_description_back(trained, tmp_path):
    cache = f"--compile_cache={tmp_path / 'compiled'}"
    common = [f"--checkpoint={trained}", "--steps=2", cache]
    done = call("sample", *common, "--prompt=a star", f"--output={tmp_path / 'a.png'}", "--count=2", "--seed=4")
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "compiled"]
    assert list((tmp_path / "compiled").iterdir())
    shown = call("sample", f"--show={tmp_path / 'a-1.png'}")
    settings = json.loads(shown.stdout)
    description = done.stdout.split("Description: ")[1].split("\nWrote")[0]
    assert (settings["seed"], settings["steps"], settings["count"], settings["prompt"]) == (5, 2, 1, "a star")
    assert settings["target"].strip() == description.strip()
    again = tmp_path / "again.png"
    done = call("sample", *common, "--prompt=a star", f"--target={settings['target']}", "--seed=5", f"--output={again}")
    assert done.returncode == 0, done.stderr
    difference = np.asarray(PIL.Image.open(again)).astype(int) - np.asarray(PIL.Image.open(tmp_path / "a-1.png"))
    assert np.abs(difference).max() <= 1
    done = call(
        "sample", *common, "--mode=variation", f"--image={again}", f"--output={tmp_path / 'variation.webp'}"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Description" not in done.stdout
    assert json.loads(call("sample", f"--show={tmp_path / 'variation.webp'}").stdout)["mode"] == "variation"


def test_output_of_no_image_format_is_refused_before_the_model_runs(trained, tmp_path):
    done = call("sample", f"--checkpoint={trained}", "--prompt=x", f"--output={tmp_path / 'out.txt'}")
    assert done.returncode == 1
    assert "must end in .png, .jpg or .webp, got 'out.txt'" in done.stderr


def test_export_halves_the_file_and_records_where_the_frozen_networks_went(trained, frozen, tmp_path):
    (tmp_path / "moved").symlink_to(frozen / "encoder")
    output = tmp_path / "model"
    moved = f"--encoder={tmp_path / 'moved'}"
    done = call("export", f"--checkpoint={trained}", f"--output={output}", "--dtype=bfloat16", moved)
    assert done.returncode == 0, done.stderr
    written, whole = output / "model.safetensors", trained / "export/model.safetensors"
    assert written.stat().st_size < 0.6 * whole.stat().st_size
    model, original = UniFusion.load(output), UniFusion.load(trained)
    assert model.config.encoder.path == str(tmp_path / "moved")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), model.params, original.params)


def test_export_of_nothing_is_refused(tmp_path):
    done = call("export", f"--checkpoint={tmp_path / 'none'}", f"--output={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "No folder" in done.stderr
    assert not (tmp_path / "out").exists()


def test_analyze_offers_every_figure():
    done = call("analyze", "--help")
    assert all(name in done.stdout for name in FIGURES)


def test_analyze_writes_figures(trained, tmp_path):
    names = ("pooling_weights", "layer_similarity")
    flags = [f"--checkpoint={trained}", f"--output={tmp_path}", "--count=2", *(f"--figure={name}" for name in names)]
    done = call("analyze", *flags)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert PIL.Image.open(tmp_path / f"{name}.png").width > 300
        assert len((tmp_path / f"{name}.csv").read_text().splitlines()) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --figure (one of layer_similarity,"),
        (["--figure=pooling_weights", "--study=runs"], "Give --figure"),
        (["--figure=qk_norms", "--checkpoint=/no/such"], "No folder '/no/such'"),
        (["--figure=qk_norms", "--count=0"], "count and steps must be 1 or more, got 0"),
        (["--study=runs", "--seeds=1"], "at least 2 seeds"),
    ],
)
def test_analyze_refuses_with_a_message_and_a_status(tmp_path, arguments, message):
    done = call("analyze", f"--output={tmp_path / 'out'}", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["train", "sample", "prepare", "export", "rewrite", "evaluate", "app", "analyze"])
def test_help_teaches(module):
    # As a shell does it: a command must also find all it imports by itself.
    done = subprocess.run(command(module, "--help"), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert f"python -m unifusion_jax.{module}" in done.stdout


def test_the_same_seed_draws_the_same_picture(trained, tmp_path):
    pixels = []
    for name in ("a.png", "b.png"):
        call("sample", f"--checkpoint={trained}", "--prompt=x", f"--output={tmp_path / name}", "--steps=2", "--seed=3")
        pixels.append(np.asarray(PIL.Image.open(tmp_path / name)))
    np.testing.assert_array_equal(*pixels)
    assert json.loads((trained / "result.json").read_text())["wall_s"] > 0
