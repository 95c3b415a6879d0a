import json
import os
import shutil
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from geode_jax.data import question_records
from geode_jax.data.control import control_of
from geode_jax.data.question_records import (
    answer_lengths,
    open_question_records,
    question_lengths,
)
from geode_jax.data.tokens import train_tokenizer
from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportError
from geode_jax.exports.prompts import prompt
from tests.helpers.exports import CATEGORIES, write_tiny_export


def by_scene(export: Export) -> dict[str, list[dict]]:
    scenes = defaultdict(list)
    for record in export.questions():
        scenes[record["scene_id"]].append(record)
    return dict(scenes)


def run(code: str) -> subprocess.Popen:
    preamble = (
        "import os, signal, sys\n"
        "from geode_jax.exports import Export\n"
        "from geode_jax.data import question_records\n"
    )
    return subprocess.Popen([sys.executable, "-W", "error", "-c", preamble + code])


def leftovers(export: Export) -> list[str]:
    names = {path.name for path in (export.folder / ".questions").iterdir()}
    return sorted(name for name in names if name.startswith(("tmp", "lengths")))


def test_every_scene_gives_its_questions_in_any_order(tiny_export):
    records = open_question_records(tiny_export)
    expected = by_scene(tiny_export)
    assert sorted(expected) == records.scene_ids("train") + records.scene_ids("val")
    assert records.scene_ids() == records.scene_ids("train") + records.scene_ids("val")
    for scene_id in np.random.default_rng(0).permutation(sorted(expected)):
        assert records.read(str(scene_id)) == expected[scene_id]
    everything = [r for scene_id in records.scene_ids("train") for r in expected[scene_id]]
    assert list(records.of_split("train")) == everything
    assert records.read("a scene without questions") == []


def test_records_are_array_record_files_made_once(tiny_export):
    folder = open_question_records(tiny_export).folder
    files = sorted(folder.rglob("*array_record*"))
    assert {file.name.split("-")[1].split(".")[0] for file in files} == {"train", "val"}
    times = [file.stat().st_mtime_ns for file in files]
    assert open_question_records(Export(tiny_export.folder)).folder == folder
    assert [file.stat().st_mtime_ns for file in files] == times


def test_tensorflow_is_never_imported(tmp_path):
    export = write_tiny_export(tmp_path / "export", train=2, val=0)
    process = run(
        f"records = question_records.open_question_records(Export({str(export.folder)!r}))\n"
        "assert records.read('scene001')\n"
        "import geode_jax.data.pipeline\n"
        "bad = {'tensorflow', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)\n"
    )
    assert process.wait() == 0


def test_two_processes_may_race_and_one_may_have_been_killed(tmp_path):
    export = write_tiny_export(tmp_path / "export", train=3, val=1)
    killed = run(
        "os.rename = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"question_records.open_question_records(Export({str(export.folder)!r}))\n"
    )
    assert killed.wait() == -9
    assert leftovers(export)
    racers = [
        run(f"question_records.open_question_records(Export({str(export.folder)!r}))\n")
        for _ in range(2)
    ]
    assert [racer.wait() for racer in racers] == [0, 0]
    assert not leftovers(export)
    records = open_question_records(export)
    assert {i: records.read(i) for i in records.scene_ids()} == by_scene(export)


