"""The reader of exports: its results, and that it refuses damage without crashing."""

import copy
import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geode_jax import exports
from geode_jax.exports import Export, ExportError, validate
from tests.helpers.contract import (
    FILES,
    forge,
    forge_scene,
    make_scene,
    question,
    read_all,
    refusal,
)


def test_manifest_facts(pristine):
    export = Export(pristine)
    assert export.scene_ids() == ["a", "b"]
    assert export.scene_ids("val") == ["b"]
    assert export.categories == ["chair", "table", "lamp"]
    assert (export.patch_grid, export.token_width) == ((2, 3), 6)
    assert export.manifest["schema_version"] == exports.SCHEMA_VERSION
    assert export.scene_shapes("a") == {n: a.shape for n, a in make_scene().items()}
    assert list(export.questions()) == [question()]


def test_only_what_is_asked_for_is_read(export):
    (export / "teacher" / "a.safetensors").unlink()
    reader = Export(export)
    found = reader.read_scene("a", ["vggt/tokens", "target/boxes"])
    assert set(found) == {"vggt/tokens", "target/boxes"}
    # Tensors that the scene lacks are left out; names that the contract lacks are refused.
    assert set(reader.read_scene("b", ["vggt/tokens", "teacher/features"])) == {"vggt/tokens"}
    assert "unknown tensor name" in refusal(reader.read_scene, "a", ["tokens"])
    line = "scene a: tensor *: teacher/a.safetensors is missing"
    assert refusal(reader.read_scene, "a", ["teacher/features"]) == line
    assert refusal(reader.read_scene, "a") == line
    assert refusal(reader.read_scene, "../a") == "scene '../a': unknown scene"


def test_a_file_is_hashed_once_and_by_each_reader(pristine, monkeypatch):
    hashed = []
    original = hashlib.sha256
    reader = Export(pristine)
    monkeypatch.setattr(hashlib, "sha256", lambda: hashed.append(1) or original())
    for _ in range(3):
        reader.read_scene("a", ["vggt/tokens"])
        reader.read_scene("b", verify=False)
    assert len(hashed) == 1
    pickle.loads(pickle.dumps(Export(pristine))).read_scene("a")
    assert len(hashed) == 3


def test_verify_false_still_checks_shapes(workbench):
    arrays = make_scene()
    arrays["vggt/tokens"][0, 0, 0] = np.nan
    forge_scene(workbench, arrays)
    reader = Export(workbench)
    assert np.isnan(reader.read_scene("a", verify=False)["vggt/tokens"][0, 0, 0])
    refusal(reader.read_scene, "a")
    forge_scene(workbench, make_scene() | {"images": arrays["images"][:1]})
    assert "images" in refusal(Export(workbench).read_scene, "a", verify=False)


def test_missing_and_changed_files(export):
    path = export / "scenes" / "a.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    line = "scene a: tensor *: scenes/a.safetensors does not have the manifest's sha256"
    assert refusal(Export(export).read_scene, "a") == line
    path.unlink()
    line = "scene a: tensor *: scenes/a.safetensors is missing"
    assert refusal(Export(export).read_scene, "a") == line
    path.mkdir()
    assert "scenes/a.safetensors cannot be read" in refusal(Export(export).read_scene, "a")


def test_an_error_keeps_its_parts_between_processes(export):
    (export / "scenes" / "a.safetensors").unlink()
    with pytest.raises(ExportError) as caught:
        Export(export).read_scene("a")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert (again.where, again.field) == ("scene a", "tensor *")
    assert again.rule == "scenes/a.safetensors is missing"


