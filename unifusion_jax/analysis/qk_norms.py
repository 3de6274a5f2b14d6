"""Figure 18: which layers LAP's attention looks at, token by token: norms of its queries and keys."""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from unifusion_jax.analysis.figure import Figure, Options, heatmap
from unifusion_jax.conditioning import LAP
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.prompt import Prompt
from unifusion_jax.verifi import SYSTEM_PROMPTS

_NAMES = ("query", "key", "value")


def token_norms(lap: LAP, states: Float[Array, "B C N H"], block: int = 0) -> Float[np.ndarray, "B C N 3"]:
    """Returns the norms over all heads of the queries, keys and values of each layer of each token, in one of LAP's blocks.

    They are taken before QK-norm, which would make all of them equal but for its learned scale.
    """
    batch, tokens, layers, width = states.shape
    x = lap.norm(states.astype(jnp.float32)).reshape(batch * tokens, layers, width)
    if lap.layer_embedding is not None:
        x = x + lap.layer_embedding[...]
    graphdef, params = nnx.split(lap.blocks.blocks)
    for number in range(block + 1):
        current: Any = nnx.merge(graphdef, jax.tree.map(lambda leaf, number=number: leaf[number], params))
        normed = current.attention_norm(x)
        maps = (getattr(current.attention, name) for name in _NAMES)
        norms = jnp.stack([jnp.linalg.norm(made(normed), axis=-1) for made in maps], axis=-1)
        x = current(x)
    return np.asarray(norms.reshape(batch, tokens, layers, 3))


def words_of(pieces: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Groups the decoded pieces of a text's tokens by words; a piece that begins with white space begins a word."""
    words: list[tuple[str, list[int]]] = []
    for index, piece in enumerate(pieces):
        if not words or piece[:1].isspace():
            words.append((piece.strip(), [index]))
        else:
            words[-1] = (words[-1][0] + piece.strip(), [*words[-1][1], index])
    return words


def word_rows(
    prompt: int, pieces: Sequence[str], norms: Float[np.ndarray, "tokens N 3"], layers: Sequence[int]
) -> list[dict[str, Any]]:
    """Returns a line for each word and layer; the values of a word are means over its tokens."""
    rows = []
    for position, (word, members) in enumerate(words_of(pieces)):
        means = norms[members].mean(axis=0)
        for layer, (query, key, value) in zip(layers, means.tolist(), strict=True):
            named = {"query_norm": query, "key_norm": key, "value_norm": value, "product": query * key}
            rows.append(
                {"prompt": prompt, "position": position, "word": word, "tokens": len(members), "layer": layer, **named}
            )
    return rows


def pieces_of(processor: Any, token_ids: Sequence[int]) -> list[str]:
    """Returns the text that each token adds to those before it, white space kept."""
    # A character that is not complete yet decodes to a replacement character, which counts for nothing.
    texts = [processor.decode(list(token_ids[:end])).rstrip("\ufffd") for end in range(len(token_ids) + 1)]
    # Decoders strip leading white space of the whole: the first piece then begins a word anyway.
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]


def qk_norms(model: UniFusion, options: Options) -> Figure:
    """Norms of LAP's first block for the words of prompts, as they are encoded in training.

    The product of query and key norm is drawn for the first prompt.
    """
    if model.model_config.conditioning.strategy != "lap":
        raise ValueError(
            f"qk_norms looks into LAP; this checkpoint's conditioning.strategy is {model.model_config.conditioning.strategy!r}."
        )
    encoder, asked = model.encoder, model.config.encoder
    system = SYSTEM_PROMPTS[asked.system_prompts].text_to_image
    words = options.chosen_prompts()
    prompts = [Prompt(text, target=text if asked.verifi else None, system=system) for text in words]
    batch = encoder.prepare(prompts)
    norms = token_norms(cast(Any, model.module().conditioner).lap, jnp.asarray(encoder.export(batch).states))
    rows, layers = [], encoder.layers
    for number, (ids, keep) in enumerate(zip(batch.token_ids, batch.keep & batch.mask, strict=True)):
        pieces = pieces_of(encoder.processor, ids[keep].tolist())
        rows += word_rows(number, pieces, norms[number, : len(pieces)], layers)

    def draw(axes: Any) -> None:
        first = [row for row in rows if row["prompt"] == 0]
        words = [row["word"] for row in first[:: len(layers)]]
        values = np.array([row["product"] for row in first]).reshape(len(words), len(layers))
        title = "Query norm times key norm in LAP, mean over a word's tokens"
        heatmap(axes, values, row_labels=words, column_labels=layers, x="encoder layer", y="word", title=title)

    return Figure(rows, draw, size_inches=(7.0, 7.0))
