"""Opens a web page for a model: `python -m unifusion_jax.app`, then http://127.0.0.1:7860 in a browser.

Needs Gradio: pip install 'unifusion_jax[app]'. Without --checkpoint the demo model that comes with the package is used. The page
answers on this machine only; --host=0.0.0.0 opens it to the network, where everybody who reaches it may draw.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from unifusion_jax import compile_cache


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until interrupted; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m unifusion_jax.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", help="exported folder or training workdir; by default the bundled demo")
    add("--port", type=int, default=7860, help="default 7860; 0 takes a free one")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine only)")
    add("--max_side_px", type=int, default=2048, help="longest side of a picture to draw (default 2048)")
    add("--max_pictures", type=int, default=8, help="reference pictures of a request (default 8)")
    add("--max_waiting", type=int, default=32, help="requests that may wait (default 32)")
    add("--compile_cache", default=compile_cache.AUTO, help=compile_cache.HELP)
    options = parser.parse_args(arguments)
    try:
        from unifusion_jax import web
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        print("app: Gradio is missing; pip install 'unifusion_jax[app]'", file=sys.stderr)
        return 1
    from unifusion_jax.pipeline import UniFusion

    limits = web.Limits(side_px=options.max_side_px, pictures=options.max_pictures, waiting=options.max_waiting)
    for field in dataclasses.fields(limits):
        if getattr(limits, field.name) < 1:
            print(f"app: limits must be at least 1, got {field.name}={getattr(limits, field.name)}", file=sys.stderr)
            return 1
    try:
        compile_cache.enable(options.compile_cache)
        model = UniFusion.load(options.checkpoint)
        with tempfile.TemporaryDirectory(prefix="unifusion-app-") as folder:
            web.serve(model, Path(folder), limits, host=options.host, port=options.port or None)
    except (ValueError, OSError) as error:
        print(f"app: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
