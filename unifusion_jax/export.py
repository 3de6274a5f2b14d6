"""Writes a trained model as safetensors: `python -m unifusion_jax.export --checkpoint=runs/demo --output=models/demo`.

The folder holds `model.safetensors` (averaged weights of LAP, refiner and DiT) and `config.json`, and is what
`--checkpoint` of the other commands and `init_from` of a config read. The frozen encoder and autoencoder are not copied:
`config.json` names them, and --encoder and --autoencoder change the names.
"""

import dataclasses
import logging
import sys
from pathlib import Path

from absl import app, flags

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Training workdir, or a folder exported before.")
_OUTPUT = flags.DEFINE_string("output", "", "Folder to write; made if missing.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type to store; bfloat16 halves the file.")
_ENCODER = flags.DEFINE_string("encoder", None, "Folder or hub id to record for the encoder, if it moved.")
_AUTOENCODER = flags.DEFINE_string("autoencoder", None, "Folder or hub id to record for the autoencoder, if it moved.")


def run() -> None:
    """Reads the checkpoint, writes the folder and reads it back."""
    import jax.numpy as jnp

    from unifusion_jax import exported
    from unifusion_jax.pipeline import UniFusion

    model, output = UniFusion.load(_CHECKPOINT.value), Path(_OUTPUT.value).expanduser()
    config = model.config
    if _ENCODER.value:
        config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, path=_ENCODER.value))
    if _AUTOENCODER.value:
        config = dataclasses.replace(
            config, autoencoder=dataclasses.replace(config.autoencoder, path=_AUTOENCODER.value)
        )
    output.mkdir(parents=True, exist_ok=True)
    exported.write(output, config, model.model_config, model.params, dtype=jnp.dtype(_DTYPE.value))
    UniFusion.load(output)
    size_mib = (output / exported.WEIGHTS_FILE).stat().st_size / 2**20
    print(f"Wrote {output} ({size_mib:.1f} MiB in {_DTYPE.value}); it loads back.")


def main(argv: list[str]) -> None:
    """Runs; a user's mistake ends in one line and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", force=True)
    if len(argv) > 1:
        sys.exit(f"Unexpected argument {argv[1]!r}; see --help.")
    for flag in (_CHECKPOINT, _OUTPUT):
        if not flag.value:
            sys.exit(f"--{flag.name} is missing; see --help.")
    try:
        run()
    except (ValueError, FileNotFoundError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    app.run(main)
