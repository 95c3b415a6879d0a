"""The array contract: everything that comes from outside reaches the trainer through an export.

An export is a folder, written by whoever made the arrays (VGGT, Sonata, a teacher, a sensor, the
embedded rooms) and checked on reading, so that the trainer never knows who made an array:

    manifest.json                   schema version, producer, dtype, scenes with their sha256
    scenes/<scene_id>.safetensors   tensors of `SPECS`
    teacher/<scene_id>.safetensors  optional, the `teacher/` tensors of `SPECS`, names without it
    questions.jsonl                 one question a line

Conventions: the world frame is metric and z up where the producer can say so (`scale: metric`), a
camera is camera-from-world with OpenCV axes (x right, y down, z forward), intrinsics are in pixels
of the (h, w) depth map with pixel centres at integers, a box is (centre xyz, size xyz, yaw about
z in radians), depth 0 means missing. Every tensor is optional: an absent array is a loss that is
not paid.

Everything a file can have wrong is refused by `ExportError` in one line: where, what, which rule.
Nothing here can load pickle: JSON and safetensors are the only formats.

This package stands alone (numpy and safetensors; tqdm for the progress bar when installed; Python
3.9), so that an exporter can load it by path inside another project's environment.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from . import cameras, files, question_rules, scene_names, tensor_files

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
RELATIONS = (
    "left_right",
    "above_below",
    "proximity",
    "contact",
    "size_comparison",
    "orientation",
)
"""Names of a question's `relation`; the number is the probability of the first alternative."""
NUMERIC_KINDS = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
    "surface_distance",
    "camera_motion",
    "space_size",
)
"""Kinds whose answer is a number: they carry `value`, or an answer that reads as a number."""

LONGEST_NAME = 1000
"""Characters of an id or a name at most: they stand in messages, tables and search patterns."""
ROTATION_TOLERANCE = 1e-3
"""Largest entry of |R R^T - I|: poses are often read from text with four decimals."""
PROBABILITY_TOLERANCE = {"F32": 1e-4, "F16": 2e-3, "BF16": 1e-2}
"""Largest |sum - 1|: two units in the last place of numbers just below 1, and headroom."""

MASS_TOLERANCE = {"F32": 1e-3, "F16": 5e-3, "BF16": 3e-2}
"""By which the sum of stored log-probabilities' exponentials may exceed 1: their rounding."""
LARGEST_FEATURE = 1e6
"""Largest feature that a model may be given: beyond, squares and sums leave the range in which
float32 and bfloat16 can be trusted, and a network's activations are 1e5 at most."""
LARGEST_PLACE = 1000.0
"""Largest coordinate of a camera or a point, metres (or scene units): no room's frame is larger."""
LARGEST_PIXEL = 1e6
"""Largest entry of an intrinsic, pixels."""
LEAST_FOCAL = 1e-3
"""Least focal length, pixels: an intrinsic is inverted."""

_MANIFEST, _QUESTIONS, _MARKER = "manifest.json", "questions.jsonl", ".unfinished.json"
_ENTRIES = ".entries"
"""Folder of the entries of scenes that are done, while several processes fill an export."""
_WRITTEN = ("scenes/*.safetensors", "teacher/*.safetensors")
_LEFTOVERS = ("scenes/*.part", "teacher/*.part", f"{_ENTRIES}/*.part", f"{_ENTRIES}/*.from")
_FILES = (("", "scenes", "sha256"), ("teacher/", "teacher", "teacher_sha256"))
"""Of a scene's two files: prefix of the tensors' names, folder, key in the manifest."""
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_SCENE_ID = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ExportError(files.UserError):
    """One line: `scene X: tensor Y: rule`, `questions.jsonl:LINE: field: rule` or alike.

    A file that is bad as a whole (missing, checksum) has `tensor *`.

    Attributes:
        where: `scene X`, `questions.jsonl:LINE` or `manifest.json`.
        field: `tensor Y`, or the field's name.
        rule: what is wrong.
    """

    def __init__(self, where: str, field: str = "", rule: str = ""):
        self.where, self.field, self.rule = where, field, rule
        super().__init__(": ".join(part for part in (where, field, rule) if part))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- The tensors ----------------------------------------------------------------------------------
# A rule gets a tensor's finite values (bf16 as float32), the manifest and the stored dtype, and
# returns what is wrong, or None.


def _first(bad: np.ndarray) -> str:
    """The place of the first True, as text."""
    return str([int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape)])


def _depth_rule(depth: np.ndarray, manifest: dict, dtype: str) -> str | None:
    bad = depth < 0
    return f"negative depth at {_first(bad)} (0 means missing)" if bad.any() else None


def _extrinsic_rule(extrinsic: np.ndarray, manifest: dict, dtype: str) -> str | None:
    rotation = extrinsic[:, :, :3].astype(np.float64)
    error = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    bad = error > ROTATION_TOLERANCE
    if bad.any():
        return f"rotation of view {int(np.argmax(bad))} is not orthonormal"
    bad = np.linalg.det(rotation) < 0
    if bad.any():
        return f"rotation of view {int(np.argmax(bad))} has determinant -1"
    bad = np.abs(extrinsic[:, :, 3]).max(axis=1) > LARGEST_PLACE
    view = int(np.argmax(bad))
    return f"translation of view {view} is beyond {LARGEST_PLACE:g} m" if bad.any() else None


def _intrinsic_rule(intrinsic: np.ndarray, manifest: dict, dtype: str) -> str | None:
    bad = (intrinsic[:, 0, 0] <= 0) | (intrinsic[:, 1, 1] <= 0)
    if bad.any():
        return f"focal length of view {int(np.argmax(bad))} is not positive"
    bad = np.minimum(intrinsic[:, 0, 0], intrinsic[:, 1, 1]) < LEAST_FOCAL
    if bad.any():
        return f"focal length of view {int(np.argmax(bad))} is below {LEAST_FOCAL:g} pixels"
    bad = (intrinsic[:, 1, 0] != 0) | (intrinsic[:, 2] != (0, 0, 1)).any(axis=-1)
    if bad.any():
        return f"view {int(np.argmax(bad))} is not [[fx, s, cx], [0, fy, cy], [0, 0, 1]]"
    return None


def _boxes_rule(boxes: np.ndarray, manifest: dict, dtype: str) -> str | None:
    bad = (boxes[:, 3:6] <= 0).any(axis=-1)
    return f"size of box {int(np.argmax(bad))} is not positive" if bad.any() else None


def _category_rule(lowest: int) -> Callable:
    def rule(labels: np.ndarray, manifest: dict, dtype: str) -> str | None:
        count = len(manifest["categories"])
        bad = (labels < lowest) | (labels >= count)
        if not bad.any():
            return None
        worst = labels.reshape(-1)[np.argmax(bad)]
        return f"{worst} at {_first(bad)} is not in [{lowest}, {count}) of the categories"

    return rule


