"""Rules of the tensors: writer and reader refuse every violation with the same line."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geode_jax.exports import SPECS, Export
from tests.helpers.contract import (
    VIEWS,
    few,
    forge_scene,
    make_scene,
    refusal,
    refused_both_ways,
    write,
)


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
        "an id is repeated at [2]",
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
    """In every type the number just within the bound is accepted, the one just beyond is not."""
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
    """The message names a tensor with that dimension; which one depends on the order of SPECS."""
    free = {"Cp", "I", "E", "H", "W", "F", "hb", "wb", "Z"}
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
    """Errors within the precision of a tensor's dtype are accepted, larger ones refused."""
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


def test_token_ids_need_a_vocabulary(export, tmp_path):
    """Token ids need the sha256 of their tokenizer in the manifest, which may else be absent."""
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
