"""Commands as a shell runs them, without the seconds that each would spend on imports.

A server imports once what all commands import, and touches no device. Each command is a fork of it that goes on as
`python -m unifusion_jax.MODULE` or as a script: arguments, output, signals and exit status are its own.
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
SETTINGS = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
ENVIRONMENT = os.environ | SETTINGS


def command(module, *arguments):
    return [sys.executable, "-m", f"unifusion_jax.{module}", *arguments]


class Process:
    """A running fork of the server, with the part of `subprocess.Popen` that the tests use.

    Args:
      target: a command's module, or the path of a script.
      arguments: its command line.
      outputs: files for what it writes, one for both streams or two.
      environment: variables besides ENVIRONMENT.
    """

    def __init__(self, target, *arguments, outputs=(os.devnull,), **environment):
        request = {"target": target, "arguments": arguments, "environment": environment}
        self.pid = _ask(request | {"outputs": [str(file) for file in (outputs[0], outputs[-1])]})
        self.returncode = None

    def poll(self):
        """Exit status, the negative number of the signal that ended it, or None while it runs."""
        return self._status(os.WNOHANG)

    def wait(self):
        return self._status(0)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def _status(self, options):
        if self.returncode is None:
            self.returncode = _ask({"pid": self.pid, "options": options})
        return self.returncode


def call(target, *arguments, **environment):
    """Runs a command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = Process(target, *arguments, outputs=outputs, **environment)
        status = process.wait()
        return subprocess.CompletedProcess([target, *arguments], status, *(file.read_text() for file in outputs))


def _ask(request):
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


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
        request = json.loads(line)
        if "pid" in request:
            ended, status = os.waitpid(request["pid"], request["options"])
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if answer == 0:
                return _become(**request)
        print(json.dumps(answer), flush=True)


def _become(target, arguments, outputs, environment):
    for number, file in enumerate([os.devnull, *outputs]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    signal.alarm(_TIMEOUT_S)
    os.environ.update(environment)
    sys.argv = [target, *arguments]
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(f"unifusion_jax.{target}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
