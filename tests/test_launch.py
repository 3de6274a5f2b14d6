"""The launch scripts: clean by shellcheck, and what they would run."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(Path("launch").glob("*.sh"))
TRAINING = ["--config=configs/final.py", "--workdir=/shared/my runs/1"]
MORE = ["--config.data.size_px=512", "--config.init_from=a 'b'"]
TRAIN = ["python", "-m", "unifusion_jax.train", *TRAINING, *MORE]
ARGUMENTS = {
    "tpu_pod_slice": "--name=run1 --zone=us-east5-a --project=mine --type=v5p-256 --bucket=store --spot=true",
    "gke_xpk": "--name=run1 --cluster=c --zone=us-east5-a --project=mine --type=v6e-256 --image=registry/u:1 --slices=2",
    "slurm_gpu": "--nodes=4 --gpus=8 --partition=gpu --venv=/shared/venv",
}


def call(name, *arguments):
    return subprocess.run([f"launch/{name}.sh", *arguments], capture_output=True, text=True, timeout=60)


def dry_run(name):
    done = call(name, *ARGUMENTS[name].split(), *TRAINING, "--dry-run", "--", *MORE)
    assert done.returncode == 0, done.stderr
    return done


def test_shellcheck_finds_nothing():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert tool, "shellcheck is missing: pip install -e '.[test]'"
    done = subprocess.run([tool, "-x", "-P", "SCRIPTDIR", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_tpu_slice_is_asked_for_prepared_and_trained_on():
    done = dry_run("tpu_pod_slice")
    lines = [shlex.split(line, comments=True) for line in (done.stdout + done.stderr).splitlines()]
    create, copy, install, mount, train = (line for line in lines if line)
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert {"--accelerator-type=v5p-256", "--runtime-version=v2-alpha-tpuv5", "--spot"} <= set(create)
    assert copy[4] == "scp" and "pip install" in install[-1] and "gcsfuse" in mount[-1]
    assert all("--worker=all" in line for line in (copy, install, mount, train))
    remote = shlex.split(train[-1].removeprefix("--command="), posix=True)
    first = remote.index("python")
    assert [word.rstrip(";") for word in remote[first : first + len(TRAIN)]] == TRAIN


def test_gke_builds_an_image_and_restarts_after_preemptions():
    build, push, create = (shlex.split(line) for line in dry_run("gke_xpk").stdout.splitlines())
    assert build[:2] == ["docker", "build"] and push == ["docker", "push", "registry/u:1"]
    assert create[:3] == ["xpk", "workload", "create"]
    pairs = dict(zip(create[3::2], create[4::2], strict=True))
    assert pairs["--restart-on-exit-codes"] == "75,76" and pairs["--num-slices"] == "2"
    assert shlex.split(pairs["--command"]) == TRAIN


def test_slurm_gets_a_script_that_runs_a_process_a_gpu(tmp_path):
    text = dry_run("slurm_gpu").stdout
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", script], check=True)
    assert "--ntasks-per-node=8 --gpus-per-node=8" in text and "--signal=TERM@120" in text
    srun = next(line for line in text.splitlines() if line.startswith("srun"))
    assert shlex.split(srun)[2:] == TRAIN
    # What it does with each exit status, with the cluster's commands replaced.
    for name, status in (("srun", 75), ("scontrol", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} called\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").write_text("")
    script.write_text(text.replace("/shared/venv", str(tmp_path / "venv")))
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 75 and "scontrol called" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gke_xpk", ["--nme=a"], "unknown option --nme; options are: --name --cluster"),
        ("gke_xpk", ["--name=a"], "--cluster=... is missing"),
        ("slurm_gpu", ["--nodes=two", "--gpus=8", *TRAINING], "--nodes is a number from 1, got 'two'"),
        ("tpu_pod_slice", ["run"], "expected --option=value, got 'run'"),
    ],
)
def test_wrong_options_are_refused_with_status_2(name, arguments, message):
    done = call(name, *arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_help_shows_how(name):
    done = call(name, "--help")
    assert done.returncode == 0 and f"launch/{name}.sh --" in done.stdout and "--dry-run" in done.stdout


def test_images_hold_what_they_copy():
    ignore = Path(".dockerignore").read_text()
    for file in Path("launch").glob("Dockerfile.*"):
        copied = [
            word for line in file.read_text().splitlines() if line.startswith("COPY") for word in line.split()[1:-1]
        ]
        assert copied and all(Path(word).exists() and f"!{word}" in ignore for word in copied)