def _probability_rule(*groups: slice) -> Callable:
    """Numbers in [0, 1]; every group of the last axis sums to 1."""

    def rule(values: np.ndarray, manifest: dict, dtype: str) -> str | None:
        bad = (values < 0) | (values > 1)
        if bad.any():
            return f"probability at {_first(bad)} is not in [0, 1]"
        for group in groups:
            total = values[..., group].sum(axis=-1, dtype=np.float32)
            bad = np.abs(total - 1) > PROBABILITY_TOLERANCE[dtype]
            if bad.any():
                return f"probabilities at {_first(bad)} do not sum to 1"
        return None

    return rule


def _index_rule(ids: np.ndarray, manifest: dict, dtype: str) -> str | None:
    if "teacher_tokenizer" not in manifest:
        return "needs teacher_tokenizer in the manifest: whose ids these are"
    return f"negative id at {_first(ids < 0)}" if (ids < 0).any() else None


def _topk_rule(ids: np.ndarray, manifest: dict, dtype: str) -> str | None:
    wrong = _index_rule(ids, manifest, dtype)
    if wrong:
        return wrong
    ordered = np.sort(ids, axis=-1)
    bad = (ordered[:, 1:] == ordered[:, :-1]).any(axis=-1)
    return f"an id stands twice at {_first(bad)}" if bad.any() else None


def _question_rule(rows: np.ndarray, manifest: dict, dtype: str) -> str | None:
    bad = np.diff(rows, prepend=0) < 0
    return f"value at {_first(bad)} is less than the one before" if bad.any() else None


def _logprob_rule(logprob: np.ndarray, manifest: dict, dtype: str) -> str | None:
    bad = logprob > 0
    if bad.any():
        return f"log-probability at {_first(bad)} is positive"
    bad = np.exp(logprob.astype(np.float32)).sum(axis=-1) > 1 + MASS_TOLERANCE[dtype]
    return f"the probabilities at {_first(bad)} have a sum above 1" if bad.any() else None


def _frame_rule(frame: np.ndarray, manifest: dict, dtype: str) -> str | None:
    return f"negative view at {_first(frame < 0)}" if (frame < 0).any() else None


class TensorSpec(NamedTuple):
    """What a tensor of the contract must be.

    Attributes:
        dims: a letter names a size that all tensors of a scene share. C, P, gh, gw and categories
            come from the manifest; a product is written `N*N`.
        dtypes: safetensors dtypes; empty means the manifest's `dtype` (the writer converts to it).
        rule: what the values must satisfy; every float tensor must be finite besides.
        needs: the tensor that gives this one its meaning.
        largest: magnitude beyond which a scene is refused, of what models are given as it is;
            infinite where numbers beyond a domain are left out one by one (`data.targets`), or a
            rule bounds them.
    """

    dims: str
    dtypes: tuple[str, ...]
    rule: Callable | None = None
    needs: str = ""
    largest: float = math.inf


_FLOAT = ("F32", "F16", "BF16")
_BOXES, _TOPK_ID, _FRAME = "target/boxes", "teacher/topk_id", "sonata/frame"
_ASKED = "teacher/answer_question"
SPECS: dict[str, TensorSpec] = {
    "vggt/tokens": TensorSpec("V P C", (), largest=LARGEST_FEATURE),
    "vggt/camera_tokens": TensorSpec("V C", (), largest=LARGEST_FEATURE),
    "vggt/depth": TensorSpec("V h w", _FLOAT, _depth_rule),
    "vggt/depth_conf": TensorSpec("V h w", _FLOAT),
    "vggt/points": TensorSpec("V h w 3", _FLOAT),
    "vggt/points_conf": TensorSpec("V h w", _FLOAT, needs="vggt/points"),
    "camera/extrinsic": TensorSpec("V 3 4", ("F32",), _extrinsic_rule),
    "camera/intrinsic": TensorSpec("V 3 3", ("F32",), _intrinsic_rule, largest=LARGEST_PIXEL),
    "sonata/features": TensorSpec("G Cp", _FLOAT, largest=LARGEST_FEATURE),
    "sonata/coord": TensorSpec("G 3", _FLOAT, largest=LARGEST_PLACE),
    _FRAME: TensorSpec("G", ("I32", "I64"), _frame_rule, "sonata/coord"),
    "internvit/tokens": TensorSpec("V I E", _FLOAT, largest=LARGEST_FEATURE),
    "images": TensorSpec("V H W 3", ("U8",)),
    "target/depth": TensorSpec("V h w", _FLOAT, _depth_rule),
    "target/segmentation": TensorSpec("V h w", ("I16", "I32"), _category_rule(-1)),
    _BOXES: TensorSpec("N 7", ("F32",), _boxes_rule),
    "target/labels": TensorSpec("N", ("I32", "I64"), _category_rule(0), _BOXES),
    "teacher/features": TensorSpec("V gh gw F", _FLOAT),
    "teacher/depth_bins": TensorSpec("V hb wb B", _FLOAT, _probability_rule(slice(None))),
    "teacher/detection_probs": TensorSpec(
        "N categories", _FLOAT, _probability_rule(slice(None)), _BOXES
    ),
    "teacher/relations": TensorSpec(
        "N*N 4", _FLOAT, _probability_rule(slice(0, 2), slice(2, 4)), _BOXES
    ),
    _ASKED: TensorSpec("T", ("I32",), _question_rule, _TOPK_ID),
    "teacher/answer_id": TensorSpec("T", ("I32",), _index_rule, _TOPK_ID),
    _TOPK_ID: TensorSpec("T k", ("I32",), _topk_rule, "teacher/topk_logprob"),
    "teacher/topk_logprob": TensorSpec("T k", _FLOAT, _logprob_rule, "teacher/answer_id"),
}
"""Every tensor of the contract; writing, reading and validating all go by this table.

`internvit/tokens` are InternViT's last hidden states of `images`, the class token first.

Row i*N+j of `teacher/relations`: P(left), P(right), P(above), P(below) of box i relative to box j,
seen in the first camera.

The teacher's logits, T answer tokens of all its questions one after the other: token t belongs to
the scene's question number `answer_question[t]` (0 = its first line in questions.jsonl), is
`answer_id[t]` (the last of an answer is the end token), and had the k likeliest alternatives
`topk_id[t]`, all different, with log-probabilities over the whole vocabulary `topk_logprob[t]`.
The ids are those of the tokenizer whose `tokenizer.json` has the manifest's sha256
`teacher_tokenizer`. At k = 16 in float16 that is 104 bytes a token, 8 + 6 k in general, where all
32,000 of Llama would be 64,000.

There is no logsumexp: a log-probability is the logit less the logsumexp, which is thereby in every
entry already. What it would add, the common offset of the logits, no softmax can see.
"""


def _tensor_file(folder: Path, kind: str, scene_id: str) -> Path:
    return folder / kind / f"{scene_id}.safetensors"


def scene_files(folder: Path, scene_id: str) -> list[Path]:
    """What an unfinished export may have of a scene: the mark that it is finished, its tensors."""
    tensors = [_tensor_file(folder, kind, scene_id) for _, kind, _ in _FILES]
    return [folder / _ENTRIES / f"{scene_id}.json", *tensors]


