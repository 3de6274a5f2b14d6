"""Commands as a shell runs them, without the seconds that each would spend on imports.

A server imports once what all commands import, and touches no device. Each call is a fork of it that goes on as
`python -m unifusion_jax.MODULE`: arguments, output, signals and exit status are its own.
"""

import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers

# The commands' own modules stay out: they define their flags when they run.
_IMPORTED = ("unifusion_jax.pipeline", "unifusion_jax.request", "unifusion_jax.training.loop", "unifusion_jax.images")
_TIMEOUT_S = 300
# As in the tests' own process, what is compiled is hardly run.
ENVIRONMENT = os.environ | {
    "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd(),
}  # fmt: skip


def command(module, *arguments):
    return [sys.executable, "-m", f"unifusion_jax.{module}", *arguments]


def call(module, *arguments):
    """Runs a command in a fork of the server."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/stdout", f"{folder}/stderr"]
        server = _server()
        server.stdin.write(json.dumps({"module": module, "arguments": arguments, "outputs": outputs}) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            command(module, *arguments), status, *(Path(file).read_text() for file in outputs)
        )


@functools.cache
def _server():
    # Ends when its input does, at the latest with this process.
    return subprocess.Popen(
        [sys.executable, __file__], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _serve():
    for name in _IMPORTED:
        importlib.import_module(name)
    _ = transformers.AutoTokenizer, transformers.Qwen2Tokenizer  # these it imports when they are first asked for
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            return _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(module, arguments, outputs):
    for number, file in enumerate([os.devnull, *outputs]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    signal.alarm(_TIMEOUT_S)
    sys.argv = ["", *arguments]
    runpy.run_module(f"unifusion_jax.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
