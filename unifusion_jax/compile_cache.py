"""Compiled programs kept on disk, so that a command that ran before does not compile again."""

import os
from pathlib import Path

AUTO, OFF = "auto", "off"
HELP = (
    "Folder that keeps compiled programs, so that the next run starts faster: 'auto' for one in your cache folder, 'off' for "
    "none."
)
_LARGEST_BYTES = 4 << 30  # beyond this, what was not used for longest goes


def default_folder() -> Path:
    """Returns the folder that "auto" stands for: below $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unifusion_jax" / "compiled"


def enable(where: str = AUTO) -> Path | None:
    """Turns the cache on for this process, before anything is compiled.

    Args:
      where: "auto", "off" or a folder, made if missing. With "auto", the environment's JAX_COMPILATION_CACHE_DIR is left in
        charge where it is set.

    Returns:
      The folder; None where there is none, or the environment's own is in charge.

    Raises:
      ValueError: the folder cannot be written to. "auto" then goes without a cache.
    """
    if where == OFF:
        return _point_to(None)
    if where == AUTO and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    folder = default_folder() if where == AUTO else Path(where).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable and where == AUTO:
        return _point_to(None)
    if not writable:
        raise ValueError(f"--compile_cache={where} is not a folder that can be written to. Name another one, or 'off'.")
    return _point_to(folder)


def _point_to(folder: Path | None) -> Path | None:
    import jax

    if folder is None:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _LARGEST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder
