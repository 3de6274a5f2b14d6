"""InternLM2's sentencepiece tokenizer, read without running the class that comes in the model's folder."""

import json

import pytest
from encoders_support import TEXTS
from transformers import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from unifusion_jax.encoders.chat import Chat
from unifusion_jax.encoders.folder import read_tokenizer
from unifusion_jax.encoders.templates import CONTROL_TOKENS, INTERNVL_INTERNLM2

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
WORDS = ["▁re", "▁red", "re", "ed", "red", "▁s", "sq", "squ", "▁squ", "are", "▁square", "▁a", "\n\n"]


def write(folder, *, prefix: bool):
    """Writes a folder as published: tokenizer.model with unused pieces at its end, and what replaces them."""
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    pieces += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    pieces += [(letter, NORMAL) for letter in "▁abcdefghijklmnopqrstuvwxyz,;\n"]
    pieces += [(word, NORMAL) for word in WORDS]
    first = len(pieces)
    pieces += [(f"[UNUSED_TOKEN_{i}]", UNUSED) for i in range(len(CONTROL_TOKENS))]
    model = sentencepiece.ModelProto()
    for place, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(place), type=kind)
    model.normalizer_spec.add_dummy_prefix = prefix
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    added = {str(i): {"content": pieces[i][0], "special": True} for i in range(3)}
    added |= {str(first + i): {"content": token, "special": True} for i, token in enumerate(CONTROL_TOKENS)}
    config = {
        "added_tokens_decoder": added, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer", "chat_template": "{{ bos_token }}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    vocab = {piece: place for place, (piece, _) in enumerate(pieces[:first])}
    return first, LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab), add_prefix_space=prefix)


@pytest.mark.parametrize("prefix", [False, True])
def test_ids_equal_transformers_llama_tokenizer(tmp_path, prefix):
    first, theirs = write(tmp_path, prefix=prefix)
    ours = read_tokenizer(tmp_path)
    for text in [*TEXTS, "red square\n\nare red", "two  spaces", "日本"]:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours(text)["input_ids"] == expected
        assert ours.decode(expected) == text
    # Sentencepiece's own prefix comes before spaces, too; Llama's class leaves it out there.
    assert ours.tokenize("  a") == ["▁"] * (1 + prefix) + ["▁a"]
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, len(ours)) == (1, 2, 2, first + 5)
    assert [ours.convert_tokens_to_ids(token) for token in CONTROL_TOKENS] == list(range(first, first + 5))


def test_chat_with_it(tmp_path):
    first, _ = write(tmp_path, prefix=False)
    chat = Chat(read_tokenizer(tmp_path), INTERNVL_INTERNLM2)
    row = chat.render("red <IMG_CONTEXT> square", [[2]])
    assert (
        row.token_ids[0] == 1
        and row.token_ids[1] == first
        and row.is_image.sum() == 2 == (row.token_ids == first + 4).sum()
    )
    assert chat.stop_ids == (first + 1,)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff broken")
    with pytest.raises(ValueError, match=r"tokenizer.model is not a sentencepiece model .*Fetch it again"):
        read_tokenizer(tmp_path)
