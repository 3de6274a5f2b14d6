"""The rewrite command on a small data set: what it writes, keeps and refuses, alone, killed, and on several hosts."""

import json
import subprocess
import sys

import numpy as np
import pytest
from commands import ENVIRONMENT

from unifusion_jax import encoders, rewrite
from unifusion_jax.data import RecordSource, records, write_records
from unifusion_jax.data.shapes.source import ShapesSource
from unifusion_jax.verifi import SYSTEM_PROMPTS, prompt_of

NEW_TOKENS = 5


def fresh(count=10):
    """Short prompts without descriptions, two edits, a reconstruction, and one that has a description."""
    drawn, edits, again = (ShapesSource(task) for task in ("text_to_image", "edit", "reconstruction"))
    plain = [drawn[index].replace(target=None) for index in range(count - 4)]
    return [*plain, edits[0].replace(target=None), again[0], edits[1].replace(target=None), drawn[99]]


@pytest.fixture
def source(tmp_path):
    write_records(fresh(), tmp_path / "in", shards=2)
    return tmp_path / "in"


def run(frozen, source, output, *options):
    return rewrite.main(
        [
            f"--encoder={frozen / 'encoder'}", f"--input={source}", f"--output={output}", "--batch_size=4",
            f"--max_new_tokens={NEW_TOKENS}", "--dtype=float32", "--system_prompts=short", *options,
        ]
    )  # fmt: skip


def everything(folder):
    data = RecordSource(folder)
    return [data[index] for index in range(len(data))]


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "report.json"}


def test_records_get_the_descriptions_that_the_encoder_decodes(frozen, source, tmp_path, capsys):
    assert run(frozen, source, tmp_path / "out", "--shards=3") == 0
    assert "10 entries: 10 records" in capsys.readouterr().out
    before, after = everything(source), everything(tmp_path / "out")
    assert [record.id for record in after] == [record.id for record in before]
    encoder = encoders.load(frozen / "encoder", dtype="float32")
    for old, new in zip(before, after, strict=True):
        assert (new.prompt, new.image, new.images, new.facts) == (old.prompt, old.image, old.images, old.facts)
        if old.target is not None:
            assert new.target == old.target
            continue
        asked = prompt_of(old, SYSTEM_PROMPTS["short"])
        assert new.target == encoder.rewrite([asked], max_new_tokens=NEW_TOKENS).texts[0].strip() != ""
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["complete"] and report["written"] == 10 and report["kept_as_they_were"] == 2
    assert report.get("rewritten", 0) + report.get("cut_off_at_max_new_tokens", 0) == 8
    info = json.loads((tmp_path / "out/dataset.json").read_text())
    assert info["rewritten_by"].endswith("encoder") and info["rewritten_with"]["max_new_tokens"] == NEW_TOKENS


def test_descriptions_are_replaced_and_pictures_seen_when_asked_for(frozen, source, tmp_path):
    assert run(frozen, source, tmp_path / "plain") == 0
    assert run(frozen, source, tmp_path / "seen", "--replace", "--see_picture") == 0
    plain, seen = everything(tmp_path / "plain"), everything(tmp_path / "seen")
    assert seen[-1].target != plain[-1].target
    assert [record.target for record in seen][:6] != [record.target for record in plain][:6]
    assert [record.target for record in seen if record.task == "reconstruction"] == [""]  # it has no words


def test_hosts_share_the_work_and_the_last_one_describes_it(frozen, source, tmp_path, capsys):
    assert run(frozen, source, tmp_path / "alone", "--shards=3") == 0
    output = tmp_path / "together"
    assert run(frozen, source, output, "--shards=3", "--hosts=2", "--host=1") == 0
    assert "2 shards of other hosts are not" in capsys.readouterr().out
    assert not (output / "dataset.json").exists()
    with pytest.raises(ValueError, match="not a prepared data set"):
        RecordSource(output)
    assert run(frozen, source, output, "--shards=3", "--hosts=2", "--host=0") == 0
    assert content(output) == content(tmp_path / "alone")
    assert json.loads((output / "report.json").read_text())["written"] == 10


