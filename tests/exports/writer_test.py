"""The writer of exports: complete exports or none, from one process or several."""

import errno
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from geode_jax import exports
from geode_jax.exports import SPECS, Export, ExportError, ExportWriter, validate
from tests.helpers.contract import (
    FILES,
    HEADER,
    VIEWS,
    listing,
    make_scene,
    question,
    read_all,
    refusal,
    two_files,
    write,
)


def test_what_only_a_writer_can_get_wrong(tmp_path, workbench):
    manifest = json.loads((workbench / "manifest.json").read_text())

    def line(arrays, scene_id="a", split="train"):
        options = {"split": split, "manifest": manifest}
        message = refusal(exports.write_scene, tmp_path, scene_id, arrays, **options)
        assert not list(tmp_path.iterdir())
        return message

    scene = two_files(make_scene())[0]
    too_large = np.full((VIEWS, 6), 1e6, "f4")
    assert "not finite" in line(scene | {"vggt/camera_tokens": too_large})  # in float16
    assert "list is not a numpy array" in line({"vggt/depth": [1.0]})
    assert "dtype object" in line({"vggt/depth": np.array([[[None]]])})
    assert line({"teacher/features": make_scene()["teacher/features"]}).endswith(
        "unknown tensor name"
    )
    assert line({}) == "scene a: tensor *: the scene has no tensor"
    assert "split: must be one of train, val, test" in line(scene, split="dev")
    for name in ("", ".", "..", "../a", "a/b", ".hidden", "a b", "a\n", "é", "x" * 129, 3, None):
        assert line(scene, scene_id=name).startswith("manifest.json: id: must be letters, digits")


def test_the_same_export_is_the_same_bytes(pristine, tmp_path):
    again = listing(write(tmp_path / "again"))
    once = listing(pristine)
    for files in (once, again):
        del files["manifest.json"]  # `created` differs
    assert again == once
    assert set(once) == {*FILES[:3], "scenes/b.safetensors"}


def test_nothing_of_others_is_overwritten(export, tmp_path):
    before = listing(export)
    assert "is an export already" in refusal(write, export)
    assert listing(export) == before
    (export / "manifest.json").unlink()
    assert "is not empty and not an unfinished export" in refusal(write, export)
    assert "Not a directory" in refusal(write, export / "questions.jsonl")
    empty = tmp_path / "empty"
    empty.mkdir()
    Export(write(empty))


def _interrupted(folder: Path, **header) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        ExportWriter(folder, **{**HEADER, **header}) as writer,
    ):
        writer.add_scene("old", two_files(make_scene())[0], split="val")
        writer.add_questions([question(scene_id="old")])
        raise KeyboardInterrupt


def test_an_interrupted_export_is_no_export_and_is_started_over(tmp_path, pristine):
    folder = tmp_path / "e"
    _interrupted(folder)
    assert "unfinished" in refusal(Export, folder)
    before = listing(folder)
    assert "unfinished export of another producer" in refusal(write, folder, notes="other")
    assert listing(folder) == before
    _interrupted(folder)
    found, wanted = listing(write(folder)), listing(pristine)
    assert set(found) == set(wanted)
    assert found["questions.jsonl"] == wanted["questions.jsonl"]


