"""A small InternVL tokenizer trained on given texts, for encoders trained from scratch."""

import json
from collections.abc import Iterable
from typing import Any

from unifusion_jax.encoders.templates import CONTROL_TOKENS, IMAGE, IMAGE_END, IMAGE_START, TURN_END

PAD = "<|endoftext|>"
# transformers' InternVL processor asks the tokenizer for these by role.
_ROLES = {
    "start_image_token": IMAGE_START,
    "end_image_token": IMAGE_END,
    "context_image_token": IMAGE,
    "video_token": "<video>",
}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Trains a byte-level BPE tokenizer with Qwen2's splitting rule and InternVL's control tokens.

    Returns a transformers tokenizer of at most `vocab_size` tokens, control tokens included; every text can be encoded.
    Raises ValueError when `vocab_size` is less than the 256 bytes and the control tokens.
    """
    import tokenizers
    from transformers import Qwen2Tokenizer

    special = [PAD, *CONTROL_TOKENS, _ROLES["video_token"]]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(f"vocab_size must be at least {len(alphabet) + len(special)}, got {vocab_size}.")
    # The frame gives the splitting rule; only the merges are learned.
    frame = Qwen2Tokenizer(vocab={PAD: 0}, merges=[]).backend_tokenizer
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.normalizer, learner.pre_tokenizer, learner.decoder = frame.normalizer, frame.pre_tokenizer, frame.decoder
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(special), initial_alphabet=sorted(alphabet), show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],  # pyright: ignore[reportArgumentType] pairs are taken too
        eos_token=TURN_END,
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens={**_ROLES, "start_turn_token": CONTROL_TOKENS[0]},
    )
