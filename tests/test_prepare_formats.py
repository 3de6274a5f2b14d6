"""The prepare command on WebDataset tars and Parquet tables."""

import datetime
import io
import json
import sys
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from unifusion_jax import prepare
from unifusion_jax.data import RecordSource, images


def png(number=0, height_px=8, width_px=9):
    return images.encode_png(np.random.default_rng(number).integers(0, 256, (height_px, width_px, 3), np.uint8))


def tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, data in members.items():
            data = json.dumps(data).encode() if isinstance(data, dict) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def run(source, output, *options):
    return prepare.main([f"--input={source}", f"--output={output}", *options])


def everything(output):
    data = RecordSource(output)
    return [data[i] for i in range(len(data))]


def test_webdataset(tmp_path):
    tar(
        tmp_path / "in" / "000.tar",
        {"k/1.png": png(1), "k/1.txt": b"one \n", "k/2.png": png(2), "k/2.json": {"text": "two"}},
    )
    members = {
        "3.png": png(3),
        "3.json": {"instruction": "turn", "text": "turned", "score": 0.5},
        "3.source.png": png(4),
        "4.jpg": png(5),
        "4.json": {"instruction": "join"},
        "4.source0.png": png(6),
        "4.source1.png": png(7),
    }
    tar(tmp_path / "in" / "001.tar", members)
    for number, source in enumerate((tmp_path / "in", f"{tmp_path}/in/*.tar")):
        output = tmp_path / f"out{number}"
        assert run(source, output) == 0
        found = [(r.task, r.prompt, r.target, r.image, r.images) for r in everything(output)]
        assert found == [
            ("text_to_image", "one", None, png(1), ()),
            ("text_to_image", "two", None, png(2), ()),
            ("edit", "turn", "turned", png(3), (png(4),)),
            ("multi_reference", "join", None, png(5), (png(6), png(7))),
        ]
    assert everything(output)[2].facts == {"score": 0.5}
    assert everything(output)[0].id.startswith("000.tar/k/1.png#")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.txt": b"no picture"}, "1: the sample has a caption but no image; got ['txt']"),
        ({"1.png": png()}, "missing text"),
        ({"1.png": png(), "1.json": b"{"}, "1: its .json or .txt cannot be read"),
        ({"1.png": png(), "1.txt": b"\xff"}, "1: its .json or .txt cannot be read"),
        ({"1.png": png(), "1.jpg": png(), "1.txt": b"x"}, "expected one image KEY.png, .jpg or .webp"),
    ],
)
def test_malformed_samples(tmp_path, capsys, members, message):
    tar(tmp_path / "in.tar", members)
    assert run(tmp_path / "in.tar", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error
    assert f"{tmp_path}/in.tar/1" in error


def test_tar_that_is_not_readable(tmp_path, capsys):
    tar(tmp_path / "zipped.tar", {"1.png": png(), "1.txt": b"x"}, "w:gz")
    assert run(tmp_path / "zipped.tar", tmp_path / "out") == 1
    assert "zipped.tar is not a readable, uncompressed tar file" in capsys.readouterr().err
    tar(tmp_path / "cut.tar", {"1.txt": b"x", "1.png": png(1, 60, 60)})
    data = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:4000])
    assert run(tmp_path / "cut.tar", tmp_path / "out") == 1  # the image that the cut goes through cannot be used


def test_bad_image_in_a_tar_is_skipped(tmp_path):
    tar(tmp_path / "in.tar", {"1.png": b"bad", "1.txt": b"x", "2.png": png(), "2.txt": b"y"})
    assert run(tmp_path / "in.tar", tmp_path / "out", "--max_skipped_share=0.5") == 0
    listed = json.loads((tmp_path / "out" / "report.json").read_text())["skipped_files"]["not_an_image"]
    assert [entry["file"] for entry in listed] == ["in.tar/1.png"]


def parquet(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


def test_parquet(tmp_path):
    columns = {
        "image": [png(i) for i in range(5)],
        "text": [f"picture {i}" for i in range(5)],
        "mask": [png(9)] * 5,
        "day": [datetime.date(2020, 1, 1 + i) for i in range(5)],
    }
    parquet(tmp_path / "in" / "a.parquet", columns, row_group_size=2)
    assert run(tmp_path / "in", tmp_path / "out") == 0
    records = everything(tmp_path / "out")
    assert [(r.prompt, r.image) for r in records] == [(f"picture {i}", png(i)) for i in range(5)]
    assert records[3].facts == {"day": "2020-01-04"}
    assert records[3].id.startswith("a.parquet:3/image#")


def test_parquet_as_hugging_face_writes_it_with_renamed_columns(tmp_path):
    columns = {
        "edited_image": [{"bytes": png(1), "path": "x.png"}, {"bytes": None, "path": "y.png"}],
        "original_image": [{"bytes": png(2), "path": None}, {"bytes": png(2), "path": None}],
        "edit_prompt": ["make it night", "make it day"],
    }
    parquet(tmp_path / "a.parquet", columns)
    rename = ("edited_image=image", "original_image=source_image", "edit_prompt=instruction")
    options = [f"--rename={pair}" for pair in rename]
    assert run(tmp_path / "a.parquet", tmp_path / "out", "--max_skipped_share=0.5", *options) == 0
    (record,) = everything(tmp_path / "out")
    assert (record.task, record.prompt, record.image, record.images) == ("edit", "make it night", png(1), (png(2),))
    (missing,) = json.loads((tmp_path / "out" / "report.json").read_text())["skipped_files"]["missing"]
    assert missing["file"] == "a.parquet:1/edited_image"


def test_parquet_with_lists_of_references(tmp_path):
    references = [[png(2), png(3)], [png(4), png(5), png(6)]]
    columns = {"image": [png(0), png(1)], "source_image": references, "instruction": ["join", "mix"]}
    parquet(tmp_path / "a.parquet", columns, row_group_size=1)
    assert run(tmp_path / "a.parquet", tmp_path / "out") == 0
    assert [list(record.images) for record in everything(tmp_path / "out")] == references


def test_parquet_column_that_is_no_image(tmp_path, capsys):
    parquet(tmp_path / "a.parquet", {"image": ["a.png"], "other": [png()], "text": ["x"]})
    assert run(tmp_path / "a.parquet", tmp_path / "out") == 1
    assert "expected a column of images, got 'a.png'; see --rename" in capsys.readouterr().err


def test_parquet_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert run(tmp_path / "bad.parquet", tmp_path / "out") == 1
    assert "bad.parquet is not a readable Parquet file" in capsys.readouterr().err
    parquet(tmp_path / "text.parquet", {"text": ["a"]})
    assert run(tmp_path / "text.parquet", tmp_path / "out") == 1
    assert "has no column of images (binary, or a struct with bytes); got ['text']" in capsys.readouterr().err
    parquet(tmp_path / "silent.parquet", {"image": [png()], "label": [3]})
    assert run(tmp_path / "silent.parquet", tmp_path / "out") == 1
    assert "missing text; got the keys ['image', 'label']" in capsys.readouterr().err


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, capsys, monkeypatch):
    parquet(tmp_path / "a.parquet", {"image": [png()], "text": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(tmp_path / "a.parquet", tmp_path / "out") == 1
    assert "needs pyarrow, which is not installed: pip install 'unifusion_jax[parquet]'" in capsys.readouterr().err
