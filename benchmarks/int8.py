"""What 8-bit weights do to an encoder's layer states, and what they save.

    python benchmarks/int8.py --encoder=OpenGVLab/InternVL3-1B-hf

Loads the encoder as it is and with `quantize="int8"`, runs the same batch through both and prints one JSON object on one line:
for each layer the mean and the smallest cosine over tokens and the relative rms error, and the parameters' bytes. The batch
is the given sentences, or random token ids where the folder has no tokenizer (--random_tokens).
"""

import argparse
import json
from typing import Any

SENTENCES = [
    "A photograph of a small wooden boat on a calm lake at dawn, mist rising between the pines behind it.",
    "Three red apples and a green pear in a blue bowl, painted in oil, seen slightly from above.",
    "Replace the sky by a thunderstorm and keep everything else as it is.",
]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Loads both encoders one after the other and compares their states."""
    import jax
    import numpy as np

    from unifusion_jax import Prompt, encoders
    from unifusion_jax.encoders.quantization import state_errors

    states, sizes, layers = [], [], ()
    batch: Any = None
    for quantize in ("none", "int8"):
        encoder = encoders.load(arguments.encoder, dtype=arguments.dtype, quantize=quantize)
        if batch is None:
            if arguments.random_tokens:
                rng = np.random.default_rng(0)
                ids = rng.integers(0, encoder.config.vocab_size, (2, arguments.random_tokens))
                batch = encoders.EncoderBatch.from_tokens(ids)
            else:
                batch = encoder.prepare([Prompt(text) for text in arguments.text or SENTENCES])
        states.append(np.asarray(encoder.layer_states(batch), np.float32))
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(encoder.params)))
        layers = encoder.layers
        del encoder
    errors = {
        name: [round(value, 6) for value in values]
        for name, values in state_errors(states[1], states[0], batch.mask).items()
    }
    return {
        "benchmark": "int8", "encoder": arguments.encoder, "dtype": arguments.dtype, "layers": list(layers),
        "tokens": int(np.sum(batch.mask)), **errors, "bytes": sizes[0], "int8_bytes": sizes[1],
    }  # fmt: skip


def main() -> None:
    """Parses the command line and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder or hub id of an encoder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both (default float32)")
    parser.add_argument(
        "--text", action="append", help="a prompt to compare on; repeatable; three sentences if not given"
    )
    parser.add_argument(
        "--random_tokens", type=int, default=0, help="compare on two rows of so many random ids instead"
    )
    print(json.dumps(compare(parser.parse_args())))


if __name__ == "__main__":
    main()