def _scene_error(scene_id: str, tensor: str, rule: str) -> ExportError:
    return ExportError(f"scene {scene_id}", f"tensor {tensor}", rule)


def _check_layout(
    scene_id: str, layout: Mapping[str, tuple], manifest: dict, with_teacher: bool
) -> None:
    """Checks names, dtypes and shapes of a scene, given {name: (dtype, shape)}."""
    for name in layout:
        if name not in SPECS or (name.startswith("teacher/") and not with_teacher):
            raise _scene_error(scene_id, _shown(name), "unknown tensor name")
    if not layout:
        raise _scene_error(scene_id, "*", "the scene has no tensor")
    grid_h, grid_w = manifest["patch_grid"]
    sizes = {
        "C": manifest["token_width"],
        "P": grid_h * grid_w,
        "gh": grid_h,
        "gw": grid_w,
        "categories": len(manifest["categories"]),
    }
    for name, spec in SPECS.items():
        if name not in layout:
            continue
        dtype, shape = layout[name]
        allowed = spec.dtypes or (_DTYPES[manifest["dtype"]],)
        if dtype not in allowed:
            raise _scene_error(scene_id, name, f"dtype {dtype} is not {' or '.join(allowed)}")
        if spec.needs and spec.needs not in layout:
            raise _scene_error(scene_id, name, f"needs {spec.needs} in the same scene")
        dims = spec.dims.split()
        differs = f"shape {list(shape)} is not [{', '.join(dims)}]"
        if len(shape) != len(dims):
            raise _scene_error(scene_id, name, differs)
        for axis, dim in enumerate(dims):
            size = shape[axis]
            wanted = int(dim) if dim.isdigit() else sizes.setdefault(dim, size)
            if size != wanted:
                rule = differs if dim.isdigit() else f"{differs} with {dim} = {wanted}"
                raise _scene_error(scene_id, name, rule)
            if size == 0 and dim not in ("N", "N*N"):  # a room may be empty, nothing else may
                raise _scene_error(scene_id, name, f"shape {list(shape)} has no {dim}")
            if dim == "N":
                sizes["N*N"] = size * size
        if "h" in dims and (sizes["h"] % grid_h or sizes["h"] * grid_w != sizes["w"] * grid_h):
            rule = f"(h, w) = {shape[1:3]} is no multiple of the patch grid {(grid_h, grid_w)}"
            raise _scene_error(scene_id, name, rule)


_EXPONENT = {  # all ones: infinite or NaN
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
}


def _bits_of(magnitude: float, dtype: str) -> int:
    """The bits of the largest finite number of a dtype that is not beyond a magnitude."""
    if dtype == "F16":
        return int(np.float16(min(magnitude, 65504)).view(np.uint16))
    bits = int(np.float32(min(magnitude, np.finfo(np.float32).max)).view(np.uint32))
    return bits >> 16 if dtype == "BF16" else bits


def _check_values(scene_id: str, name: str, dtype: str, stored: np.ndarray, manifest: dict) -> None:
    """Checks the numbers of one tensor; `stored` holds bf16 as its uint16 bits."""
    if dtype in _EXPONENT and stored.size:
        # On the bits: several times faster than isfinite on 16-bit floats, and needs no bf16 type.
        # Without their sign, bits are in the order of the magnitudes.
        bits, exponent = _EXPONENT[dtype]
        field = stored.view(bits) & bits(np.iinfo(bits).max >> 1)
        most = field.max()
        if most >= exponent:
            where = _first(field >= exponent)
            raise _scene_error(scene_id, name, f"value at {where} is not finite")
        limit = SPECS[name].largest
        if most > _bits_of(limit, dtype):
            where = _first(field > _bits_of(limit, dtype))
            raise _scene_error(scene_id, name, f"value at {where} is beyond {limit:g}")
    rule = SPECS[name].rule
    if rule and stored.size:
        values = _float32_of_bfloat16(stored) if dtype == "BF16" else stored
        wrong = rule(values, manifest, dtype)
        if wrong:
            raise _scene_error(scene_id, name, wrong)


def _check_frame(scene_id: str, frame: np.ndarray, layout: Mapping[str, tuple]) -> None:
    """Checks that points are of views that the scene has."""
    views = [shape[0] for name, (_, shape) in layout.items() if SPECS[name].dims[:1] == "V"]
    if views and frame.size and frame.max() >= views[0]:
        where = _first(frame >= views[0])
        rule = f"{frame.max()} at {where} is not one of the {views[0]} views"
        raise _scene_error(scene_id, _FRAME, rule)


# --- bfloat16 and safetensors ---------------------------------------------------------------------


def _float32_of_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bfloat16_of_float32(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16 (ties to even) of finite values; too large becomes infinite."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (bits >> np.uint32(16)).astype(np.uint16)


def _to_stored(scene_id: str, name: str, array: Any, manifest: dict) -> tuple[str, np.ndarray]:
    """(safetensors dtype, little-endian C-ordered array with bf16 as uint16 bits)."""
    if not isinstance(array, np.ndarray):
        raise _scene_error(scene_id, _shown(name), f"{type(array).__name__} is not a numpy array")
    array = np.asarray(array, order="C")
    dtype = tensor_files.STORED.get(array.dtype.name, array.dtype.name)
    if dtype == "BF16":
        array = array.view(np.uint16)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    target = _DTYPES[manifest["dtype"]]
    if name not in SPECS or SPECS[name].dtypes or dtype == target or dtype not in _EXPONENT:
        return dtype, array
    _check_values(scene_id, name, dtype, array, manifest)
    if dtype == "BF16":
        array = _float32_of_bfloat16(array)
    if target == "BF16":
        return target, _bfloat16_of_float32(array)
    with np.errstate(over="ignore"):  # what overflows is refused as not finite
        return target, array.astype(manifest["dtype"])


def _read_header(path: Path) -> tuple[dict, int]:
    """A safetensors file's header and the position of its first data byte."""
    with files.open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, path.stat().st_size)))
    return header, 8 + length


def _damage(scene_id: str, path: Path, otherwise: str) -> ExportError:
    """Says what is wrong with a damaged file: which tensor is cut off, if one is."""
    label = f"{path.parent.name}/{path.name}"
    prefix = next(prefix for prefix, kind, _ in _FILES if kind == path.parent.name)
    with contextlib.suppress(Exception):  # whatever the damage: then we say `otherwise`
        header, start = _read_header(path)
        have = path.stat().st_size
        for name, entry in header.items():
            need = start + entry["data_offsets"][1] if name != "__metadata__" else 0
            if need > have:
                rule = f"{label} is truncated (needs at least {_shown(need)} bytes, has {have})"
                full = prefix + name
                return _scene_error(scene_id, full if full in SPECS else _shown(full), rule)
    return _scene_error(scene_id, "*", f"{label} {otherwise}")


@contextlib.contextmanager
def _opened(scene_id: str, path: Path) -> Iterator[Any]:
    """`safe_open`, with what it raises said in one line."""
    try:
        _refuse_irregular(path)
        with safe_open(str(path), framework="np") as file:
            yield file
    except ExportError:
        raise
    except FileNotFoundError:
        raise _damage(scene_id, path, "is missing") from None
    except Exception as error:  # SafetensorError, OSError, and what a damaged header may cause
        raise _damage(scene_id, path, f"cannot be read: {_shown(str(error))}") from None


