"""The tensor files of an export: reading and writing safetensors, bf16 included.

The files are not written by safetensors' numpy writer: it needs ml_dtypes for bf16, its arguments
changed between versions (an exporter has the version of its environment), and only the owner can
read its files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from . import files
from .bfloat16 import bfloat16_of_float32, float32_of_bfloat16
from .contract import (
    BOXES,
    DTYPES,
    ENTRIES,
    EXPONENT,
    FILES,
    SPECS,
    ExportError,
    check_values,
    scene_error,
    shown,
)

STORED = {"bfloat16": "BF16", "bool": "BOOL"}
STORED.update({f"float{bits}": f"F{bits}" for bits in (16, 32, 64)})
STORED.update({f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)})
STORED.update({f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)})
"""numpy's names of dtypes -> safetensors' names."""


def chunks(
    tensors: Mapping[str, tuple[str, np.ndarray]], metadata: Mapping[str, str] | None = None
) -> Iterator[Any]:
    """Yields the bytes of a safetensors file, chunk by chunk, for `files.write_bytes`.

    Args:
        tensors: name -> (safetensors' name of the dtype, little-endian C-ordered array).
        metadata: texts for the header.
    """
    # Wide types first, as the library does: every tensor is then aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, array = tensors[name]
        offsets = [end, end + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name][1].reshape(-1).view(np.uint8)


def tensor_file(folder: Path, kind: str, scene_id: str) -> Path:
    """Path of a scene's tensors; `kind` is the sub-folder, "scenes" or "teacher"."""
    return folder / kind / f"{scene_id}.safetensors"


def scene_files(folder: Path, scene_id: str) -> list[Path]:
    """Paths of a scene in an unfinished export: the entry that marks it finished, its tensors."""
    tensors = [tensor_file(folder, kind, scene_id) for _, kind, _ in FILES]
    return [folder / ENTRIES / f"{scene_id}.json", *tensors]


def to_stored(
    scene_id: str, name: str, array: Any, manifest: Mapping[str, Any]
) -> tuple[str, np.ndarray]:
    """Returns (safetensors dtype, little-endian C-ordered array); bf16 is given as uint16 bits."""
    if not isinstance(array, np.ndarray):
        raise scene_error(scene_id, shown(name), f"{type(array).__name__} is not a numpy array")
    array = np.asarray(array, order="C")
    own = str(array.dtype.name)
    dtype = STORED.get(own, own)
    if dtype == "BF16":
        array = array.view(np.uint16)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    target = DTYPES[manifest["dtype"]]
    if name not in SPECS or SPECS[name].dtypes or dtype == target or dtype not in EXPONENT:
        return dtype, array
    check_values(scene_id, name, dtype, array, manifest)
    if dtype == "BF16":
        array = float32_of_bfloat16(array)
    if target == "BF16":
        return target, bfloat16_of_float32(array)
    with np.errstate(over="ignore"):  # what overflows is refused as not finite
        return target, array.astype(manifest["dtype"])


def _read_header(path: Path) -> tuple[dict, int]:
    """A safetensors file's header and the position of its first data byte."""
    with files.open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, path.stat().st_size)))
    return header, 8 + length


def damage(scene_id: str, path: Path, otherwise: str) -> ExportError:
    """Returns the error of a damaged file: the tensor that is cut off, else `otherwise`."""
    label = f"{path.parent.name}/{path.name}"
    prefix = next(prefix for prefix, kind, _ in FILES if kind == path.parent.name)
    with contextlib.suppress(Exception):  # the header itself is damaged
        header, start = _read_header(path)
        have = path.stat().st_size
        for name, entry in header.items():
            need = start + entry["data_offsets"][1] if name != "__metadata__" else 0
            if need > have:
                rule = f"{label} is truncated (needs at least {shown(need)} bytes, has {have})"
                full = prefix + name
                return scene_error(scene_id, full if full in SPECS else shown(full), rule)
    return scene_error(scene_id, "*", f"{label} {otherwise}")


@contextlib.contextmanager
def opened(scene_id: str, path: Path) -> Iterator[Any]:
    """Opens a file with `safe_open`; every failure becomes an `ExportError`."""
    try:
        refuse_irregular(path)
        with safe_open(str(path), framework="np") as file:
            yield file
    except ExportError:
        raise
    except FileNotFoundError:
        raise damage(scene_id, path, "is missing") from None
    except Exception as error:  # SafetensorError, OSError, and what a damaged header may cause
        raise damage(scene_id, path, f"cannot be read: {shown(str(error))}") from None


def layout_of(file: Any, prefix: str) -> dict[str, tuple]:
    """Returns {prefix + name: (dtype, shape)} of all tensors of an open file."""
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {prefix + n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}


def read_tensor(file: Any, path: Path, name: str, dtype: str) -> np.ndarray:
    """Returns one tensor as stored; bf16 as uint16 bits, which safetensors' numpy reader lacks."""
    if dtype != "BF16":
        return file.get_tensor(name)
    header, start = _read_header(path)
    begin, end = header[name]["data_offsets"]
    bits = np.fromfile(path, dtype="<u2", count=(end - begin) // 2, offset=start + begin)
    return bits.reshape(header[name]["shape"])


def presented(dtype: str, stored: np.ndarray) -> np.ndarray:
    """Returns a stored tensor for the caller: bf16 as ml_dtypes.bfloat16 or else float32."""
    if dtype != "BF16":
        return stored
    try:
        import ml_dtypes
    except ImportError:
        return float32_of_bfloat16(stored)
    return stored.view(ml_dtypes.bfloat16)


class BoxCounts(dict):
    """Caches {scene: number of rows of `target/boxes`}, read from file headers on demand."""

    def __init__(self, folder: Path, scenes: Any):
        super().__init__()
        self.folder, self.scenes = folder, scenes

    def __call__(self, scene_id: str) -> int | None:
        """Returns the count, or None for a scene that is not in `scenes`."""
        if scene_id not in self.scenes:
            return None
        if scene_id not in self:
            with opened(scene_id, tensor_file(self.folder, "scenes", scene_id)) as file:
                boxes = file.get_slice(BOXES).get_shape() if BOXES in file.keys() else (0,)
                self[scene_id] = boxes[0]
        return self[scene_id]


def refuse_irregular(path: Path) -> None:
    """Raises OSError for anything but a regular file: opening a pipe waits for its writer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