@pytest.mark.parametrize("limit", [0, 400, 1500, 4000])
def test_a_full_disk_is_one_line_and_leaves_no_export(tmp_path, limit):
    """A limit on the size of files simulates a full disk; 400 bytes suffice for the marker only."""
    folder = tmp_path / "e"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    records = [question(id=f"q{i}") for i in range(100)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        line = refusal(write, folder, questions=records)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    name = {0: ".unfinished.json", 400: "a.safetensors", 1500: "a.safetensors"}
    assert line.startswith(str(folder))
    assert f"{name.get(limit, 'questions.jsonl')}: cannot be written: File too large" in line
    assert "missing" in refusal(Export, folder)
    assert not list(folder.rglob("*.part"))
    Export(write(folder))  # the next attempt works


def test_a_full_disk_for_the_manifest(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "e"
    writer = ExportWriter(folder, **HEADER)
    writer.add_scene("a", two_files(make_scene())[0], split="train")
    monkeypatch.setattr(exports.writer.os, "replace", full)
    line = f"{folder / 'manifest.json'}: cannot be written: No space left on device"
    assert refusal(writer.close) == line
    assert "missing" in refusal(Export, folder)
    assert not list(folder.rglob("*.part"))


def test_duplicates_and_empty_exports_are_refused(tmp_path):
    scene = two_files(make_scene())[0]
    with pytest.raises(ExportError, match="scenes: must be a non-empty list"):
        ExportWriter(tmp_path / "empty", **HEADER).close()
    with (
        pytest.raises(ExportError, match="duplicate scene a"),
        ExportWriter(tmp_path / "twice", **HEADER) as writer,
    ):
        writer.add_scene("a", scene, split="train")
        writer.add_scene("a", scene, split="val")


def test_scenes_written_elsewhere_are_registered(tmp_path):
    scene, teacher = two_files(make_scene())
    with ExportWriter(tmp_path / "e", **HEADER) as writer:
        manifest = pickle.loads(pickle.dumps(writer.manifest))
        options = {"split": "test", "manifest": manifest}
        writer.register(exports.write_scene(tmp_path / "e", "z", scene, teacher, **options))
        assert "sha256: missing" in refusal(writer.register, {"id": "y", "split": "test"})
    assert len(Export(tmp_path / "e").read_scene("z")) == len(SPECS)


def test_several_writers_fill_one_export_and_go_on_where_they_were_cut_off(tmp_path, pristine):
    """Two writers share a folder, the second is killed within a scene, and a third one closes."""
    folder = tmp_path / "e"
    scene, teacher = two_files(make_scene())
    first = ExportWriter(folder, **HEADER, resume=True)
    second = ExportWriter(folder, **HEADER, resume=True)
    first.add_scene("a", scene, split="train", teacher=teacher)
    second.add_scene("b", two_files(make_scene(1))[0], split="val")
    (folder / "scenes" / "c.safetensors.0.part").write_bytes(b"cut off")
    assert "unfinished" in refusal(Export, folder)
    again = ExportWriter(folder, **HEADER, resume=True)
    assert again.finished().keys() == {"a", "b"}
    line = "is an unfinished export of another producer"
    assert line in refusal(ExportWriter, folder, **{**HEADER, "notes": "other"}, resume=True)
    with ExportWriter.reopen(folder) as last:
        for entry in last.finished().values():
            last.register(entry)
        last.add_questions([question()])
    found, wanted = listing(folder), listing(pristine)
    assert set(found) == set(wanted)
    del found["manifest.json"], wanted["manifest.json"]  # `created` differs
    assert found == wanted
    assert validate(folder)["scenes"] == 2
    assert "is an export already" in refusal(ExportWriter, folder, **HEADER, resume=True)
    assert "is no unfinished export" in refusal(ExportWriter.reopen, folder)


def linked(export: Path, folder: Path) -> Path:
    """Copies an export as in a cache of a hub or DVC: relative links to files of other names."""
    for number, path in enumerate(sorted(p for p in export.rglob("*") if p.is_file())):
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / "blobs" / str(number))
        link = folder / "snapshot" / path.relative_to(export)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * len(link.relative_to(folder).parent.parts)
        link.symlink_to(f"{up}blobs/{number}")
    return folder / "snapshot"


@pytest.mark.parametrize("same_disk", [True, False])
def test_scenes_of_an_export_of_links_are_adopted_as_files(
    pristine, tmp_path, monkeypatch, same_disk
):
    source = Export(linked(pristine, tmp_path))
    if not same_disk:

        def no_link(*_):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", no_link)
    with ExportWriter(tmp_path / "new", **source.header()) as writer:
        for scene_id in source.scene_ids():
            writer.adopt_scene(source, scene_id)
    files = [path for path in (tmp_path / "new").rglob("*") if not path.is_dir()]
    assert files and not any(path.is_symlink() for path in files)
    read_all(tmp_path / "new", True)
    (tmp_path / "snapshot" / "scenes" / "a.safetensors").unlink()
    (tmp_path / "snapshot" / "scenes" / "a.safetensors").symlink_to("a.safetensors")
    with ExportWriter(tmp_path / "other", **source.header()) as writer:
        refusal(writer.adopt_scene, source, "a")
        (tmp_path / "snapshot" / "scenes" / "a.safetensors").unlink()
        (tmp_path / "snapshot" / "scenes" / "a.safetensors").symlink_to("/dev/zero")
        assert "is not a regular file" in refusal(writer.adopt_scene, source, "a")
        writer.adopt_scene(source, "b")


def test_an_export_has_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        folder = write(tmp_path / "export")
    finally:
        os.umask(before)
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_without_resume_a_half_filled_export_is_started_over(tmp_path, pristine):
    folder = tmp_path / "e"
    writer = ExportWriter(folder, **HEADER, resume=True)
    writer.add_scene("old", two_files(make_scene())[0], split="val")
    assert set(listing(write(folder))) == set(listing(pristine))
    damaged = ExportWriter(tmp_path / "d", **HEADER, resume=True)
    (tmp_path / "d" / ".entries").mkdir()
    (tmp_path / "d" / ".entries" / "a.json").write_text('{"id": "a", "split": "train"}')
    assert "sha256: missing" in refusal(damaged.finished)


@pytest.mark.parametrize(
    "header",
    [{"categories": ["a", "b", "c"]}, {"scale": "scene"}, {"teacher_tokenizer": "0" * 64}],
    ids=lambda header: next(iter(header)),
)
def test_scenes_are_taken_over_under_the_same_header_alone(tmp_path, pristine, header):
    export = Export(pristine)
    refused = pytest.raises(ExportError, match=f"{next(iter(header))}: differs from that of")
    with refused, ExportWriter(tmp_path / "e", **{**export.header(), **header}) as writer:
        writer.adopt_scene(export, "a")