def _layout(file: Any, prefix: str) -> dict[str, tuple]:
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {prefix + n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}


def _read_tensor(file: Any, path: Path, name: str, dtype: str) -> np.ndarray:
    """One tensor as it is stored; bf16 as its bits, which safetensors' numpy side does not give."""
    if dtype != "BF16":
        return file.get_tensor(name)
    header, start = _read_header(path)
    begin, end = header[name]["data_offsets"]
    bits = np.fromfile(path, dtype="<u2", count=(end - begin) // 2, offset=start + begin)
    return bits.reshape(header[name]["shape"])


def _presented(dtype: str, stored: np.ndarray) -> np.ndarray:
    if dtype != "BF16":
        return stored
    try:
        import ml_dtypes
    except ImportError:
        return _float32_of_bfloat16(stored)
    return stored.view(ml_dtypes.bfloat16)


# --- JSON -----------------------------------------------------------------------------------------
# A checker gets a value and returns what is wrong, or None.


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()  # JSON can spell lone surrogates, which nothing downstream can print
    except UnicodeEncodeError:
        return False
    return True


def _is_name(value: Any) -> bool:
    return _is_text(value) and len(value) <= LONGEST_NAME


def _is_number(value: Any) -> bool:
    # Compared, not converted: JSON has integers that no float can hold.
    return type(value) in (int, float, np.float64) and abs(value) <= 1e300


def _is_count(value: Any, lowest: int) -> bool:
    return type(value) is int and lowest <= value < 2**31


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_text(item) for item in value)


def _is_box(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) == 7
    return is_list and all(_is_number(v) for v in value) and min(value[3:6]) > 0


_AT_MOST = f" of at most {LONGEST_NAME} characters"


def _must(condition: Callable[[Any], bool], rule: str) -> Callable[[Any], str | None]:
    return lambda value: None if condition(value) else f"must be {rule}, is {_shown(value)}"


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _check_producer(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "must be an object"
    if not all(len(key) <= LONGEST_NAME for key in value):
        return f"a key has more than {LONGEST_NAME} characters"
    for key in ("project", "commit", "weights", "licence"):
        if not _is_text(value.get(key)):
            return f"{key} must be a non-empty string"
    return None if _is_texts(list(value.values())) else "values must be non-empty strings"


def _check_objects(value: Any) -> str | None:
    if not isinstance(value, (list, tuple)) or not value:
        return "must be a non-empty list"
    for i, item in enumerate(value):
        if not isinstance(item, dict) or set(item) - {"index"} != {"name", "box"}:
            return f"[{i}] must have name, box and at most index"
        if not _is_name(item["name"]):
            return f"[{i}] name must be a non-empty string{_AT_MOST}"
        if not _is_box(item["box"]):
            return f"[{i}] box must be 7 finite numbers with positive sizes"
        if not _is_count(item.get("index", 0), 0):
            return f"[{i}] index must be a row of {_BOXES}"
    return None


def _check_relation(value: Any) -> str | None:
    if not isinstance(value, dict) or not value:
        return "must be an object of relation names"
    for name, probability in value.items():
        if name not in RELATIONS:
            return f"unknown relation {_shown(name)}"
        if not _is_number(probability) or not 0 <= probability <= 1:
            return f"{name} must be a probability in [0, 1]"
    return None


def _check_questions_entry(value: Any) -> str | None:
    if not isinstance(value, dict) or set(value) != {"count", "sha256"}:
        return "must have count and sha256"
    if not _is_count(value["count"], 0):
        return "count must be a non-negative integer"
    return None if _is_sha256(value["sha256"]) else "sha256 must be a sha256 in hexadecimal"


def _is_unique_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value)) and len(set(value)) == len(value)


def _is_grid(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(v, 1) for v in value)


_TEXT = _must(_is_text, "a non-empty string")
_NAME = _must(_is_name, f"a non-empty string{_AT_MOST}")
_SCENE_NAME = _must(
    lambda value: isinstance(value, str) and _SCENE_ID.fullmatch(value) is not None,
    "letters, digits, '.', '_', '-' without a leading dot",
)
_HASH = _must(_is_sha256, "a sha256 in hexadecimal")
_HEADER_FIELDS = {
    "schema_version": _must(
        lambda v: type(v) is int and v == SCHEMA_VERSION,
        f"{SCHEMA_VERSION}, the version known here",
    ),
    "producer": _check_producer,
    "dtype": _must(lambda v: v in tuple(_DTYPES), "float16, bfloat16 or float32"),
    "scale": _must(lambda v: v in ("metric", "scene"), "metric or scene"),
    "token_width": _must(lambda v: _is_count(v, 1), "a positive integer"),
    "patch_grid": _must(_is_grid, "two positive integers"),
    "tokens_contain_depth": _must(lambda v: type(v) is bool, "true or false"),
    "categories": _must(_is_unique_names, f"a list of different non-empty strings{_AT_MOST}"),
    "notes": _must(lambda v: v == "" or _is_text(v), "a string"),
    "created": _TEXT,
    "teacher_tokenizer": _HASH,
}
_OPTIONAL = ("teacher_tokenizer",)
_MEANING = ("dtype", "scale", "token_width", "patch_grid", "categories", "teacher_tokenizer")
"""Fields of the header that say what the numbers of a scene mean."""
_MANIFEST_FIELDS = {
    **_HEADER_FIELDS,
    "scenes": _must(lambda v: isinstance(v, list) and len(v) > 0, "a non-empty list"),
    "questions": _check_questions_entry,
}
_ENTRY_FIELDS = {
    "id": _SCENE_NAME,
    "split": _must(lambda v: v in SPLITS, f"one of {', '.join(SPLITS)}"),
    "sha256": _HASH,
    "teacher_sha256": _HASH,
}
_QUESTION_FIELDS = {
    **dict.fromkeys(("id", "scene_id", "kind", "source", "unit"), _NAME),
    **dict.fromkeys(("question", "answer", "teacher_answer", "rationale"), _TEXT),
    **dict.fromkeys(
        ("options", "answers"), _must(lambda v: bool(v) and _is_texts(v), "a list of strings")
    ),
    "value": _must(_is_number, "a finite number"),
    "box": _must(_is_box, "7 finite numbers with positive sizes"),
    "relation": _check_relation,
    "objects": _check_objects,
}


def _check_fields(where: str, record: Any, fields: dict, required: Sequence[str], at="") -> None:
    if not isinstance(record, dict):
        raise ExportError(where, at, "must be a JSON object")
    for name in required:
        if name not in record:
            raise ExportError(where, at + name, "missing")
    for name, value in record.items():
        if name not in fields:
            raise ExportError(where, at + _shown(name), "unknown field")
        wrong = fields[name](value)
        if wrong:
            raise ExportError(where, at + name, wrong)