def test_an_unwritable_export_uses_the_users_cache(tmp_path, monkeypatch):
    export = write_tiny_export(tmp_path / "export", train=2, val=0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (export.folder / ".questions").write_text("in the way")
    records = open_question_records(export)
    assert records.folder.is_relative_to(tmp_path / "cache")
    assert {i: records.read(i) for i in records.scene_ids()} == by_scene(export)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    export = write_tiny_export(tmp_path / "export", train=2, val=0)

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(question_records.os, "rename", no_space)
    with pytest.raises(UserError, match="cannot write records: No space left on device"):
        open_question_records(export)
    assert not leftovers(export)


def test_a_bad_question_stops_or_is_skipped_and_listed(tmp_path):
    export = write_tiny_export(tmp_path / "export", train=3, val=0)
    expected = by_scene(export)
    scene = export.folder / "scenes" / "scene001.safetensors"
    scene.write_bytes(scene.read_bytes()[:50])  # its questions cannot be checked
    export = Export(export.folder)
    with pytest.raises(ExportError, match="scene001"):
        open_question_records(export)
    records = open_question_records(export, on_bad="skip")
    assert len(records.dropped) == len(expected["scene001"])
    assert all("scene001" in line for line in records.dropped)
    assert records.read("scene001") == [] and records.read("scene002") == expected["scene002"]
    with pytest.raises(ExportError):  # what was skipped is not taken for the whole
        open_question_records(export)


def test_other_questions_or_splits_make_other_records(tmp_path):
    export = write_tiny_export(tmp_path / "a", train=3, val=0)
    first = open_question_records(export).folder
    shutil.copytree(export.folder, tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    manifest["scenes"][2]["split"] = "test"
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    records = open_question_records(Export(tmp_path / "b"))
    assert records.folder.name != first.name
    assert records.scene_ids("test") == ["scene002"]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("index.json", lambda data: data.replace(b"scene001", b"scene999")),
        ("index.json", lambda _: b"[1]"),
        ("index.json", lambda data: data.decode().encode("utf-16")),
        ("*train.array_record*", flip),
        ("*train.array_record*", lambda data: data[:-100]),
        ("dataset_info.json", flip),
        ("lengths*.npz", flip),
        ("lengths*.npz", lambda data: data[:-100]),
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path, pattern, damage):
    export = write_tiny_export(tmp_path / "export", train=3, val=0)
    tokenizer = train_tokenizer([prompt(q) for q in export.questions()], CATEGORIES, 3)

    def everything(folder):
        records = open_question_records(Export(folder))
        lengths = question_lengths(records, "train", tokenizer)
        return list(records.of_split("train")), {k: x.tolist() for k, x in lengths.items()}

    expected = everything(export.folder)
    # In another place, since a process checks the records of a folder once.
    copy = shutil.copytree(export.folder, tmp_path / "copy")
    (file,) = (copy / ".questions").rglob(pattern)
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert everything(copy) == expected
    assert file.read_bytes() != damage(before)


@pytest.mark.parametrize("name", ["tiny_export", "geode_export"])
def test_lengths_are_those_of_the_tokenizer(request, name):
    export = request.getfixturevalue(name)
    train = set(export.scene_ids("train"))
    questions = [q for q in export.questions() if q["scene_id"] in train]
    tokenizer = train_tokenizer([prompt(q) for q in questions], CATEGORIES, 3)
    records = open_question_records(export)
    lengths = question_lengths(records, "train", tokenizer)
    ids = records.scene_ids("train")
    assert [ids[i] for i in lengths["scene"]] == [q["scene_id"] for q in questions]
    assert lengths["kind"].tolist() == [q["kind"] for q in questions]
    assert lengths["question"].tolist() == [len(tokenizer.encode(prompt(q))) + 1 for q in questions]
    assert lengths["control"].tolist() == [control_of(q) for q in questions]
    for field in ("answer", "teacher_answer", "rationale"):
        expected = [
            len(tokenizer.encode(" " + q[field])) + 1 if field in q else 0 for q in questions
        ]
        assert lengths[field].tolist() == expected
        assert answer_lengths(lengths, field, controls=False).tolist() == expected
        if field == "answer":
            pairs = zip(questions, expected, strict=True)
            expected = [2 if control_of(q) else n for q, n in pairs]
        assert answer_lengths(lengths, field, controls=True).tolist() == expected
    # Now they come from a file: this stand-in cannot encode.
    again = question_lengths(records, "train", types.SimpleNamespace(sha256=tokenizer.sha256))
    assert all((again[name] == lengths[name]).all() for name in lengths)


def test_what_is_kept_has_the_modes_of_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export = write_tiny_export(tmp_path / "export", train=2, val=1)
    before = os.umask(0o027)
    try:
        records = open_question_records(export)
        question_lengths(records, "train", train_tokenizer(["How many?"], CATEGORIES, 1))
    finally:
        os.umask(before)
    kept = [path for path in (export.folder / ".questions", *records.folder.rglob("*"))]
    assert len(list(records.folder.glob("*.npz"))) == 1
    for path in kept:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_records_of_another_user_are_read_or_made_anew(tmp_path, monkeypatch):
    export = write_tiny_export(tmp_path / "export", train=2, val=0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = train_tokenizer(["How many?"], CATEGORIES, 1)
    shared = open_question_records(export)
    theirs = [export.folder / ".questions"]
    access = os.access

    def as_another(path, mode):
        inside = any(Path(path).is_relative_to(folder) for folder in theirs)
        return access(path, mode) and not (inside and mode & refused)

    monkeypatch.setattr(question_records.os, "access", as_another)
    refused = os.W_OK
    assert open_question_records(export).folder == shared.folder
    question_lengths(shared, "train", tokenizer)
    refused = os.R_OK | os.W_OK
    own = open_question_records(export)
    assert own.folder.is_relative_to(tmp_path / "cache")
    assert {i: own.read(i) for i in own.scene_ids()} == by_scene(export)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    homeless = open_question_records(export)
    assert open_question_records(export).folder == homeless.folder
    assert {i: homeless.read(i) for i in homeless.scene_ids()} == by_scene(export)
