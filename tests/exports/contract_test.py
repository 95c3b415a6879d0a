"""The array contract: exact round trips, and one line for everything that can be wrong.

Files are made and read here with safetensors' own functions wherever possible, so that the
contract is compared with something that is not ours.
"""

import ast
import copy
import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from geode_jax import exports
from geode_jax.exports import SPECS, Export, ExportError, ExportWriter, validate

HEADER = {
    "producer": {"project": "p", "commit": "c", "weights": "w", "licence": "l"},
    "dtype": "float16",
    "scale": "metric",
    "token_width": 6,
    "patch_grid": (2, 3),
    "tokens_contain_depth": True,
    "categories": ["chair", "table", "lamp"],
    "teacher_tokenizer": "7" * 64,
}
VIEWS, BOXES = 2, 3
few = settings(max_examples=30)


def make_scene(seed: int = 0) -> dict[str, np.ndarray]:
    """A scene with every tensor of the contract; teacher tensors under `teacher/`."""
    rng = np.random.default_rng(seed)
    sizes = {"V": VIEWS, "P": 6, "C": 6, "h": 4, "w": 6, "N": BOXES, "N*N": BOXES**2}
    sizes |= {"gh": 2, "gw": 3, "categories": 3, "H": 3, "W": 5, "hb": 2, "wb": 2}
    arrays = {}
    for name, spec in SPECS.items():
        shape = [int(dim) if dim.isdigit() else sizes.get(dim, 4) for dim in spec.dims.split()]
        dtype = {"F32": "f4", "U8": "u1", "I16": "i2", "I32": "i4"}[(spec.dtypes or ("F32",))[0]]
        arrays[name] = rng.integers(0, 3, shape).astype(dtype) + rng.random(shape).astype(dtype)
    for name in ("teacher/depth_bins", "teacher/detection_probs"):
        arrays[name] /= arrays[name].sum(-1, keepdims=True)
    left_above = rng.random((BOXES**2, 2), "f4")
    arrays["teacher/relations"] = np.stack([left_above, 1 - left_above], -1).reshape(-1, 4)
    arrays["teacher/answer_question"][:] = 0  # there is one question about the scene
    arrays["teacher/topk_id"] = rng.permuted(np.tile(np.arange(4, dtype="i4"), (4, 1)), axis=1)
    arrays["teacher/topk_logprob"] = -arrays["teacher/topk_logprob"] - np.float32(1.4)
    arrays["sonata/frame"] %= VIEWS
    arrays["vggt/tokens"] = arrays["vggt/tokens"].astype("f2")
    arrays["vggt/camera_tokens"] = arrays["vggt/camera_tokens"].astype("f2")
    rotation = np.linalg.qr(rng.normal(size=(VIEWS, 3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))[:, None, None]
    arrays["camera/extrinsic"][:, :, :3] = rotation
    arrays["camera/intrinsic"][:] = [[5, 0, 2.5], [0, 5, 1.5], [0, 0, 1]]
    arrays["target/boxes"][:, 3:6] += 0.1
    return arrays


def two_files(arrays: dict) -> tuple[dict, dict]:
    """Tensors of the scene's file and of the teacher's file."""
    scene = {n: a for n, a in arrays.items() if not n.startswith("teacher/")}
    teacher = {n[len("teacher/") :]: a for n, a in arrays.items() if n.startswith("teacher/")}
    return scene, teacher


def question(**changes) -> dict:
    """A question with every field; a change to None removes a field."""
    record = {
        "id": "q0",
        "scene_id": "a",
        "kind": "space_size",
        "question": "Is the chair near the table?",
        "answer": "Yes.",
        "teacher_answer": "Yes, it is.",
        "options": ["A. chair", "B. table"],
        "value": 1.5,
        "unit": "m",
        "box": [0, 0, 0, 1, 1, 1, 0.5],
        "rationale": "They are 0.2 m apart — near.",
        "relation": {"proximity": 1.0, "left_right": 0},
        "objects": [{"name": "chair", "box": [0, 0, 0, 1, 1, 1, 0], "index": 2}],
        "answers": ["Yes.", "Near."],
    }
    return {k: v for k, v in {**record, **changes}.items() if v is not None}


def write(folder: Path, arrays: dict | None = None, questions=None, **header) -> Path:
    with ExportWriter(folder, **{**HEADER, **header}) as writer:
        scene, teacher = two_files(arrays or make_scene())
        writer.add_scene("a", scene, split="train", teacher=teacher)
        writer.add_scene("b", two_files(make_scene(1))[0], split="val")
        writer.add_questions([question()] if questions is None else questions)
    return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """An export that tests read or copy, never change."""
    return write(tmp_path_factory.mktemp("exports") / "pristine")


@pytest.fixture
def export(pristine, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "export"))


@pytest.fixture(scope="module")
def workbench(pristine, tmp_path_factory) -> Path:
    """A copy that property tests damage; each example replaces what it needs first."""
    return Path(shutil.copytree(pristine, tmp_path_factory.mktemp("exports") / "workbench"))


