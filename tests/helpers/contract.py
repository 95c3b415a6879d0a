"""An export with every tensor of the contract, and ways to damage it."""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import settings

from geode_jax import exports
from geode_jax.exports import SPECS, Export, ExportError, ExportWriter

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
    """Returns a scene with every tensor of the contract; teacher tensors under `teacher/`."""
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
    arrays["target/depth_weight"] %= 1
    arrays["vggt/tokens"] = arrays["vggt/tokens"].astype("f2")
    arrays["vggt/camera_tokens"] = arrays["vggt/camera_tokens"].astype("f2")
    rotation = np.linalg.qr(rng.normal(size=(VIEWS, 3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))[:, None, None]
    arrays["camera/extrinsic"][:, :, :3] = rotation
    arrays["camera/intrinsic"][:] = [[5, 0, 2.5], [0, 5, 1.5], [0, 0, 1]]
    arrays["target/boxes"][:, 3:6] += 0.1
    return arrays


def two_files(arrays: dict) -> tuple[dict, dict]:
    """Returns the tensors of the scene's file and of the teacher's file."""
    scene = {n: a for n, a in arrays.items() if not n.startswith("teacher/")}
    teacher = {n[len("teacher/") :]: a for n, a in arrays.items() if n.startswith("teacher/")}
    return scene, teacher


def question(**changes) -> dict:
    """Returns a question with every field; a change to None removes a field."""
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


def refusal(call, *args, **kwargs) -> str:
    """Returns the message of the ExportError that the call must raise, one printable line."""
    with pytest.raises(ExportError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and message.isprintable()
    return message


def forge(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file and its checksum, as a faulty exporter would have written them."""
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
    """Asserts that writer and reader refuse a scene with the same message, and returns it.

    The reader's file is written by safetensors.
    """
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


def read_all(folder: Path, verify: bool) -> None:
    export = Export(folder)
    for scene_id in export.scene_ids():
        export.scene_shapes(scene_id)
        export.read_scene(scene_id, verify=verify)
    list(export.questions())


FILES = ["scenes/a.safetensors", "teacher/a.safetensors", "questions.jsonl", "manifest.json"]


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
