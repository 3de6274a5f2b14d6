"""InternLM2's tokenizer from its sentencepiece file. The published class is code inside the model's folder, never run here.

Source of the rules: InternLM/InternLM `tokenization_internlm2_fast.py`: byte-pair merges with byte fallback, spaces as
"▁", a space before the text only if the file says so, and control tokens from tokenizer_config.json.
"""

from pathlib import Path
from typing import Any

from unifusion_jax import weights

_CLASS = "InternLM2Tokenizer"
_FILE = "tokenizer.model"


def describes(folder: Path) -> bool:
    """Tells whether a folder holds an InternLM2 tokenizer that transformers could only read by running foreign code."""
    config = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").exists() or not (folder / _FILE).exists() or not config.exists():
        return False
    return str(weights.read_json(config).get("tokenizer_class", "")).startswith(_CLASS)


def read(folder: Path) -> Any:
    """Returns a transformers tokenizer of the tokenizers backend."""
    import tokenizers
    from google.protobuf.message import DecodeError
    from tokenizers import decoders, models, normalizers
    from transformers import AddedToken, PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges
    from transformers.utils import sentencepiece_model_pb2_new

    model = sentencepiece_model_pb2_new.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] made at run time
    try:
        model.ParseFromString((folder / _FILE).read_bytes())
    except DecodeError as error:
        raise ValueError(f"{folder / _FILE} is not a sentencepiece model ({error}). Fetch it again.") from error
    config = weights.read_json(folder / "tokenizer_config.json")
    added = {int(place): token for place, token in (config.get("added_tokens_decoder") or {}).items()}
    # Control tokens take the places of pieces that training left unused.
    spelled = [added[i]["content"] if i in added else piece.piece for i, piece in enumerate(model.pieces)]
    vocab = {piece: place for place, piece in enumerate(spelled)}
    control = {token["content"] for token in added.values()}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab, generate_merges(vocab, skip_tokens=control), unk_token=spelled[0], fuse_unk=True, byte_fallback=True
        )
    )
    prefix = [normalizers.Prepend("▁")] if model.normalizer_spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens(
        [AddedToken(token["content"], normalized=False, special=True) for _, token in sorted(added.items())]
    )
    roles = {role: config[role] for role in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(role)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=config.get("chat_template"), clean_up_tokenization_spaces=False, **roles
    )