def _check_question(
    where: str, record: Any, seen: set[str], box_count: Callable[[str], int | None]
) -> None:
    """Checks one question; `box_count(scene_id)` is None for an unknown scene."""
    required = ("id", "scene_id", "kind", "question", "answer")
    _check_fields(where, record, _QUESTION_FIELDS, required)
    if record["id"] in seen:
        raise ExportError(where, "id", f"duplicate question id {_shown(record['id'])}")
    boxes = box_count(record["scene_id"])
    if boxes is None:
        raise ExportError(where, "scene_id", f"unknown scene {_shown(record['scene_id'])}")
    for i, item in enumerate(record.get("objects", ())):
        if item.get("index", -1) >= boxes:
            rule = f"[{i}] index {item['index']} is not a row of the {boxes} {_BOXES}"
            raise ExportError(where, "objects", rule)
    if record["kind"] in NUMERIC_KINDS and "value" not in record:
        try:
            number = float(record["answer"])
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            rule = f"missing, and the answer {_shown(record['answer'])} is no number"
            raise ExportError(where, "value", rule)
    fault = question_rules.contradiction(record, record["kind"] in NUMERIC_KINDS)
    if fault:
        raise ExportError(where, *fault)
    seen.add(record["id"])


def _parse(where: str, data: bytes) -> Any:
    try:
        return files.parse_json(where, data, nan=True)  # the fields' own rules say it better
    except files.UserError as error:
        raise ExportError(where, "", str(error)[len(where) + 2 :]) from None


def _required(fields: dict) -> list[str]:
    return [name for name in fields if name not in _OPTIONAL]


def _check_manifest(manifest: Any) -> None:
    if isinstance(manifest, dict) and "schema_version" in manifest:  # says most, so it comes first
        wrong = _HEADER_FIELDS["schema_version"](manifest["schema_version"])
        if wrong:
            raise ExportError(_MANIFEST, "schema_version", wrong)
    _check_fields(_MANIFEST, manifest, _MANIFEST_FIELDS, _required(_MANIFEST_FIELDS))
    seen = set()
    for i, entry in enumerate(manifest["scenes"]):
        _check_entry(entry, seen, f"scenes[{i}].")


def _check_entry(entry: Any, seen: set[str], at: str = "") -> None:
    _check_fields(_MANIFEST, entry, _ENTRY_FIELDS, ("id", "split", "sha256"), at)
    if entry["id"] in seen:
        raise ExportError(_MANIFEST, at + "id", f"duplicate scene {entry['id']}")
    seen.add(entry["id"])


# --- Writing --------------------------------------------------------------------------------------


def _write_file(path: Path, chunks: Iterable[Any], durable: bool = False) -> str:
    """Writes a file whole or not at all and returns its sha256."""
    digest = hashlib.sha256()
    try:
        with files.writing(path, durable=durable) as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
    except ExportError:
        raise
    except files.UserError as error:
        raise ExportError(str(error)) from None
    return digest.hexdigest()


def _cannot_write(path: Path, error: OSError) -> ExportError:
    return ExportError(str(path), "", f"cannot be written: {error.strerror or _shown(str(error))}")


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode() + b"\n"


def write_scene(
    folder: str | os.PathLike,
    scene_id: str,
    arrays: Mapping[str, np.ndarray],
    teacher: Mapping[str, np.ndarray] | None = None,
    *,
    split: str,
    manifest: Mapping[str, Any],
) -> dict:
    """Checks one scene and writes its files; several processes may do so in one folder.

    Args:
        folder: the export's folder, opened by an `ExportWriter`.
        scene_id: letters, digits, `.`, `_`, `-`.
        arrays: tensors of `SPECS` by name, in the shapes given there. The token tensors are
            converted to the manifest's dtype (any float in, bf16 without ml_dtypes too); all
            others must have one of their dtypes already.
        teacher: the `teacher/` tensors, names without `teacher/`.
        split: train, val or test.
        manifest: `ExportWriter.manifest`.

    Returns:
        The scene's entry for `ExportWriter.register`.

    Raises:
        ExportError: a tensor breaks a rule, or the file cannot be written.
    """
    entry = {"id": scene_id, "split": split, "sha256": "0" * 64}
    _check_entry(entry, set())
    given = {"": arrays, "teacher/": teacher or {}}
    stored: dict[str, dict] = {}
    layout: dict[str, tuple] = {}
    for prefix, tensors in given.items():
        stored[prefix] = {}
        for name, array in tensors.items():
            full = f"{prefix}{name}"
            dtype, array = _to_stored(scene_id, full, array, manifest)
            stored[prefix][name] = dtype, array
            layout[full] = dtype, array.shape
        _check_layout(scene_id, layout, manifest, with_teacher=bool(prefix))
    for prefix, tensors in stored.items():
        for name, (dtype, array) in tensors.items():
            _check_values(scene_id, prefix + name, dtype, array, manifest)
    if _FRAME in stored[""]:
        _check_frame(scene_id, stored[""][_FRAME][1], layout)
    for prefix, kind, key in _FILES:
        if stored[prefix]:
            chunks = tensor_files.chunks(stored[prefix])
            entry[key] = _write_file(_tensor_file(Path(folder), kind, scene_id), chunks)
    return entry


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name; it is copied where the file system cannot do that.

    Where `source` is a symbolic link, the second name is that of the file it points to: a link to
    a relative link would point elsewhere.
    """
    os.stat(source)  # says so where the link points nowhere
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, one without hard links, or the name is taken
        with open(source, "rb") as file:
            _write_file(target, iter(lambda: file.read(1 << 20), b""))


class _BoxCounts(dict):
    """{scene: rows of `target/boxes`}, read from the files' headers on demand."""

    def __init__(self, folder: Path, scenes: Any):
        super().__init__()
        self.folder, self.scenes = folder, scenes

    def __call__(self, scene_id: str) -> int | None:
        """The count, or None for a scene that is not in `scenes`."""
        if scene_id not in self.scenes:
            return None
        if scene_id not in self:
            with _opened(scene_id, _tensor_file(self.folder, "scenes", scene_id)) as file:
                boxes = file.get_slice(_BOXES).get_shape() if _BOXES in file.keys() else (0,)
                self[scene_id] = boxes[0]
        return self[scene_id]