def refusal(call, *args, **kwargs) -> str:
    """The message of the ExportError that the call must raise: one printable line."""
    with pytest.raises(ExportError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and message.isprintable()
    return message


def forge(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file and its checksum, as a maker with a bug would have written them."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    sha256 = hashlib.sha256(data).hexdigest()
    if name == "questions.jsonl":
        manifest["questions"] = {"count": data.count(b"\n"), "sha256": sha256}
    else:
        key = "sha256" if name.startswith("scenes/") else "teacher_sha256"
        manifest["scenes"][0][key] = sha256
    (folder / "manifest.json").write_text(json.dumps(manifest))


def forge_scene(folder: Path, arrays: dict) -> None:
    scene, teacher = two_files(arrays)
    tidy = {n: np.asarray(a, order="C") for n, a in scene.items()}
    forge(folder, "scenes/a.safetensors", safetensors.numpy.save(tidy))
    tidy = {n: np.asarray(a, order="C") for n, a in teacher.items()}
    forge(folder, "teacher/a.safetensors", safetensors.numpy.save(tidy))


def refused_both_ways(workbench: Path, arrays: dict) -> str:
    """Refused alike by the writer and, from a file of safetensors' own making, by the reader."""
    scene, teacher = two_files(arrays)
    manifest = json.loads((workbench / "manifest.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        options = {"split": "train", "manifest": manifest}
        on_writing = refusal(exports.write_scene, folder, "a", scene, teacher, **options)
        assert not list(Path(folder).iterdir())
    forge_scene(workbench, arrays)
    on_reading = refusal(Export(workbench).read_scene, "a")
    assert on_reading == on_writing
    return on_reading


# --- Round trips ----------------------------------------------------------------------------------


def test_round_trip_of_every_tensor_of_the_contract(pristine):
    arrays = make_scene()
    found = Export(pristine).read_scene("a")
    assert set(found) == set(SPECS) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_files_are_ordinary_safetensors(pristine):
    scene, teacher = two_files(make_scene())
    for kind, tensors in (("scenes", scene), ("teacher", teacher)):
        found = safetensors.numpy.load_file(pristine / kind / "a.safetensors")
        assert set(found) == set(tensors)
        for name, array in tensors.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


@few
@given(data=st.data())
def test_round_trip_is_exact_for_every_dtype(tmp_path_factory, data):
    """Bits, not values: denormals and negative zeros too, from any memory layout."""
    arrays = make_scene()
    free = [n for n, spec in SPECS.items() if not spec.rule and spec.dtypes]
    name = data.draw(st.sampled_from(free))
    numpy_types = {"F32": "f4", "F16": "f2", "BF16": ml_dtypes.bfloat16, "U8": "u1"}
    dtype = np.dtype(numpy_types[data.draw(st.sampled_from(SPECS[name].dtypes))])
    seed = data.draw(st.integers(0, 2**32 - 1))
    shape = arrays[name].shape
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    array = raw.view(dtype)[..., 0]
    if dtype.kind != "u":
        held = np.abs(array.astype("f4")) <= min(SPECS[name].largest, np.finfo("f4").max)
        array = np.where(held, array, np.zeros((), dtype))
    if data.draw(st.booleans()):
        array = np.asfortranarray(array)
    if dtype == "f4" and data.draw(st.booleans()):
        array = array.astype(">f4")
    arrays[name] = array
    folder = write(tmp_path_factory.mktemp("round"), arrays)
    found = Export(folder).read_scene("a", [name])[name]
    assert found.dtype == dtype
    wanted = np.ascontiguousarray(array.astype(dtype))
    assert found.tobytes() == wanted.tobytes()


@few
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=12, max_size=12))
def test_bfloat16_is_rounded_as_ml_dtypes_does(tmp_path_factory, bits):
    values = np.array(bits, np.uint32).view(np.float32)
    arrays = make_scene()
    values = np.where(np.abs(values) <= 0.99e6, values, values.dtype.type(1)).reshape(VIEWS, 6)
    arrays["vggt/camera_tokens"] = values
    folder = write(tmp_path_factory.mktemp("bf16"), arrays, dtype="bfloat16")
    found = Export(folder).read_scene("a")["vggt/camera_tokens"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, values.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("given_dtype", ["f2", "f4", ml_dtypes.bfloat16])
def test_tokens_are_converted_to_the_manifests_dtype(tmp_path, dtype, given_dtype):
    arrays = make_scene()
    arrays["vggt/tokens"] = arrays["vggt/tokens"].astype(given_dtype)
    found = Export(write(tmp_path / "e", arrays, dtype=dtype)).read_scene("a")["vggt/tokens"]
    assert found.dtype.name == dtype
    np.testing.assert_array_equal(found, arrays["vggt/tokens"].astype(dtype))


def test_bfloat16_without_ml_dtypes_is_read_as_float32(tmp_path, monkeypatch):
    arrays = make_scene()
    folder = write(tmp_path / "e", arrays, dtype="bfloat16")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    found = Export(folder).read_scene("a")["vggt/tokens"]
    assert found.dtype == np.float32
    wanted = arrays["vggt/tokens"].astype(ml_dtypes.bfloat16).astype("f4")
    np.testing.assert_array_equal(found, wanted)


def test_a_room_without_boxes(tmp_path):
    arrays = make_scene()
    for name in ("target/boxes", "target/labels", "teacher/detection_probs", "teacher/relations"):
        arrays[name] = arrays[name][:0]
    export = Export(write(tmp_path / "e", arrays, questions=[]))
    assert export.read_scene("a")["teacher/relations"].shape == (0, 4)


def test_every_tensor_may_be_absent(tmp_path):
    folder = write(tmp_path / "e", {"images": make_scene()["images"]}, questions=[])
    assert set(Export(folder).read_scene("a")) == {"images"}


# --- Reading --------------------------------------------------------------------------------------


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
    # What the scene lacks is left out; what the contract lacks is refused.
    assert set(reader.read_scene("b", ["vggt/tokens", "teacher/features"])) == {"vggt/tokens"}
    assert "unknown tensor name" in refusal(reader.read_scene, "a", ["tokens"])
    line = "scene a: tensor *: teacher/a.safetensors is missing"
    assert refusal(reader.read_scene, "a", ["teacher/features"]) == line
    assert refusal(reader.read_scene, "a") == line
    assert refusal(reader.read_scene, "../a") == "scene '../a': unknown scene"


def test_a_file_is_hashed_once_and_by_each_reader(pristine, monkeypatch):
    hashed = []
    original = exports.reader._sha256_of
    monkeypatch.setattr(
        exports.reader, "_sha256_of", lambda p: hashed.append(p.name) or original(p)
    )
    reader = Export(pristine)
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


# --- Refusals: tensors ----------------------------------------------------------------------------


def _set(name, index, value):
    def change(arrays):
        arrays[name][index] = value

    return change


def _replace(name, function):
    def change(arrays):
        arrays[name] = function(arrays[name])

    return change


def _drop(name):
    return lambda arrays: arrays.pop(name)


BAD_TENSORS = {
    "-inf pose": (_set("camera/extrinsic", (1, 0, 3), -np.inf), "camera/extrinsic", "not finite"),
    "NaN in half precision": (
        _replace("teacher/features", lambda a: np.full_like(a, np.nan, dtype="f2")),
        "teacher/features",
        "value at [0, 0, 0, 0] is not finite",
    ),
    "inf in bfloat16": (
        _replace("vggt/points", lambda a: np.full_like(a, np.inf, dtype=ml_dtypes.bfloat16)),
        "vggt/points",
        "not finite",
    ),
    "scaled rotation": (
        _replace("camera/extrinsic", lambda a: a * np.float32(1.01)),
        "camera/extrinsic",
        "rotation of view 0 is not orthonormal",
    ),
    "mirrored camera": (
        _replace("camera/extrinsic", lambda a: a * np.array([1, 1, -1, 1], "f4")),
        "camera/extrinsic",
        "rotation of view 0 has determinant -1",
    ),
    "huge rotation": (
        _set("camera/extrinsic", (0, 0, 0), 3e38),
        "camera/extrinsic",
        "rotation of view 0 is not orthonormal",
    ),
    "focal length": (
        _set("camera/intrinsic", (1, 0, 0), -5),
        "camera/intrinsic",
        "focal length of view 1 is not positive",
    ),
    "intrinsic row": (_set("camera/intrinsic", (0, 2, 2), 0), "camera/intrinsic", "view 0 is not"),
    "zero-size box": (
        _set("target/boxes", (1, 4), 0),
        "target/boxes",
        "size of box 1 is not positive",
    ),
    "negative box": (_set("target/boxes", (2, 3), -1), "target/boxes", "size of box 2"),
    "no label": (_set("target/labels", 0, -1), "target/labels", "-1 at [0] is not in [0, 3)"),
    "label 3": (_set("target/labels", 2, 3), "target/labels", "3 at [2] is not in [0, 3)"),
    "segment": (_set("target/segmentation", (0, 0, 0), -2), "target/segmentation", "[-1, 3)"),
    "depth": (_set("vggt/depth", (0, 1, 2), -0.1), "vggt/depth", "negative depth at [0, 1, 2]"),
    "target depth": (_set("target/depth", (0, 0, 0), -1), "target/depth", "negative depth"),
    "probability": (_set("teacher/depth_bins", (0, 0, 0, 1), 1.5), "teacher/depth_bins", "[0, 1]"),
    "negative probability": (
        _set("teacher/relations", (0, 0), -0.5),
        "teacher/relations",
        "probability at [0, 0] is not in [0, 1]",
    ),
    "sum of bins": (
        _replace("teacher/depth_bins", lambda a: a * np.float32(0.99)),
        "teacher/depth_bins",
        "do not sum to 1",
    ),
    "sum of classes": (
        _replace("teacher/detection_probs", lambda a: a * np.float32(0.99)),
        "teacher/detection_probs",
        "do not sum to 1",
    ),
    "above + below": (
        _set("teacher/relations", (4, slice(None)), (0.5, 0.5, 0.5, 0.4)),
        "teacher/relations",
        "probabilities at [4] do not sum to 1",
    ),
    "logit of a question before": (
        _set("teacher/answer_question", (0,), 3),
        "teacher/answer_question",
        "value at [1] is less than the one before",
    ),
    "negative id": (
        _set("teacher/topk_id", (1, 2), -1),
        "teacher/topk_id",
        "negative id at [1, 2]",
    ),
    "an id twice": (
        _set("teacher/topk_id", (2, slice(None)), (0, 1, 2, 1)),
        "teacher/topk_id",
        "an id stands twice at [2]",
    ),
    "more than all the probability": (
        _set("teacher/topk_logprob", (1, slice(None)), -1.2),
        "teacher/topk_logprob",
        "the probabilities at [1] have a sum above 1",
    ),
    "a point of no view": (
        _set("sonata/frame", (3,), VIEWS),
        "sonata/frame",
        "2 at [3] is not one of the 2 views",
    ),
    "negative answer id": (_set("teacher/answer_id", (1,), -1), "teacher/answer_id", "negative id"),
    "positive log-probability": (
        _set("teacher/topk_logprob", (1, 0), 0.5),
        "teacher/topk_logprob",
        "log-probability at [1, 0] is positive",
    ),
    "more than all probability": (
        _set("teacher/topk_logprob", 1, -0.1),
        "teacher/topk_logprob",
        "the probabilities at [1] have a sum above 1",
    ),
    "ids without probabilities": (
        _drop("teacher/topk_logprob"),
        "teacher/topk_id",
        "needs teacher/topk_logprob",
    ),
    "views differ": (
        _replace("vggt/depth", lambda a: a[:1]),
        "vggt/depth",
        "shape [1, 4, 6] is not [V, h, w] with V = 2",
    ),
    "views of the teacher": (
        _replace("teacher/features", lambda a: a[:1]),
        "teacher/features",
        "shape [1, 2, 3, 4] is not [V, gh, gw, F] with V = 2",
    ),
    "depth sizes differ": (_replace("target/depth", lambda a: a[:, :2]), "target/depth", "h = 4"),
    "token width": (_replace("vggt/tokens", lambda a: a[..., :5]), "vggt/tokens", "C = 6"),
    "patches": (_replace("vggt/tokens", lambda a: a[:, :4]), "vggt/tokens", "P = 6"),
    "grid": (_replace("teacher/features", lambda a: a[:, :1]), "teacher/features", "gh = 2"),
    "boxes and labels": (_replace("target/labels", lambda a: a[:2]), "target/labels", "N = 3"),
    "pairs": (_replace("teacher/relations", lambda a: a[:8]), "teacher/relations", "N*N = 9"),
    "classes": (
        _replace("teacher/detection_probs", lambda a: np.full((3, 4), 0.25, "f4")),
        "teacher/detection_probs",
        "categories = 3",
    ),
    "box of 6": (
        _replace("target/boxes", lambda a: a[:, :6]),
        "target/boxes",
        "shape [3, 6] is not [N, 7]",
    ),
    "not a multiple of the grid": (
        lambda arrays: arrays.update(
            {n: a[:, :3] for n, a in arrays.items() if SPECS[n].dims.startswith("V h w")}
        ),
        "vggt/depth",
        "(h, w) = (3, 6) is no multiple of the patch grid (2, 3)",
    ),
    "translation": (
        _set("camera/extrinsic", (1, 0, 3), -1e30),
        "camera/extrinsic",
        "translation of view 1 is beyond 1000 m",
    ),
    "tiny focal length": (
        _set("camera/intrinsic", (1, 0, 0), 1e-30),
        "camera/intrinsic",
        "focal length of view 1 is below 0.001 pixels",
    ),
    "no pixels": (_replace("images", lambda a: a[:, :0]), "images", "has no H"),
    "labels without boxes": (_drop("target/boxes"), "target/labels", "needs target/boxes"),
    "confidence without points": (_drop("vggt/points"), "vggt/points_conf", "needs vggt/points"),
    "double precision": (
        _replace("camera/extrinsic", lambda a: a.astype("f8")),
        "camera/extrinsic",
        "is not F32",
    ),
    "float labels": (
        _replace("target/labels", lambda a: a.astype("f4")),
        "target/labels",
        "dtype F32 is not I32 or I64",
    ),
    "unknown name": (lambda arrays: arrays.update(depth=np.ones(3, "f4")), "'depth'", "unknown"),
    "unknown teacher tensor": (
        lambda arrays: arrays.update({"teacher/logits": np.ones(3, "f4")}),
        "'teacher/logits'",
        "unknown tensor name",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_with_scene_tensor_and_rule(workbench, case):
    change, tensor, rule = BAD_TENSORS[case]
    arrays = make_scene()
    change(arrays)
    line = refused_both_ways(workbench, arrays)
    assert line.startswith(f"scene a: tensor {tensor}: ")
    assert rule in line


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.largest < np.inf])
def test_what_models_are_given_is_bounded(workbench, name):
    """The number just within the bound is held in every type, the one just beyond is not."""
    spec, arrays = SPECS[name], make_scene()
    types = {"F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
    place = (0, 0, 2) if name == "camera/intrinsic" else (0,) * arrays[name].ndim
    for dtype in [types[d] for d in spec.dtypes] or [arrays[name].dtype]:
        limit = min(spec.largest, float(ml_dtypes.finfo(dtype).max))
        grid = np.array(limit).astype(dtype)
        if grid > limit:
            grid = np.nextafter(grid, dtype.type(0))
        for sign in (1, -1):
            arrays[name] = make_scene()[name].astype(dtype)
            arrays[name][place] = sign * grid
            forge_scene(workbench, arrays)
            assert Export(workbench).read_scene("a")[name][place] == sign * grid
            with np.errstate(over="ignore"):
                beyond = np.nextafter(grid, dtype.type(np.inf))
                finite = np.isfinite(beyond)
            if finite:
                arrays[name][place] = sign * beyond
                line = refused_both_ways(workbench, arrays)
                assert line == f"scene a: tensor {name}: value at {list(place)} is beyond " + (
                    f"{spec.largest:g}"
                )


def _stored_float(name: str) -> bool:
    return not SPECS[name].dtypes or SPECS[name].dtypes[0].startswith("F")


@few
@given(data=st.data())
def test_any_not_finite_number_is_refused(workbench, data):
    arrays = make_scene()
    name = data.draw(st.sampled_from([name for name in SPECS if _stored_float(name)]))
    place = tuple(data.draw(st.integers(0, size - 1)) for size in arrays[name].shape)
    arrays[name][place] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    line = refused_both_ways(workbench, arrays)
    assert line == f"scene a: tensor {name}: value at {list(place)} is not finite"


@few
@given(data=st.data())
def test_any_wrong_rank_or_dtype_is_refused(workbench, data):
    arrays = make_scene()
    name = data.draw(st.sampled_from(list(SPECS)))
    array = arrays[name]
    types = {"F32": "f4", "F16": "f2", "U8": "u1", "I16": "i2", "I32": "i4", "I64": "i8"}
    allowed = SPECS[name].dtypes or tuple(types)[:2]  # the writer converts tokens
    wrong = [t for n, t in types.items() if n not in allowed] + ["f8", "?", "u2", "i1"]
    change = data.draw(st.sampled_from(["add an axis", "drop an axis", *wrong]))
    if change == "add an axis":
        arrays[name] = array[..., None]
    elif change == "drop an axis":
        arrays[name] = np.asarray(array[0])
    else:
        arrays[name] = array.astype(change)
    line = refused_both_ways(workbench, arrays)
    assert line.startswith(f"scene a: tensor {name}: {'shape' if 'axis' in change else 'dtype'} ")


@few
@given(data=st.data())
def test_any_size_that_others_share_is_refused(workbench, data):
    """The tensor named is one that has the dimension; which one, the order of SPECS decides."""
    free = {"Cp", "I", "E", "H", "W", "F", "hb", "wb", "B"}
    arrays = make_scene()
    name = data.draw(st.sampled_from(list(SPECS)))
    dims = SPECS[name].dims.split()
    axis = data.draw(st.sampled_from([i for i, dim in enumerate(dims) if dim not in free]))
    arrays[name] = np.repeat(arrays[name], 2, axis=axis)
    line = refused_both_ways(workbench, arrays)
    blamed = line.split(": ")[1].removeprefix("tensor ")
    assert dims[axis] in SPECS[blamed].dims or "N" in dims[axis]
    assert line.startswith(
        (f"scene a: tensor {blamed}: shape", f"scene a: tensor {blamed}: (h, w)")
    )


def test_tolerances(workbench):
    """Rounding to a tensor's own precision is no error; what is beyond it is."""
    rng = np.random.default_rng(0)
    bins = rng.random((VIEWS, 8, 8, 64), "f4")
    bins /= bins.sum(-1, keepdims=True)
    for dtype in ("f4", "f2", ml_dtypes.bfloat16):
        forge_scene(workbench, make_scene() | {"teacher/depth_bins": bins.astype(dtype)})
        Export(workbench).read_scene("a")
        wrong = (bins * 1.03).astype(dtype)
        line = refused_both_ways(workbench, make_scene() | {"teacher/depth_bins": wrong})
        assert "do not sum to 1" in line
    arrays = make_scene()
    arrays["camera/extrinsic"] = np.round(arrays["camera/extrinsic"], 4)
    forge_scene(workbench, arrays)
    Export(workbench).read_scene("a")


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


# --- Refusals: files ------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("kind", "prefix"), [("scenes", ""), ("teacher", "teacher/")])
def test_a_truncated_file_names_the_tensor_that_is_cut_off(export, kind, prefix):
    name = f"{kind}/a.safetensors"
    data = (export / name).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    last = prefix + max(header, key=lambda name: header[name]["data_offsets"][1])
    size = len(data)
    rule = f"{name} is truncated (needs at least {size} bytes, has {size - 1})"
    (export / name).write_bytes(data[:-1])
    assert refusal(Export(export).read_scene, "a") == f"scene a: tensor {last}: {rule}"
    forge(export, name, data[:-1])
    assert refusal(Export(export).read_scene, "a") == f"scene a: tensor {last}: {rule}"


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
    canary.unlink()  # the canary sings
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


def _read_all(folder: Path, verify: bool) -> None:
    export = Export(folder)
    for scene_id in export.scene_ids():
        export.scene_shapes(scene_id)
        export.read_scene(scene_id, verify=verify)
    list(export.questions())


FILES = ["scenes/a.safetensors", "teacher/a.safetensors", "questions.jsonl", "manifest.json"]


@settings(max_examples=100)
@given(data=st.data(), name=st.sampled_from(FILES), verify=st.booleans())
def test_damaged_bytes_are_refused_and_never_crash(pristine, workbench, data, name, verify):
    """With the checksum left alone every damage is refused; with a forged one, no other error."""
    for file in FILES:
        shutil.copy(pristine / file, workbench / file)
    good = (pristine / name).read_bytes()
    damaged = bytearray(good)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(good) - 1)) :]
    else:
        # Half of the damage goes to the first bytes: the header is where a parser can trip.
        places = st.one_of(st.integers(0, min(len(good), 900) - 1), st.integers(0, len(good) - 1))
        for place in data.draw(st.lists(places, min_size=1, max_size=4, unique=True)):
            damaged[place] ^= data.draw(st.integers(1, 255))
    damaged = bytes(damaged)
    (workbench / name).write_bytes(damaged)
    if name != "manifest.json":
        refusal(_read_all, workbench, True)
        forge(workbench, name, damaged)
    try:
        _read_all(workbench, verify)
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
        _read_all(workbench, True)
        exports.format_summary(validate(workbench))
    except ExportError as error:
        assert str(error).isprintable()


# --- Refusals: the manifest -----------------------------------------------------------------------


def test_missing_empty_and_unreadable_manifests(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        assert refusal(Export, folder).startswith(f"manifest.json: missing in {folder}: not an")
    for text, rule in (("", "not JSON"), ("{", "not JSON"), ("[]", "must be a JSON object")):
        (tmp_path / "manifest.json").write_text(text)
        assert rule in refusal(Export, tmp_path)
    for text in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        (tmp_path / "manifest.json").write_text(text)
        assert refusal(Export, tmp_path).startswith("manifest.json: not JSON")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    assert "not JSON" in refusal(Export, tmp_path)
    assert "Not a directory" in refusal(Export, tmp_path / "manifest.json")


SHA = "0" * 64
BAD_FIELDS = [
    ("schema_version", 2, "schema_version: must be 1, the version known here, is 2"),
    ("schema_version", "1", "schema_version: must be 1"),
    ("schema_version", True, "schema_version: must be 1"),
    ("dtype", "float64", "dtype: must be float16"),
    ("dtype", ["float16"], "dtype: must be float16"),
    ("scale", "feet", "scale: must be metric or scene"),
    ("token_width", 0, "token_width: must be a positive integer"),
    ("token_width", 6.0, "token_width: must be"),
    ("patch_grid", [2], "patch_grid: must be two positive integers"),
    ("patch_grid", [2, -3], "patch_grid: must be"),
    ("tokens_contain_depth", 1, "tokens_contain_depth: must be true or false"),
    ("categories", ["chair", "chair"], "categories: must be a list of different"),
    ("categories", "chair", "categories: must be a list"),
    ("notes", None, "notes: must be a string"),
    ("created", "", "created: must be"),
    ("producer", {"project": "p"}, "producer: commit must be a non-empty string"),
    ("producer", None, "producer: must be an object"),
    ("questions", {"count": -1, "sha256": SHA}, "questions: count must be"),
    ("questions", {"count": 1}, "questions: must have count and sha256"),
    ("scenes", [], "scenes: must be a non-empty list"),
    ("scenes", {}, "scenes: must be a non-empty list"),
    ("scenes", ["a"], "scenes[0].: must be a JSON object"),
    ("scenes", [{"id": "../a", "split": "val", "sha256": SHA}], "scenes[0].id: must be letters"),
    ("scenes", [{"id": "a", "split": "dev", "sha256": SHA}], "scenes[0].split: must be one of"),
    ("scenes", [{"id": "a", "split": "val", "sha256": "A" * 64}], "scenes[0].sha256: must be"),
    ("scenes", [{"id": "a", "split": "val"}], "scenes[0].sha256: missing"),
    ("scenes", [{"id": "a", "split": "val", "sha256": SHA}] * 2, "scenes[1].id: duplicate scene a"),
    ("extra", 1, "'extra': unknown field"),
    ("categories", ["a" * 1001, "b"], "categories: must be a list of different non-empty strings"),
    ("producer", {"a." * 501: "b"}, "producer: a key has more than 1000 characters"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD_FIELDS)
def test_bad_manifests(export, field, value, rule):
    manifest = json.loads((export / "manifest.json").read_text())
    (export / "manifest.json").write_text(json.dumps(manifest | {field: value}))
    assert refusal(Export, export).startswith(f"manifest.json: {rule}")
    if field in manifest:
        (export / "manifest.json").write_text(
            json.dumps({k: v for k, v in manifest.items() if k != field})
        )
        assert refusal(Export, export) == f"manifest.json: {field}: missing"


@pytest.mark.parametrize("names", [["a/" * 100_000], [f"x/{i}" for i in range(100_000)]])
def test_names_of_any_length_and_number_are_refused_at_once(export, names):
    data = safetensors.numpy.save({name: np.zeros(1, np.uint8) for name in names})
    forge(export, "scenes/a.safetensors", data)
    start = time.process_time()
    assert len(refusal(Export(export).read_scene, "a")) < 200
    forge(export, "scenes/a.safetensors", data[:-1])
    assert len(refusal(Export(export).read_scene, "a")) < 200
    assert time.process_time() - start < 5


def test_token_ids_need_a_vocabulary(export, tmp_path):
    """Ids mean nothing without the tokenizer they belong to; without ids it may be absent."""
    rule = "needs teacher_tokenizer in the manifest: whose ids these are"
    line = refusal(write, tmp_path / "without", teacher_tokenizer="")
    assert line == f"scene a: tensor teacher/answer_id: {rule}"
    arrays = {name: array for name, array in make_scene().items() if SPECS[name].dims[0] != "T"}
    assert (
        "teacher_tokenizer"
        not in Export(write(tmp_path / "none", arrays, teacher_tokenizer="")).manifest
    )
    manifest = json.loads((export / "manifest.json").read_text())
    (export / "manifest.json").write_text(json.dumps(manifest | {"teacher_tokenizer": "llama"}))
    assert "teacher_tokenizer: must be a sha256" in refusal(Export, export)


# --- Refusals: questions --------------------------------------------------------------------------

BOX = [0, 0, 0, 1, 1, 1, 0]
CHOICE = {"kind": "object_rel_distance", "answer": "A", "value": None, "unit": None}
COUNT = {"kind": "object_counting", "answer": "3", "value": None, "unit": None}
BAD_QUESTIONS = [
    ({"scene_id": "c"}, "scene_id: unknown scene 'c'"),
    ({"scene_id": None}, "scene_id: missing"),
    ({"question": ""}, "question: must be a non-empty string"),
    ({"question": " \n"}, "question: must be a non-empty string"),
    ({"question": "\ud800"}, "question: must be a non-empty string"),
    ({"answer": ""}, "answer: must be a non-empty string"),
    ({"answer": 3}, "answer: must be a non-empty string"),
    ({"kind": ""}, "kind: must be"),
    ({"id": ""}, "id: must be"),
    ({"value": float("nan")}, "value: must be a finite number"),
    ({"value": float("-inf")}, "value: must be a finite number"),
    ({"value": 10**400}, "value: must be a finite number"),
    ({"value": True}, "value: must be a finite number"),
    ({"value": "3"}, "value: must be a finite number"),
    ({"kind": "object_counting", "value": None}, "value: missing, and the answer 'Yes.' is no"),
    ({"kind": "space_size", "value": None, "answer": "nan"}, "value: missing"),
    ({"options": "A. chair"}, "options: must be a list of strings"),
    ({"options": []}, "options: must be a list of strings"),
    ({"options": ["A. chair", 2]}, "options: must be a list of strings"),
    (CHOICE | {"value": 1.2}, "value: a choice among options has none"),
    (CHOICE | {"options": ["A. x", "A. y"]}, "options: two have the same letter"),
    (CHOICE | {"options": ["A. x", "y"]}, "options: some have a letter in front"),
    (CHOICE | {"answer": "C"}, "answer: C is the letter of none of the 2 options"),
    (CHOICE | {"answer": "(C) z"}, "answer: C is the letter of none"),
    (CHOICE | {"options": ["x", "y"], "answer": "C."}, "answer: C is the letter of none"),
    ({"answer": "3", "value": 5.0}, "value: another number than that of the answer"),
    ({"answer": "300 cm", "value": 5.0}, "value: another number than that of the answer"),
    (COUNT | {"value": 3.5}, "value: a count must be a whole number"),
    (COUNT | {"answer": "-2"}, "value: a count must be a whole number"),
    ({"unit": "rad"}, "unit: one of angle, where the kind asks for one of length"),
    ({"unit": "m2"}, "unit: one of area, where the kind asks for one of length"),
    (COUNT | {"unit": "m"}, "unit: one of length, where the kind asks for one of count"),
    ({"answers": [""]}, "answers: must be a list of strings"),
    ({"box": BOX[:6]}, "box: must be 7 finite numbers"),
    ({"box": [0, 0, 0, 1, 0, 1, 0]}, "box: must be 7 finite numbers with positive sizes"),
    ({"relation": {}}, "relation: must be"),
    ({"relation": {"near": 1.0}}, "relation: unknown relation 'near'"),
    ({"relation": {"contact": 1.1}}, "relation: contact must be a probability"),
    ({"relation": {"contact": float("nan")}}, "relation: contact must be a probability"),
    ({"objects": []}, "objects: must be a non-empty list"),
    ({"objects": [{"name": "chair"}]}, "objects: [0] must have name, box"),
    ({"objects": [{"name": "chair", "box": BOX, "id": 3}]}, "objects: [0] must have name, box"),
    ({"objects": [{"name": "", "box": BOX}]}, "objects: [0] name"),
    ({"objects": [{"name": "chair", "box": [*BOX[:6], float("inf")]}]}, "objects: [0] box"),
    ({"objects": [{"name": "chair", "box": BOX, "index": -1}]}, "objects: [0] index"),
    ({"objects": [{"name": "chair", "box": BOX, "index": 3}]}, "objects: [0] index 3 is not a row"),
    ({"source": ""}, "source: must be a non-empty string"),
    *(
        ({name: "a." * 501}, f"{name}: must be a non-empty string of at most 1000 characters")
        for name in ("id", "kind", "source", "unit", "scene_id")
    ),
    ({"objects": [{"name": "a" * 1001, "box": BOX}]}, "objects: [0] name must be"),
    ({"colour": "red"}, "'colour': unknown field"),
]


@pytest.mark.parametrize(("changes", "rule"), BAD_QUESTIONS)
def test_bad_questions_are_refused_with_line_field_and_rule(export, tmp_path, changes, rule):
    good, bad = question(id="good"), question(**changes)
    data = b"".join(
        json.dumps(record).encode() + b"\n" for record in (good, bad, good | {"id": "z"})
    )
    forge(export, "questions.jsonl", data)
    on_reading = refusal(list, Export(export).questions())
    assert on_reading.startswith(f"questions.jsonl:2: {rule}")
    assert refusal(write, tmp_path / "new", questions=[good, bad]) == on_reading
    refusal(Export, tmp_path / "new")
    dropped = []
    assert [record["id"] for record in Export(export).questions(dropped)] == ["good", "z"]
    assert [str(error) for error in dropped] == [on_reading]


def test_more_bad_questions(export):
    twice = json.dumps(question()).encode() + b"\n"
    forge(export, "questions.jsonl", twice * 2)
    line = "questions.jsonl:2: id: duplicate question id 'q0'"
    assert refusal(list, Export(export).questions()) == line
    for text in (b"[]\n", b"\n", b"{\n", b"[" * 100_000 + b"\n", b"\xff\n"):
        forge(export, "questions.jsonl", text)
        assert refusal(list, Export(export).questions()).startswith("questions.jsonl:1: ")
    (export / "questions.jsonl").write_bytes(twice)
    line = "questions.jsonl: does not have the manifest's sha256"
    assert refusal(list, Export(export).questions()) == line
    forge(export, "questions.jsonl", twice[:-1])  # one line, where `forge` counts its end
    line = "questions.jsonl: count: 1 lines, the manifest says 0"
    assert refusal(list, Export(export).questions()) == line
    (export / "questions.jsonl").unlink()
    assert "cannot be read" in refusal(list, Export(export).questions())


def test_numbers_and_choices_that_agree_are_kept(tmp_path):
    feet = {"question": "How far, in feet?", "answer": "6.2", "value": 1.89, "unit": "m"}
    changes = [
        *(COUNT, COUNT | {"value": 3.0, "unit": "items"}, CHOICE, CHOICE | {"answer": "A. chair"}),
        *(CHOICE | {"options": ["x", "y"], "answer": "B"}, CHOICE | {"answer": "chair"}, feet),
        *({"answer": "1.4", "value": 1.4371}, {"answer": "2", "value": 1.6}),
        *(
            {"answer": "187.2 cm", "value": 1.8719},
            {"answer": "5'11\"", "value": 71.0, "unit": "in"},
        ),
        *({"answer": "about 1,500 m"}, {"unit": "furlongs"}),
        {"kind": "object_size_estimation", "answer": "190", "value": 1.9},
    ]
    records = [question(id=f"q{i}", **change) for i, change in enumerate(changes)]
    assert list(Export(write(tmp_path / "e", questions=records)).questions()) == records


# --- Writing --------------------------------------------------------------------------------------


def _listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_export_is_the_same_bytes(pristine, tmp_path):
    again = _listing(write(tmp_path / "again"))
    once = _listing(pristine)
    for listing in (once, again):
        del listing["manifest.json"]  # `created`
    assert again == once
    assert set(once) == {*FILES[:3], "scenes/b.safetensors"}


def test_nothing_of_others_is_overwritten(export, tmp_path):
    before = _listing(export)
    assert "is an export already" in refusal(write, export)
    assert _listing(export) == before
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
    before = _listing(folder)
    assert "unfinished export of another producer" in refusal(write, folder, notes="other")
    assert _listing(folder) == before
    _interrupted(folder)
    found, wanted = _listing(write(folder)), _listing(pristine)
    assert set(found) == set(wanted)
    assert found["questions.jsonl"] == wanted["questions.jsonl"]


@pytest.mark.parametrize("limit", [0, 400, 1500, 4000])
def test_a_full_disk_is_one_line_and_leaves_no_export(tmp_path, limit):
    """The limit on a file's size stands for the full disk; 400 bytes hold the marker only."""
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
    Export(write(folder))  # and the next attempt works


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


def test_bad_headers_duplicates_and_empty_exports(tmp_path):
    for field, value, _ in BAD_FIELDS[3:14]:
        if field in HEADER:
            line = refusal(ExportWriter, tmp_path / "e", **{**HEADER, field: value})
            assert line.startswith(f"manifest.json: {field}: ")
    assert not (tmp_path / "e").exists()
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
    """Two writers, the second killed in the middle of a scene, then one that only closes."""
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
    found, wanted = _listing(folder), _listing(pristine)
    assert set(found) == set(wanted)
    del found["manifest.json"], wanted["manifest.json"]  # `created`
    assert found == wanted
    assert validate(folder)["scenes"] == 2
    assert "is an export already" in refusal(ExportWriter, folder, **HEADER, resume=True)
    assert "is no unfinished export" in refusal(ExportWriter.reopen, folder)


def linked(export: Path, folder: Path) -> Path:
    """The export as a hub's cache or DVC has it: relative links to files of other names."""
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
    _read_all(tmp_path / "new", True)
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
        message = refusal(_read_all, export, verify)
        assert Path(name).name in message and "not a regular file" in message


def test_without_resume_a_half_filled_export_is_started_over(tmp_path, pristine):
    folder = tmp_path / "e"
    writer = ExportWriter(folder, **HEADER, resume=True)
    writer.add_scene("old", two_files(make_scene())[0], split="val")
    assert set(_listing(write(folder))) == set(_listing(pristine))
    damaged = ExportWriter(tmp_path / "d", **HEADER, resume=True)
    (tmp_path / "d" / ".entries").mkdir()
    (tmp_path / "d" / ".entries" / "a.json").write_text('{"id": "a", "split": "train"}')
    assert "sha256: missing" in refusal(damaged.finished)


def test_answers_are_of_questions_that_there_are(tmp_path):
    arrays = make_scene()
    arrays["teacher/answer_question"][-1] = 1
    folder = write(tmp_path / "e", arrays)
    rule = "question 1, and the scene has 1"
    assert refusal(exports.validate, folder).endswith(rule)
    dropped = exports.validate(folder, on_error="skip")["dropped"]
    assert dropped == [("scene a", "tensor teacher/answer_question", rule)]


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


def test_a_token_of_the_teachers_answers_takes_8_and_6_k_bytes(tmp_path):
    """As the contract's documentation and the exporter's README say."""
    for tokens in (10, 20):
        teacher = {
            "answer_question": np.zeros(tokens, np.int32),
            "answer_id": np.zeros(tokens, np.int32),
            "topk_id": np.tile(np.arange(16, dtype=np.int32), (tokens, 1)),
            "topk_logprob": np.full((tokens, 16), -3, np.float16),
        }
        with ExportWriter(tmp_path / str(tokens), **HEADER) as writer:
            writer.add_scene("a", two_files(make_scene())[0], split="train", teacher=teacher)
    small, large = (
        (tmp_path / n / "teacher" / "a.safetensors").stat().st_size for n in ("10", "20")
    )
    assert abs(large - small - 10 * 104) < 16  # the headers' padding


# --- Validating -----------------------------------------------------------------------------------


def test_validate_summary(pristine, capsys):
    summary = validate(pristine, progress=True)
    assert "scenes" in capsys.readouterr().err
    assert (summary["scenes"], summary["splits"]) == (2, {"train": 1, "val": 1})
    assert summary["questions"] == {"space_size": 1}
    assert summary["dropped"] == [] and summary["dropped_questions"] == 0
    assert summary["bytes"] == sum(len(data) for data in _listing(pristine).values())
    table = {row["name"]: row for row in summary["tensors"]}
    assert list(table) == list(SPECS)
    assert table["vggt/tokens"] == {
        "name": "vggt/tokens",
        "shape": ["2", "6", "6"],
        "dtype": "float16",
        "scenes": 2,
    }
    assert table["teacher/features"]["scenes"] == 1
    text = exports.format_summary(summary)
    assert "scenes: 2 (1 train, 1 val)" in text
    assert "[2, 6, 6]" in text and "space_size" in text


def test_validate_stops_or_skips_and_counts(export):
    arrays = make_scene()
    arrays["vggt/depth"][0, 0, 0] = -1
    forge_scene(export, arrays)
    records = [
        question(),
        question(id="b", scene_id="b", objects=None),
        question(id="c", answer=""),
    ]
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    forge(export, "questions.jsonl", data)
    assert refusal(validate, export).startswith("scene a: tensor vggt/depth: negative")
    summary = validate(export, on_error="skip")
    assert (summary["scenes"], summary["splits"]) == (1, {"val": 1})
    assert (summary["questions"], summary["dropped_questions"]) == ({"space_size": 1}, 2)
    assert [where for where, _, _ in summary["dropped"]] == ["scene a", "questions.jsonl:3"]
    records = [question(id=f"q{i}") for i in range(5)]
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    forge(export, "questions.jsonl", data)
    (export / "scenes" / "a.safetensors").unlink()  # each question about it fails too: one line
    line = ("scene a", "tensor *", "scenes/a.safetensors is missing")
    assert validate(export, on_error="skip")["dropped"] == [line]
    text = exports.format_summary(summary)
    assert "dropped, with 2 questions:" in text
    assert "  scene a: tensor vggt/depth: negative depth at [0, 0, 0] (0 means missing)" in text
    assert "on_error" in refusal(validate, export, on_error="ignore")


# --- The package by itself ------------------------------------------------------------------------

ALONE = """
import importlib.util, sys, warnings
warnings.simplefilter("error")
spec = importlib.util.spec_from_file_location(
    "exports", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]]
)
exports = importlib.util.module_from_spec(spec)
sys.modules["exports"] = exports
spec.loader.exec_module(exports)
import numpy as np
sys.modules["ml_dtypes"] = sys.modules["tqdm"] = None
producer = dict(project="p", commit="c", weights="w", licence="l")
with exports.ExportWriter(sys.argv[2], producer=producer, dtype="bfloat16", scale="scene",
        token_width=2, patch_grid=(1, 1), tokens_contain_depth=False, categories=[]) as writer:
    writer.add_scene("a", {"vggt/tokens": np.ones((1, 1, 2), np.float32)}, split="test")
summary = exports.validate(sys.argv[2], progress=True)
assert summary["tensors"][0]["dtype"] == "float32", summary
loaded = {"jax", "torch", "tensorflow", "geode_jax", "flax"} & set(sys.modules)
assert not loaded, loaded
"""


FOLDER = Path(exports.__file__).parent


def test_the_package_stands_alone(tmp_path):
    """Loaded by path in an isolated interpreter, as an exporter in another environment does."""
    command = [sys.executable, "-I", "-c", ALONE, str(FOLDER), str(tmp_path / "e")]
    subprocess.run(command, check=True, timeout=120)
    tokens = Export(tmp_path / "e").read_scene("a")["vggt/tokens"]
    assert tokens.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_the_package_is_python_3_9_and_imports_little(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    top = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }
    known = {"numpy", "safetensors", "ml_dtypes", "tqdm"}
    if path.name == "pictures.py":  # which the package itself does not import
        known.add("PIL")
    assert top - sys.stdlib_module_names <= known
