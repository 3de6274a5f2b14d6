"""The prepare command on image folders: what it writes, skips, refuses, and keeps when it is stopped."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unifusion_jax import prepare
from unifusion_jax.data import RecordSource, images


def png(number=0, height_px=10, width_px=12):
    noise = np.random.default_rng(number).integers(0, 256, (height_px, width_px, 3), np.uint8)
    return images.encode_png(noise)


def write(folder, files, **metadata):
    """Writes files (name -> bytes) and metadata files (stem -> list of dicts or raw lines)."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for stem, lines in metadata.items():
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / f"{stem}.jsonl").write_text(text + "\n", encoding="utf-8")


@pytest.fixture
def source(tmp_path):
    """Twenty captioned images and four edits."""
    folder = tmp_path / "in"
    folder.mkdir()
    captions = [{"file_name": f"images/{i:02d}.png", "text": f"picture {i}", "group": i % 2} for i in range(20)]
    edits = [
        {
            "file_name": f"images/{i + 1:02d}.png",
            "source_file_name": f"images/{i:02d}.png",
            "instruction": f"add {i}",
            "text": f"picture {i + 1}",
        }
        for i in range(4)
    ]
    write(folder, {f"images/{i:02d}.png": png(i) for i in range(20)}, metadata=captions, edits=edits)
    return folder


def run(source, output, *options):
    return prepare.main([f"--input={source}", f"--output={output}", *options])


def report(output):
    return json.loads((output / "report.json").read_text())


def everything(output, **options):
    data = RecordSource(output, **options)
    return [data[i] for i in range(len(data))]


def content(output):
    return {file.name: file.read_bytes() for file in sorted(output.iterdir()) if file.is_file()}


