import os
import subprocess
import sys

import pytest

from unifusion_jax import compile_cache

SCRIPT = """
import sys, jax
from unifusion_jax import compile_cache
print(compile_cache.enable(sys.argv[1]), jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()
"""


def run(where, **environment):
    variables = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") and k != "XLA_FLAGS"}
    variables |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT, where], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_by_default_programs_are_kept_in_the_users_cache(tmp_path):
    folder = tmp_path / "unifusion_jax/compiled"
    assert run("auto", XDG_CACHE_HOME=str(tmp_path)) == [str(folder), "True", str(folder)]
    assert list(folder.iterdir())


def test_the_environments_folder_stays_in_charge(tmp_path):
    own = tmp_path / "own"
    assert run("auto", XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(own))[0] == "None"
    assert list(own.iterdir()) and not (tmp_path / "unifusion_jax").exists()


def test_off_keeps_nothing(tmp_path):
    assert run("off", XDG_CACHE_HOME=str(tmp_path))[:2] == ["None", "False"]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert run("auto", XDG_CACHE_HOME=str(file))[:2] == ["None", "False"]
    with pytest.raises(ValueError, match="not a folder that can be written to"):
        compile_cache.enable(str(file / "x"))