def test_a_killed_job_goes_on_from_its_last_whole_shard(frozen, source, tmp_path):
    output = tmp_path / "out"
    script = (
        "import os, sys\n"
        "from unifusion_jax import rewrite\n"
        "from unifusion_jax.data.shards import ShardWriter\n"
        "commit, commits = ShardWriter.commit, []\n"
        "def dying(self):\n"
        "    commits.append(1)\n"
        "    if len(commits) == 3: os.kill(os.getpid(), 9)\n"
        "    commit(self)\n"
        "ShardWriter.commit = dying\n"
        "rewrite.main(sys.argv[1:])\n"
    )
    arguments = [
        f"--encoder={frozen / 'encoder'}", f"--input={source}", f"--output={output}", "--batch_size=4", "--shards=5",
        f"--max_new_tokens={NEW_TOKENS}", "--dtype=float32", "--system_prompts=short",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=ENVIRONMENT, capture_output=True, timeout=300)
    assert done.returncode == -9
    assert len(list(output.glob("*.arrayrecord"))) == 2 and not (output / "dataset.json").exists()
    times = {file: file.stat().st_mtime_ns for file in output.glob("*.arrayrecord")}
    assert run(frozen, source, output, "--shards=5") == 0
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert run(frozen, source, tmp_path / "whole", "--shards=5") == 0
    assert content(output) == content(tmp_path / "whole")


def test_what_cannot_be_used_is_left_out_and_listed(frozen, tmp_path, capsys):
    items = fresh()
    items[1] = items[1].replace(prompt="word " * 600)
    items[6] = items[6].replace(images=(b"no image",))
    write_records(items, tmp_path / "in")
    assert run(frozen, tmp_path / "in", tmp_path / "out") == 1
    assert "more than 5.0% of 10 records cannot be used" in capsys.readouterr().err
    assert run(frozen, tmp_path / "in", tmp_path / "out", "--max_skipped_share=0.2") == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["skipped_by_reason"] == {"not_an_image": 1, "refused": 1}
    assert "leaves no room for max_new_tokens=5" in report["skipped_files"]["refused"][0]["message"]
    assert [record.id for record in everything(tmp_path / "out")] == [
        record.id for number, record in enumerate(items) if number not in (1, 6)
    ]


def test_sampled_descriptions_are_a_function_of_seed_and_record(frozen, source, tmp_path):
    options = ["--temperature=1.5", "--top_p=0.9"]
    for name, more in (("a", []), ("b", ["--batch_size=3"]), ("c", ["--seed=1"])):
        assert run(frozen, source, tmp_path / name, *options, *more) == 0
    first, same, other = ([record.target for record in everything(tmp_path / name)] for name in "abc")
    assert first == same and first != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host=2", "--hosts=2"], "expected 0 <= host < hosts, got host 2 of 2"),
        (["--hosts=2", "--overwrite"], "--overwrite cannot be used with several hosts"),
        (["--batch_size=0"], "batch_size and max_new_tokens >= 1, got 0, 0 and 5"),
        (["--top_p=0"], "top_p in (0, 1], got 0.05, 0.0 and 0.0"),
        (["--encoder=/no/such"], "No folder '/no/such'"),
        (["--input=tests"], "tests is not a prepared data set"),
    ],
)
def test_mistakes(frozen, source, tmp_path, capsys, options, message):
    assert run(frozen, source, tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err


def test_existing_output_is_refused(frozen, source, tmp_path, capsys):
    assert run(frozen, source, source) == 1
    assert "already holds a finished data set" in capsys.readouterr().err
    assert len(everything(source)) == 10
    assert np.all(RecordSource(source).tasks == [records.TASKS.index(record.task) for record in everything(source)])