class ExportWriter:
    """Writes an export; a context manager.

    `manifest.json` is written last (temporary file, fsync, rename), so a folder without it is not
    an export, whatever interrupted the writer. An existing export, or a folder with anything else
    in it, is never touched. An unfinished export whose header (producer, dtype, ...) is the
    same is started over: its files are removed.

    With `resume`, several processes may fill one folder, one after the other or at once, each
    scene once: a scene that `add_scene` has finished stays, and `finished` tells of it, to all of
    them and to later ones. One more writer then registers the finished scenes in the order that
    the manifest shall have, adds the questions, and closes.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        producer: dict,
        dtype: str,
        scale: str,
        token_width: int,
        patch_grid: Sequence[int],
        tokens_contain_depth: bool,
        categories: Sequence[str],
        notes: str = "",
        teacher_tokenizer: str = "",
        resume: bool = False,
    ):
        """Opens the folder.

        Args:
            folder: absent, empty, or an unfinished export of the same producer.
            producer: strings `project`, `commit`, `weights`, `licence`, and more if wanted.
            dtype: float16, bfloat16 or float32, of the token tensors.
            scale: metric (metres) or scene (units of the producer's own).
            token_width: C.
            patch_grid: (gh, gw), P = gh * gw.
            tokens_contain_depth: whether the tokens are made from the true depth, which makes
                depth metrics on them an honesty problem that reports must mention.
            categories: nouns; label i means categories[i].
            notes: anything for the reader.
            teacher_tokenizer: sha256 of the `tokenizer.json` behind the teacher's token ids; needed
                where a scene has them.
            resume: keep what an unfinished export of the same header has.

        Raises:
            ExportError: a bad argument, or a folder that may not be written to.
        """
        self.folder = Path(folder)
        header = {
            "schema_version": SCHEMA_VERSION,
            "producer": producer,
            "dtype": dtype,
            "scale": scale,
            "token_width": token_width,
            "patch_grid": list(patch_grid),
            "tokens_contain_depth": tokens_contain_depth,
            "categories": categories if isinstance(categories, str) else list(categories),
            "notes": notes,
        }
        if teacher_tokenizer:
            header["teacher_tokenizer"] = teacher_tokenizer
        created = datetime.datetime.now(datetime.timezone.utc)
        self.manifest = {**header, "created": created.isoformat(timespec="seconds")}
        _check_fields(_MANIFEST, self.manifest, _HEADER_FIELDS, _required(_HEADER_FIELDS))
        self._resume = resume
        self._take_folder(_json_bytes(header))
        self._entries: list[dict] = []
        self._scenes: set[str] = set()
        self._box_counts = _BoxCounts(self.folder, self._scenes)
        self._question_ids: set[str] = set()
        self._digest = hashlib.sha256()
        # With `resume`, only the one that has questions, or closes, may open their file.
        self._questions = None if resume else self._open_questions()

    @classmethod
    def reopen(cls, folder: str | os.PathLike) -> ExportWriter:
        """Resumes an unfinished export under the header that it was begun with.

        Raises:
            ExportError: there is none.
        """
        if not (Path(folder) / _MARKER).is_file():
            raise ExportError(str(folder), "", "is no unfinished export")
        header = _parse(_MARKER, files.read_bytes(Path(folder) / _MARKER))
        _check_fields(_MARKER, header, _HEADER_FIELDS, ("schema_version",))
        del header["schema_version"]
        return cls(folder, **header, resume=True)

    def _open_questions(self) -> Any:
        try:
            return open(self.folder / _QUESTIONS, "wb" if self._resume else "xb")
        except OSError as error:
            raise _cannot_write(self.folder / _QUESTIONS, error) from None

    def _take_folder(self, header: bytes) -> None:
        folder, marker = self.folder, self.folder / _MARKER
        try:
            present = sorted(os.listdir(folder)) if folder.exists() else []
            if self._resume:  # another process may be about to begin the same export
                present = [name for name in present if not name.endswith(".part")]
            if _MANIFEST in present:
                raise ExportError(str(folder), "", "is an export already; it is not overwritten")
            if present and _MARKER not in present:
                raise ExportError(str(folder), "", "is not empty and not an unfinished export")
            if present and files.read_bytes(marker) != header:
                raise ExportError(str(folder), "", "is an unfinished export of another producer")
            if not self._resume:
                for pattern in (*_LEFTOVERS, *_WRITTEN, f"{_ENTRIES}/*.json", _QUESTIONS):
                    for path in folder.glob(pattern):
                        path.unlink()
        except OSError as error:
            raise _cannot_write(folder, error) from None
        if not present:
            _write_file(marker, [header])

    def add_scene(
        self,
        scene_id: str,
        arrays: Mapping[str, np.ndarray],
        *,
        split: str,
        teacher: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Checks and writes one scene; see `write_scene`."""
        if scene_id in self._scenes:
            raise ExportError(_MANIFEST, "id", f"duplicate scene {scene_id}")
        entry = write_scene(
            self.folder, scene_id, arrays, teacher, split=split, manifest=self.manifest
        )
        if self._resume:
            _write_file(self.folder / _ENTRIES / f"{scene_id}.json", [_json_bytes(entry)])
        self.register(entry)

    def finished(self) -> dict[str, dict]:
        """{scene: entry} of all scenes that any writer with `resume` has finished in this folder.

        Raises:
            ExportError: an entry is damaged.
        """
        entries: dict[str, dict] = {}
        for path in sorted((self.folder / _ENTRIES).glob("*.json")):
            entry = _parse(f"{_ENTRIES}/{path.name}", files.read_bytes(path))
            _check_entry(entry, set(), f"{_ENTRIES}/{path.name}: ")
            entries[entry["id"]] = entry
        return entries

    def adopt_scene(self, export: Export, scene_id: str) -> None:
        """Takes over a scene of another export with the same header, in the same split.

        Its files are hard links where the file system allows, copies otherwise. They are not read:
        whoever reads the new export checks them against the same sha256.

        Raises:
            ExportError: an unknown scene, another header, or a file cannot be had.
        """
        entry = export._entry(scene_id)
        for name in _MEANING:
            if export.manifest.get(name) != self.manifest.get(name):
                rule = f"differs from that of {export.folder}, whose scenes are taken over"
                raise ExportError(_MANIFEST, name, rule)
        if scene_id in self._scenes:
            raise ExportError(_MANIFEST, "id", f"duplicate scene {scene_id}")
        for _, kind, key in _FILES:
            if key in entry:
                source = _tensor_file(export.folder, kind, scene_id)
                target = _tensor_file(self.folder, kind, scene_id)
                if source.exists() and not source.is_file():  # it would be copied without end
                    raise ExportError(str(source), "", "is not a regular file")
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _link(source, target)
                except FileNotFoundError:
                    raise _damage(scene_id, source, "is missing") from None
                except OSError as error:
                    raise _cannot_write(target, error) from None
        self.register(entry)

    def register(self, entry: dict) -> None:
        """Adds a scene that `write_scene` has written, here or in another process."""
        _check_entry(entry, self._scenes)
        self._entries.append(dict(entry))

    def add_questions(self, records: Iterable[dict]) -> None:
        """Checks and appends questions of scenes that were added before.

        Args:
            records: {id, scene_id, kind, question, answer} and optional {teacher_answer, options,
                value, unit, box, rationale, relation, objects, answers, source}; the source is the
                name of the data set that asks.

        Raises:
            ExportError: `questions.jsonl:LINE: field: rule`; the records before it were added.
        """
        for record in records:
            where = f"{_QUESTIONS}:{len(self._question_ids) + 1}"
            _check_question(where, record, self._question_ids, self._box_counts)
            line = _json_bytes(record)
            self._digest.update(line)
            try:
                self._questions = self._questions or self._open_questions()
                self._questions.write(line)
            except OSError as error:
                raise _cannot_write(self.folder / _QUESTIONS, error) from None

    def close(self) -> None:
        """Writes the manifest: from here on the folder is an export."""
        try:
            with self._questions or self._open_questions() as file:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(self.folder / _QUESTIONS, error) from None
        questions = {"count": len(self._question_ids), "sha256": self._digest.hexdigest()}
        manifest = {**self.manifest, "scenes": self._entries, "questions": questions}
        _check_manifest(manifest)
        _write_file(self.folder / _MANIFEST, [_json_bytes(manifest, indent=1)], durable=True)
        with contextlib.suppress(OSError):  # the export is complete; a stale marker means nothing
            (self.folder / _MARKER).unlink()
            if self._resume:
                for pattern in (*_LEFTOVERS, f"{_ENTRIES}/*.json"):
                    for path in self.folder.glob(pattern):
                        path.unlink()
                (self.folder / _ENTRIES).rmdir()

    def __enter__(self) -> ExportWriter:
        """Returns itself."""
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        """Closes after success; after an exception the folder stays unfinished."""
        if exc_type is None:
            self.close()
        else:
            with contextlib.suppress(OSError):
                if self._questions:
                    self._questions.close()


# --- Reading --------------------------------------------------------------------------------------


def _refuse_irregular(path: Path) -> None:
    """Raises OSError for what is no regular file: a pipe would wait for somebody who writes."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    _refuse_irregular(path)
    with open(path, "rb") as file:
        while True:
            chunk = file.read(1 << 20)
            if not chunk:
                return digest.hexdigest()
            digest.update(chunk)


class Export:
    """Reads an export. Holds no open file: threads may share it, and it can be pickled.

    Attributes:
        folder: where it is.
        manifest: the checked manifest.
        categories: nouns; label i means categories[i].
        patch_grid: (gh, gw).
        token_width: C.
    """

    def __init__(self, folder: str | os.PathLike):
        """Reads and checks the manifest.

        Raises:
            ExportError: it is missing (not an export, or an unfinished one), empty, broken, or of
                an unknown schema version.
        """
        self.folder = Path(folder)
        try:
            _refuse_irregular(self.folder / _MANIFEST)
            data = files.read_bytes(self.folder / _MANIFEST)
        except FileNotFoundError:
            rule = f"missing in {self.folder}: not an export, or an unfinished one"
            raise ExportError(_MANIFEST, "", rule) from None
        except OSError as error:
            raise ExportError(_MANIFEST, "", f"cannot be read: {error.strerror}") from None
        self.manifest: dict = _parse(_MANIFEST, data)
        _check_manifest(self.manifest)
        self.categories: list[str] = self.manifest["categories"]
        self.patch_grid: tuple[int, int] = tuple(self.manifest["patch_grid"])
        self.token_width: int = self.manifest["token_width"]
        self._entries = {entry["id"]: entry for entry in self.manifest["scenes"]}
        self._verified: set[tuple[str, str]] = set()  # (scene, tensor or file) that passed
        self._box_counts = _BoxCounts(self.folder, self._entries)

    def scene_ids(self, split: str | None = None) -> list[str]:
        """Scene ids of a split (None: of all), in the manifest's order."""
        return [i for i, entry in self._entries.items() if split in (None, entry["split"])]

    def header(self) -> dict[str, Any]:
        """What an `ExportWriter` needs to make another export of these scenes."""
        left_out = ("schema_version", "created", "scenes", "questions")
        return {name: value for name, value in self.manifest.items() if name not in left_out}

    def files(self) -> list[Path]:
        """Paths of all files that belong to the export."""
        paths = [self.folder / _MANIFEST, self.folder / _QUESTIONS]
        for entry in self._entries.values():
            paths += [
                _tensor_file(self.folder, kind, entry["id"])
                for _, kind, key in _FILES
                if key in entry
            ]
        return paths

    def scene_shapes(self, scene_id: str) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all of a scene's tensors, from the files' headers alone (unchecked).

        Raises:
            ExportError: a file is missing or its header is damaged.
        """
        entry = self._entry(scene_id)
        layout: dict[str, tuple] = {}
        for prefix, kind, key in _FILES:
            if key in entry:
                with _opened(scene_id, _tensor_file(self.folder, kind, scene_id)) as file:
                    layout.update(_layout(file, prefix))
        return {name: shape for name, (_, shape) in layout.items()}

    def _entry(self, scene_id: str) -> dict:
        if scene_id not in self._entries:
            raise ExportError(f"scene {_shown(scene_id)}", "", "unknown scene")
        return self._entries[scene_id]

    def read_scene(
        self, scene_id: str, names: Sequence[str] | None = None, *, verify: bool = True
    ) -> dict[str, np.ndarray]:
        """Reads tensors of one scene, touching only the bytes of these.

        Args:
            scene_id: a scene of the manifest.
            names: tensors wanted (`SPECS`), those of the teacher as `teacher/features` etc.;
                None means all. One that the scene does not have is left out of the answer.
            verify: check the files' sha256 and the tensors' values, each the first time only.
                Names, dtypes and shapes are always checked.

        Returns:
            {name: array}. bf16 comes as ml_dtypes.bfloat16, or as float32 without ml_dtypes.

        Raises:
            ExportError: `scene X: tensor Y: rule`.
        """
        entry = self._entry(scene_id)
        for name in names or ():
            if name not in SPECS:
                raise _scene_error(scene_id, _shown(name), "unknown tensor name")
        wants_teacher = names is None or any(name.startswith("teacher/") for name in names)
        layout: dict[str, tuple] = {}
        stored: dict[str, np.ndarray] = {}
        for prefix, kind, key in _FILES:
            if key not in entry or (prefix and not wants_teacher):
                continue
            path = _tensor_file(self.folder, kind, scene_id)
            if verify and (scene_id, key) not in self._verified:
                self._verify_file(scene_id, path, entry[key])
                self._verified.add((scene_id, key))
            with _opened(scene_id, path) as file:
                found = _layout(file, prefix)
                layout.update(found)
                _check_layout(scene_id, layout, self.manifest, with_teacher=bool(prefix))
                for name in found if names is None else [n for n in names if n in found]:
                    stored[name] = _read_tensor(file, path, name[len(prefix) :], found[name][0])
        for name, array in stored.items():
            if verify and (scene_id, name) not in self._verified:
                _check_values(scene_id, name, layout[name][0], array, self.manifest)
                if name == _FRAME:
                    _check_frame(scene_id, array, layout)
                self._verified.add((scene_id, name))
        return {name: _presented(layout[name][0], array) for name, array in stored.items()}

    def _verify_file(self, scene_id: str, path: Path, sha256: str) -> None:
        try:
            good = _sha256_of(path) == sha256
        except FileNotFoundError:
            raise _damage(scene_id, path, "is missing") from None
        except OSError as error:
            raise _damage(scene_id, path, f"cannot be read: {error.strerror}") from None
        if not good:
            raise _damage(scene_id, path, "does not have the manifest's sha256")

    def questions(self, dropped: list[ExportError] | None = None) -> Iterator[dict]:
        """Yields the checked questions in the file's order.

        Args:
            dropped: where to collect what is wrong with bad questions and skip them; None raises.

        Raises:
            ExportError: `questions.jsonl:LINE: field: rule`, or the file itself is not the
                manifest's (always raised).
        """
        path = self.folder / _QUESTIONS
        try:
            if _sha256_of(path) != self.manifest["questions"]["sha256"]:
                raise ExportError(_QUESTIONS, "", "does not have the manifest's sha256")
            with open(path, "rb") as file:
                yield from self._checked(file, dropped)
        except OSError as error:
            raise ExportError(_QUESTIONS, "", f"cannot be read: {error.strerror}") from None

    def _checked(self, lines: Iterable[bytes], dropped: list | None) -> Iterator[dict]:
        seen: set[str] = set()
        count = 0
        for count, line in enumerate(lines, start=1):
            where = f"{_QUESTIONS}:{count}"
            try:
                record = _parse(where, line)
                _check_question(where, record, seen, self._box_counts)
            except ExportError as error:
                if dropped is None:
                    raise
                dropped.append(error)
                continue
            yield record
        if count != self.manifest["questions"]["count"]:
            wanted = self.manifest["questions"]["count"]
            raise ExportError(_QUESTIONS, "count", f"{count} lines, the manifest says {wanted}")


# --- Validating -----------------------------------------------------------------------------------


def validate(folder: str | os.PathLike, *, on_error: str = "stop", progress: bool = False) -> dict:
    """Reads everything in an export and checks every rule.

    Args:
        folder: the export.
        on_error: stop raises at the first bad scene or question, skip counts and lists them.
        progress: show a progress bar on stderr if tqdm is installed.

    Returns:
        {"producer": dict, "scenes": int, "splits": {split: scenes}, "questions": {kind: count},
        "tensors": [{"name", "shape", "dtype", "scenes"}], "bytes": int,
        "warnings": [str] (what shows that cameras may be wrong, see `cameras.Watch`, and
        that a room is in several splits),
        "dropped_questions": int (bad ones and those of dropped scenes, counted nowhere else),
        "dropped": [(scene or questions.jsonl:LINE, tensor or field, rule)]}. A size that differs
        between scenes is written low-high.

    Raises:
        ExportError: see `on_error`; a bad manifest or a questions.jsonl that is not the manifest's
            is always raised.
    """
    if on_error not in ("stop", "skip"):
        raise ExportError("validate", "on_error", f"must be stop or skip, is {_shown(on_error)}")
    export = Export(folder)
    errors: list[ExportError] = []
    splits: Counter = Counter()
    shapes: dict[str, list[tuple]] = {}
    dtypes: dict[str, set] = {}
    watch = cameras.Watch(export.manifest["scale"] == "metric")
    answered: dict[str, int] = {}  # scene -> the last of its questions that the teacher answered
    for scene_id in _bar(export.scene_ids(), progress):
        try:
            arrays = export.read_scene(scene_id)
        except ExportError as error:
            if on_error == "stop":
                raise
            errors.append(error)
            continue
        splits[export._entries[scene_id]["split"]] += 1
        if len(arrays.get(_ASKED, ())):
            answered[scene_id] = int(arrays[_ASKED].max())
        for name, array in arrays.items():
            shapes.setdefault(name, []).append(array.shape)
            dtypes.setdefault(name, set()).add(array.dtype.name)
        watch.add(arrays)
    dropped_questions = None if on_error == "stop" else errors
    dropped_scenes = {error.where[len("scene ") :] for error in errors}
    kinds: Counter = Counter()
    asked: Counter = Counter()
    for record in export.questions(dropped_questions):
        asked[record["scene_id"]] += 1
        if record["scene_id"] not in dropped_scenes:
            kinds[record["kind"]] += 1
    for scene_id, last in answered.items():
        if last >= asked[scene_id] and not dropped_questions:
            rule = f"question {last}, and the scene has {asked[scene_id]}"
            error = _scene_error(scene_id, _ASKED, rule)
            if on_error == "stop":
                raise error
            errors.append(error)
    tensors = [
        {
            "name": name,
            "shape": [_range(sizes) for sizes in zip(*shapes[name])],
            "dtype": "/".join(sorted(dtypes[name])),
            "scenes": len(shapes[name]),
        }
        for name in SPECS
        if name in shapes
    ]
    return {
        "producer": export.manifest["producer"],
        "scenes": sum(splits.values()),
        "splits": {split: splits[split] for split in SPLITS if splits[split]},
        "questions": dict(sorted(kinds.items())),
        "tensors": tensors,
        "warnings": [
            *watch.lines(),
            *_divided_rooms(export),
        ],
        "bytes": sum(path.stat().st_size for path in export.files() if path.is_file()),
        "dropped_questions": export.manifest["questions"]["count"] - sum(kinds.values()),
        # Once each: a scene that cannot be opened fails again with every question about it.
        "dropped": list(dict.fromkeys((e.where, e.field, e.rule) for e in errors)),
    }


def _divided_rooms(export: Export) -> list[str]:
    """A line about rooms whose scans are in several splits, if there are any."""
    rooms: dict[str, list[str]] = {}
    for scene_id in export.scene_ids():
        rooms.setdefault(scene_names.room_of(scene_id), []).append(scene_id)
    split_of = {scene_id: entry["split"] for scene_id, entry in export._entries.items()}
    divided = [scans for scans in rooms.values() if len({split_of[s] for s in scans}) > 1]
    if not divided:
        return []
    scans = ", ".join(f"{scan} of {split_of[scan]}" for scan in divided[0][:4])
    return [f"scans of {len(divided)} rooms are in several splits, the first: {scans}"]


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low}-{high}"


def _bar(items: Sequence[str], progress: bool) -> Iterable[str]:
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(items, desc="scenes", unit="scene")
    return items


def format_summary(summary: dict) -> str:
    """`validate`'s summary as text for a terminal."""
    producer = ", ".join(f"{key} {value}" for key, value in summary["producer"].items())
    splits = ", ".join(f"{count} {split}" for split, count in summary["splits"].items())
    rows = [("tensor", "shape", "dtype", "scenes")]
    for tensor in summary["tensors"]:
        shape = "[" + ", ".join(tensor["shape"]) + "]"
        rows.append((tensor["name"], shape, tensor["dtype"], str(tensor["scenes"])))
    rows += [("", "", "", ""), ("questions", "", "", str(sum(summary["questions"].values())))]
    rows += [(f"  {kind}", "", "", str(count)) for kind, count in summary["questions"].items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"producer: {producer}",
        f"scenes: {summary['scenes']} ({splits}), {summary['bytes'] / 1e6:.1f} MB",
        "",
    ]
    for row in rows:
        cells = [f"{row[column]:<{widths[column]}}" for column in range(3)]
        lines.append("  ".join((*cells, f"{row[3]:>8}")).rstrip())
    if summary["warnings"]:
        lines += ["", *(f"warning: {warning}" for warning in summary["warnings"])]
    if summary["dropped"]:
        lines += ["", f"dropped, with {summary['dropped_questions']} questions:"]
        lines += ["  " + ": ".join(filter(None, parts)) for parts in summary["dropped"]]
    return "\n".join(lines)
