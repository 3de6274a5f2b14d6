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
    lines = (done.stdout + done.stderr).splitlines()
    create, pack, copy, unpack, prepare, train = (shlex.split(line) for line in lines if not line.startswith("#"))
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert {"--accelerator-type=v5p-256", "--runtime-version=v2-alpha-tpuv5", "--spot"} <= set(create)
    assert pack[0] == "tar" and "--exclude=./runs" in pack and copy[4] == "scp"
    shell = ["bash", "-c", Path("launch/tpu_host.sh").read_text().rstrip("\n"), "tpu_host.sh"]
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {prepare[-1].removeprefix('--command=')}"], capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    assert words == [*shell, "./unifusion_jax[tpu]", "store"]
    assert all("--worker=all" in line for line in (copy, unpack, prepare, train))
    remote = shlex.split(train[-1].removeprefix("--command="), posix=True)
    first = remote.index("python")
    assert [word.rstrip(";") for word in remote[first : first + len(TRAIN)]] == TRAIN


@pytest.mark.parametrize("there", [(), ("uv", "gcsfuse", "venv"), ("uv", "gcsfuse", "venv", "mount")])
def test_a_tpu_host_gets_what_it_lacks(tmp_path, there):
    commands, said = tmp_path / "bin", tmp_path / "said"
    commands.mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    uv = f'echo uv "$@" >> {said}; [ "$1" != venv ] || install -D /bin/true {python}'
    scripts = dict.fromkeys(("gcsfuse", "sudo", "curl"), f'echo "$(basename "$0")" "$@" >> {said}')
    scripts |= {
        "uv": uv,
        "mountpoint": "exit " + ("0" if "mount" in there else "1"),
        "lsb_release": "echo jammy",
        "id": "echo me",
    }
    # The installer of uv and apt-get leave the commands behind.
    scripts["curl"] += f'; [ "$1" != -LsSf ] || cp {tmp_path}/uv.later {commands}/uv'
    scripts["sudo"] += (
        f'; [ "$1" != tee ] || cat > /dev/null; [ "$2" != install ] || cp {tmp_path}/gcsfuse.later {commands}/gcsfuse'
    )
    for name, body in scripts.items():
        missing = name in ("uv", "gcsfuse") and name not in there
        file = tmp_path / f"{name}.later" if missing else commands / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    if "venv" in there:
        python.parent.mkdir(parents=True)
        shutil.copy("/bin/true", python)
    environment = {"HOME": str(tmp_path), "PATH": f"{commands}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    done = subprocess.run(
        ["bash", "launch/tpu_host.sh", "./unifusion_jax[tpu]", "store"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = said.read_text().splitlines()
    install = f"uv pip install --quiet --python {python} ./unifusion_jax[tpu]"
    mount = ["sudo mkdir -p /gcs/store", "sudo chown me /gcs/store", "gcsfuse --implicit-dirs store /gcs/store"]
    if not there:
        assert (
            lines[0].startswith("curl -LsSf") and lines[1] == f"uv venv --quiet --clear --python 3.12 {tmp_path}/venv"
        )
        assert lines[2] == install and any("apt-get install -y" in line for line in lines) and lines[-3:] == mount
    else:
        assert lines == [install, *([] if "mount" in there else mount)]


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