class _Canary:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_ever_loaded(export, tmp_path):
    canary = tmp_path / "canary"
    pickled = pickle.dumps(_Canary(canary))
    pickle.loads(pickled)
    canary.unlink()  # unpickling does write the file
    npy, npz, torch_file = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(npy, np.array([_Canary(canary)], dtype=object), allow_pickle=True)
    np.savez(npz, a=np.array([_Canary(canary)], dtype=object))
    with zipfile.ZipFile(torch_file, "w") as archive:  # what torch.save writes
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    for data in (pickled, npy.getvalue(), npz.getvalue(), torch_file.getvalue()):
        for name in ("scenes/a.safetensors", "teacher/a.safetensors"):
            pristine_data = (export / name).read_bytes()
            forge(export, name, data)
            for verify in (True, False):
                line = refusal(Export(export).read_scene, "a", verify=verify)
                assert line.startswith(f"scene a: tensor *: {name} cannot be read")
            forge(export, name, pristine_data)
        forge(export, "questions.jsonl", data)
        assert refusal(list, Export(export).questions()).startswith("questions.jsonl")
    (export / "manifest.json").write_bytes(pickled)
    assert refusal(Export, export).startswith("manifest.json: not JSON")
    assert not canary.exists()


@settings(max_examples=100)
@given(data=st.data(), name=st.sampled_from(FILES), verify=st.booleans())
def test_damaged_bytes_are_refused_and_never_crash(pristine, workbench, data, name, verify):
    """Every damage is refused; with a forged checksum it may be read, but never crashes."""
    for file in FILES:
        shutil.copy(pristine / file, workbench / file)
    good = (pristine / name).read_bytes()
    damaged = bytearray(good)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(good) - 1)) :]
    else:
        # Half of the damage hits the first bytes, the header, which is parsed.
        places = st.one_of(st.integers(0, min(len(good), 900) - 1), st.integers(0, len(good) - 1))
        for place in data.draw(st.lists(places, min_size=1, max_size=4, unique=True)):
            damaged[place] ^= data.draw(st.integers(1, 255))
    damaged = bytes(damaged)
    (workbench / name).write_bytes(damaged)
    if name != "manifest.json":
        refusal(read_all, workbench, True)
        forge(workbench, name, damaged)
    try:
        read_all(workbench, verify)
    except ExportError as error:
        assert str(error).isprintable()
    try:
        exports.format_summary(validate(workbench, on_error="skip"))
    except ExportError as error:  # the manifest, or questions.jsonl as a whole
        assert error.where in ("manifest.json", "questions.jsonl")


@settings(max_examples=60)
@given(
    entry=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=6,
    ),
    data=st.data(),
)
def test_any_json_in_any_place_is_refused_or_read(pristine, workbench, entry, data):
    for file in FILES:
        shutil.copy(pristine / file, workbench / file)
    header = json.loads((workbench / "manifest.json").read_text())
    length = int.from_bytes((good := (workbench / FILES[0]).read_bytes())[:8], "little")
    tensors = json.loads(good[8 : 8 + length])
    document = data.draw(st.sampled_from([header, question(), tensors]))
    changed = copy.deepcopy(document)
    parent, key = changed, data.draw(st.sampled_from(list(changed)))
    while isinstance(parent[key], (dict, list)) and parent[key] and data.draw(st.booleans()):
        parent = parent[key]
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = data.draw(st.sampled_from(keys))
    parent[key] = entry
    text = json.dumps(changed).encode()
    if document is header:
        (workbench / "manifest.json").write_bytes(text)
    elif document is tensors:
        forge(workbench, FILES[0], len(text).to_bytes(8, "little") + text + good[8 + length :])
    else:
        forge(workbench, "questions.jsonl", text + b"\n")
    try:
        read_all(workbench, True)
        exports.format_summary(validate(workbench))
    except ExportError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(
    "name", ["manifest.json", "questions.jsonl", "scenes/a.safetensors", "teacher/a.safetensors"]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused(export, name, kind):
    (export / name).unlink()
    if kind == "pipe":
        os.mkfifo(export / name)
    else:
        (export / name).symlink_to("/dev/zero")
    for verify in (False, True):
        message = refusal(read_all, export, verify)
        assert Path(name).name in message and "not a regular file" in message
