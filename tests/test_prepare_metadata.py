"""The prepare command refuses malformed metadata with its place, before anything is written."""

import json

import numpy as np
import pytest

from unifusion_jax import prepare
from unifusion_jax.data import images, preparation


def png():
    return images.encode_png(np.zeros((8, 8, 3), np.uint8))


def write(folder, files, **metadata):
    """Writes files (name -> bytes) and metadata files (stem -> list of dicts or raw lines)."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for stem, lines in metadata.items():
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / f"{stem}.jsonl").write_text(text + "\n", encoding="utf-8")


def run(source, output):
    return prepare.main([f"--input={source}", f"--output={output}"])


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder, {"images/00.png": png()})
    return folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "images/00.png", "text": ', "metadata.jsonl:3: not a line of JSON: Expecting value"),
        ("[1, 2]", "metadata.jsonl:3: expected an object like .*got list"),
        ({"text": "x"}, r"metadata.jsonl:3: missing file_name; got the keys \['text'\], expected file_name and text"),
        ({"file_name": "a.png", "caption": "x"}, r"missing text; got the keys \['caption', 'file_name'\]"),
        ({"file_name": "a.png", "text": None}, r"missing text; got the keys \['file_name'\]"),
        ({"file_name": "a.png", "source_file_name": "b.png", "text": "x"}, "missing instruction"),
        ({"file_name": "a.png", "text": 7}, "text must be a string, got 7"),
        ({"file_name": 7, "text": "x"}, "a file name must be a non-empty string, got 7"),
        ({"file_name": "../secret.png", "text": "x"}, r"'../secret.png' leads out of the folder .*use paths inside it"),
        ({"file_name": "images/../../a.png", "text": "x"}, "leads out of the folder"),
        ({"file_name": "/etc/passwd", "text": "x"}, "leads out of the folder"),
        ({"file_name": "a.png", "source_file_name": "../b.png", "instruction": "x"}, "'../b.png' leads out"),
        ({"file_name": "a.png", "text": "x", "task": "paint"}, "unknown task 'paint'; expected one of text_to_image"),
        ({"file_name": "a.png", "text": "x", "task": "edit"}, "the task edit does not go with 0 source images"),
    ],
)
def test_malformed_metadata_is_refused_with_its_place(source, tmp_path, capsys, line, message):
    write(source, {}, metadata=[{"file_name": "images/00.png", "text": "fine"}, "", line])
    assert run(source, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "1 malformed entries; mend or remove them" in error
    with pytest.raises(ValueError, match=message):
        preparation.prepare(preparation.Settings(str(source), str(tmp_path / "out")), progress=False)
    assert not (tmp_path / "out").exists()


def test_metadata_that_is_not_utf8(source, tmp_path, capsys):
    (source / "metadata.jsonl").write_bytes('{"file_name": "images/00.png", "text": "grün"}\n'.encode("latin-1"))
    assert run(source, tmp_path / "out") == 1
    assert "metadata.jsonl:1: not a line of JSON: 'utf-8' codec can't decode" in capsys.readouterr().err


def test_many_malformed_lines_are_counted(source, tmp_path, capsys):
    write(source, {}, metadata=["{"] * 30)
    assert run(source, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "30 malformed entries" in error
    assert "... and 20 more" in error


def test_input_without_metadata_says_what_is_needed(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder, {"a.png": png(), "deep/b.jpg": png()})
    assert run(folder, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "has 2 images but nothing that says what they show" in error
    assert '{"file_name": "a.png", "text": "what the image shows"}' in error
    write(folder, {}, metadata=[])
    assert run(folder, tmp_path / "out") == 1
    assert "describes no images: its metadata is empty" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", tmp_path / "out") == 1
    assert "there is nothing at" in capsys.readouterr().err
    assert run(f"{tmp_path}/no*", tmp_path / "out") == 1
    assert "there is nothing at" in capsys.readouterr().err
    assert run(folder / "a.png", tmp_path / "out") == 1
    assert "is not a .jsonl, .tar, .parquet file" in capsys.readouterr().err