def test_folder_with_captions_and_edits(source, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(source, output, "--shards=3") == 0
    assert "24 entries: 24 records" in capsys.readouterr().out
    records = everything(output)
    assert [record.task for record in records] == ["edit"] * 4 + ["text_to_image"] * 20  # edits.jsonl sorts first
    edit, caption = records[1], records[5]
    assert (edit.prompt, edit.target) == ("add 1", "picture 2")
    assert (edit.image, edit.images) == (png(2), (png(1),))  # kept byte for byte
    assert (caption.prompt, caption.target, caption.images) == ("picture 1", None, ())
    assert caption.facts == {"group": 1}
    assert caption.id.startswith("images/01.png#")
    assert len({record.id for record in records}) == 24
    names = sorted(file.name for file in output.iterdir())
    assert [name for name in names if name.endswith(".arrayrecord")] == [
        f"records-0000{i}-of-00003.arrayrecord" for i in range(3)
    ]
    assert not [name for name in names if name.startswith(".") or name.endswith(".tmp")]
    assert report(output)["tasks"] == {"edit": 4, "text_to_image": 20}


def test_output_is_a_function_of_the_input(source, tmp_path):
    moved = tmp_path / "elsewhere" / "in"
    shutil.copytree(source, moved)
    run(source, tmp_path / "a", "--shards=2", "--threads=1")
    run(moved, tmp_path / "b", "--shards=2", "--threads=8")
    first, second = content(tmp_path / "a"), content(tmp_path / "b")
    first.pop("report.json"), second.pop("report.json")  # names the input
    assert first == second


def test_more_metadata(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [
        {"file_name": "a.png", "text": "an a", "target": "a long description"},
        {"file_name": "a.png", "source_file_name": ["b.png", "c.png"], "instruction": "combine"},
        {"file_name": "a.png", "source_file_name": ["b.png"], "instruction": "change", "target": "t", "text": "unused"},
        {"file_name": "a.png", "task": "reconstruction"},
        {"file_name": "b.png", "text": "both", "task": "joint"},
        "",
        {"file_name": "c.png", "text": "Grün, 緑"},
    ]
    write(folder, {"a.png": png(1), "b.png": png(2), "c.png": png(3)}, metadata=lines)
    assert run(folder, tmp_path / "out") == 0
    tasks = [(r.task, r.prompt, r.target, len(r.images)) for r in everything(tmp_path / "out")]
    assert tasks == [
        ("text_to_image", "an a", "a long description", 0),
        ("multi_reference", "combine", None, 2),
        ("edit", "change", "t", 1),
        ("reconstruction", "Reproduce this image.", "", 1),
        ("joint", "both", None, 1),
        ("text_to_image", "Grün, 緑", None, 0),
    ]


@pytest.mark.parametrize(("task", "references"), [("reconstruction", 1), ("joint", 1), ("text_to_image", 0)])
def test_task_of_entries_that_name_none(source, tmp_path, task, references):
    assert run(source, tmp_path / "out", f"--task={task}") == 0
    found = {record.task: len(record.images) for record in everything(tmp_path / "out")}
    assert found == {"edit": 1, task: references}


def test_renamed_keys(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder, {"a.png": png()}, metadata=[{"path": "a.png", "caption": "an a"}])
    assert run(folder, tmp_path / "out", "--rename=path=file_name", "--rename=caption=text") == 0
    assert everything(tmp_path / "out")[0].prompt == "an a"
    assert run(folder, tmp_path / "out2", "--rename=path") == 1
    assert "--rename takes OLD=NEW, got path" in capsys.readouterr().err


def bomb(side_px=60_000):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_FILES = {
    "empty": b"",
    "corrupt": png(5, 64, 64)[:700],
    "too_many_pixels": bomb(),
    "not_an_image": b"<html>not found</html>",
    "missing": None,
}


@pytest.mark.parametrize("reason", BAD_FILES)
def test_bad_files_are_skipped_counted_and_listed(source, tmp_path, capsys, reason):
    victim = source / "images" / "19.png"
    victim.unlink()
    if BAD_FILES[reason] is not None:
        victim.write_bytes(BAD_FILES[reason])
    output = tmp_path / "out"
    assert run(source, output) == 0
    assert f"{reason}: 1\n    images/19.png ({source}/metadata.jsonl:20): " in capsys.readouterr().out
    assert len(everything(output)) == 23
    assert report(output)["skipped_by_reason"] == {reason: 1}
    (entry,) = report(output)["skipped_files"][reason]
    assert entry["file"] == "images/19.png"
    assert entry["where"].endswith("metadata.jsonl:20")
    assert entry["message"]


def test_a_bad_source_image_skips_the_edit(source, tmp_path):
    shutil.copy(source / "images" / "00.png", source / "images" / "good.png")
    (source / "images" / "bad.png").write_bytes(b"?" * 50)
    line = {"file_name": "images/good.png", "source_file_name": "images/bad.png", "instruction": "mend"}
    write(source, {}, more=[line])
    assert run(source, tmp_path / "out") == 0
    assert report(tmp_path / "out")["skipped_files"]["not_an_image"][0]["file"] == "images/bad.png"


def test_filtered_entries_do_not_count_as_broken(source, tmp_path):
    lines = [{"file_name": "images/00.png", "text": "picture 0", "group": 0}] * 5
    write(source, {f"tiny{i}.png": png(i, 3, 40) for i in range(9)}, zzz=lines)
    write(source, {}, tiny=[{"file_name": f"tiny{i}.png", "text": "t"} for i in range(9)])
    assert run(source, tmp_path / "out", "--min_side_px=4", "--max_skipped_share=0") == 0
    assert report(tmp_path / "out")["skipped_by_reason"] == {"duplicate": 5, "too_small": 9}
    assert len(everything(tmp_path / "out")) == 24


def test_pixel_limit(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--max_pixels=119", "--max_skipped_share=1") == 1
    captured = capsys.readouterr()
    assert "not one entry could be used" in captured.err
    assert "12x10 px is above the limit of 119 pixels" in captured.out
    assert run(source, tmp_path / "out", "--max_pixels=999999999") == 1
    assert "max_pixels must lie in" in capsys.readouterr().err


def break_images(source, numbers):
    for number in numbers:
        (source / "images" / f"{number:02d}.png").write_bytes(b"broken")


def test_too_many_bad_files_stop_the_job_and_lose_nothing(source, tmp_path, capsys):
    output = tmp_path / "out"
    break_images(source, range(14, 20))
    assert run(source, output, "--shards=4") == 1
    captured = capsys.readouterr()
    assert "more than 5.0% of 24 entries are broken" in captured.err
    assert "--max_skipped_share" in captured.err
    assert "not_an_image: 2" in captured.out
    kept = everything(output, allow_incomplete=True)  # entries 0 to 17 of 24; the second broken one ends the job
    assert len(kept) == 18
    assert report(output)["complete"] is False
    assert report(output)["written"] == 18
    with pytest.raises(ValueError, match=r"is unfinished .18 records"):
        RecordSource(output)
    finished = {name: data for name, data in content(output).items() if name.startswith("records-0000[012]")}

    # The same command with a larger share goes on; finished shards stay as they are.
    assert run(source, output, "--shards=4", "--max_skipped_share=0.5") == 0
    assert len(everything(output)) == 18
    assert report(output)["skipped_by_reason"] == {"not_an_image": 6}
    assert finished.items() <= content(output).items()
    assert not (output / ".progress").exists()


def test_resumed_job_equals_an_uninterrupted_one(source, tmp_path, monkeypatch):
    calls = []

    def interrupted(data, **options):
        calls.append(data)
        if len(calls) > 15:
            raise KeyboardInterrupt
        return normalise(data, **options)

    normalise = images.normalise
    monkeypatch.setattr(images, "normalise", interrupted)
    assert run(source, tmp_path / "out", "--shards=6", "--threads=1") == 1
    assert report(tmp_path / "out")["stopped"] == "interrupted"
    assert 0 < len(everything(tmp_path / "out", allow_incomplete=True)) < 24

    calls.clear()
    monkeypatch.setattr(images, "normalise", lambda data, **options: calls.append(data) or normalise(data, **options))
    assert run(source, tmp_path / "out", "--shards=6") == 0
    assert 0 < len(calls) < 28  # the finished shards were not read again
    assert run(source, tmp_path / "whole", "--shards=6") == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_killed_job_leaves_whole_shards_only(source, tmp_path):
    code = (
        "import os, sys; from unifusion_jax import prepare; from unifusion_jax.data import images, shards\n"
        "commit, commits = shards.ShardWriter.commit, []\n"
        "def counting(self):\n"
        "    commits.append(1)\n"
        "    if len(commits) == 3: os.kill(os.getpid(), 9)\n"
        "    commit(self)\n"
        "shards.ShardWriter.commit = counting\n"
        "prepare.main(sys.argv[1:])\n"
    )
    output = tmp_path / "out"
    command = [sys.executable, "-c", code, f"--input={source}", f"--output={output}", "--shards=6"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode == -9
    assert len(list(output.glob("*.arrayrecord"))) == 2
    with pytest.raises(ValueError, match="is not a prepared data set"):
        RecordSource(output)
    assert run(source, output, "--shards=6") == 0
    assert run(source, tmp_path / "whole", "--shards=6") == 0
    assert content(output) == content(tmp_path / "whole")  # the half-written temporary file is gone too


def test_unfinished_output_of_another_command_is_refused(source, tmp_path, capsys):
    break_images(source, range(10, 20))
    assert run(source, tmp_path / "out", "--shards=4") == 1
    assert run(source, tmp_path / "out", "--shards=3") == 1
    assert "unfinished data set made from other input or with other options" in capsys.readouterr().err
    assert run(source, tmp_path / "out", "--shards=3", "--max_skipped_share=1", "--overwrite") == 0
    assert len(list((tmp_path / "out").glob("*.arrayrecord"))) == 3


def test_existing_output_is_refused_unless_told(source, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(source, output) == 0
    before = content(output)
    assert run(source, output) == 1
    assert "already holds a finished data set; choose another --output, or replace it with --overwrite" in (
        capsys.readouterr().err
    )
    assert content(output) == before
    (output / "notes.txt").write_text("mine")
    assert run(source, output, "--overwrite") == 1  # a file that is not ours stays, and stops the job
    assert (output / "notes.txt").read_text() == "mine"
    assert "already holds other files" in capsys.readouterr().err
    (output / "notes.txt").unlink()
    assert run(source, output, "--overwrite", "--shards=2") == 0
    assert len(list(output.glob("*.arrayrecord"))) == 2
    assert run(source, source / "edits.jsonl") == 1
    assert "is a file; --output must be a folder" in capsys.readouterr().err


def test_dry_run_writes_nothing_and_reports_all(source, tmp_path, capsys):
    break_images(source, [19])
    assert run(source, tmp_path / "out", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "24 entries: 23 records" in out
    assert "nothing was written" in out
    assert not (tmp_path / "out").exists()
    break_images(source, range(10, 20))
    assert run(source, tmp_path / "out", "--dry_run") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--shards=-1", "shards must lie in [0, 99999] (0 chooses), got -1"),
        ("--max_skipped_share=2", "max_skipped_share is a share in [0, 1], got 2.0"),
        ("--threads=0", "threads >= 1, got 0 and 0"),
    ],
)
def test_bad_options(source, tmp_path, capsys, option, message):
    assert run(source, tmp_path / "out", option) == 1
    assert message in capsys.readouterr().err


def test_glob_over_folders_keeps_ids_apart(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "all" / name).mkdir(parents=True)
        write(tmp_path / "all" / name, {"a.png": png()}, metadata=[{"file_name": "a.png", "text": "same"}])
    assert run(f"{tmp_path}/all/*", tmp_path / "out") == 0
    assert [record.id.split("#")[0] for record in everything(tmp_path / "out")] == ["cats/a.png", "dogs/a.png"]


def test_other_formats_are_stored_as_png_and_upright_sizes_are_noted(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for name, options in {"a.bmp": {}, "b.jpg": {"exif": exif.tobytes()}, "c.webp": {}}.items():
        buffer = io.BytesIO()
        picture.save(buffer, Image.registered_extensions()[Path(name).suffix], **options)
        files[name] = buffer.getvalue()
    write(folder, files, metadata=[{"file_name": name, "text": "x"} for name in files])
    assert run(folder, tmp_path / "out") == 0
    data = RecordSource(tmp_path / "out")
    assert [images.inspect(data[i].image)[0] for i in range(3)] == ["PNG", "JPEG", "WEBP"]
    assert list(zip(data.heights_px, data.widths_px, strict=True)) == [(10, 30), (30, 10), (10, 30)]
    assert data[1].image == files["b.jpg"]


def test_the_command_itself(source, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "unifusion_jax.prepare"]
    done = subprocess.run(
        [*command, f"--input={source}", f"--output={tmp_path}/out"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "24 records (4 edit, 20 text_to_image), 0 skipped" in done.stdout
    assert "prepare: 100%" in done.stderr
    shown = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True)
    assert shown.returncode == 0
    assert '"source_file_name": "blue.png"' in shown.stdout
