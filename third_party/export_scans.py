"""Reads point clouds from .ply and .npz files; needs only Python 3.9 and numpy."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import export_job as job
import numpy as np

_PLY_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}


class Cloud(NamedTuple):
    """Points of a scene.

    Attributes:
        points: [N, 3], in the export's world.
        colour: [N, 3] in 0 to 255, or None.
        normal: [N, 3] unit vectors, or None.
        view: [N] index of the view that sees a point, or None.
    """

    points: np.ndarray
    colour: np.ndarray | None
    normal: np.ndarray | None
    view: np.ndarray | None

    def taken(self, index: np.ndarray) -> Cloud:
        """Returns the points at `index`."""
        colour, normal, view = (
            None if field is None else field[index]
            for field in (self.colour, self.normal, self.view)
        )
        return Cloud(self.points[index], colour, normal, view)


def read_scan(path: Path) -> Cloud:
    """Returns a cloud from a .ply file, or an .npz file with points and perhaps colour and normal.

    Raises:
        InputError: the file is neither, or has no points.
    """
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        cloud = _read_npz(path) if path.suffix == ".npz" else _read_ply(path)
    except Exception as error:  # damaged files raise many types of errors
        words = " ".join(str(error).split())[:300]
        raise job.InputError(f"{path}: no scan: {words or type(error).__name__}") from None
    points = cloud.points
    if points.ndim != 2 or points.shape[1:] != (3,) or not len(points):
        raise job.InputError(f"{path}: points of shape {list(points.shape)} are not [N, 3]")
    for name, array in cloud._asdict().items():
        if array is not None and (array.shape != points.shape or not np.isfinite(array).all()):
            raise job.InputError(f"{path}: {name} is not a finite {list(points.shape)}")
    return cloud


def _read_npz(path: Path) -> Cloud:
    with np.load(path, allow_pickle=False) as file:
        colour, normal = (
            file[name].astype(np.float64) if name in file else None for name in ("colour", "normal")
        )
        return Cloud(file["points"].astype(np.float64), colour, normal, None)


def _read_ply(path: Path) -> Cloud:
    """Returns the vertices of a PLY file, ascii or binary."""
    with open(path, "rb") as file:
        layout, count, kind = [], 0, ""
        if file.readline(100).strip() != b"ply":
            raise ValueError("not a PLY file")
        element = ""
        while True:
            words = file.readline(1000).decode("ascii").split()
            if words[:1] == ["end_header"]:
                break
            if not words:
                raise ValueError("its header does not end")
            if words[0] == "format":
                kind = words[1]
            elif words[0] == "element":
                if not element and words[1] != "vertex":
                    raise ValueError(f"element {words[1]} comes before the vertices")
                element = words[1]
                count = int(words[2]) if element == "vertex" else count
                if count < 0:
                    raise ValueError(f"{count} vertices")
            elif words[0] == "property" and element == "vertex":
                layout.append((words[2], _PLY_TYPES[words[1]]))
        names = [name for name, _ in layout]
        if kind == "ascii":
            # numpy allocates all rows before it reads the first.
            most = min(count, path.stat().st_size)
            rows = np.loadtxt(file, max_rows=most, ndmin=2, usecols=range(len(names)))
            columns, found = dict(zip(names, rows.T)), len(rows)
        else:
            order = {"binary_little_endian": "<", "binary_big_endian": ">"}[kind]
            row = np.dtype([(name, order + dtype) for name, dtype in layout])
            data = file.read(count * row.itemsize)
            found = len(data) // row.itemsize
            columns = np.frombuffer(data[: found * row.itemsize], row)
        if found < count:
            raise ValueError(f"cut off: {found} of {count} vertices")

    def stacked(*wanted: str) -> np.ndarray | None:
        has = all(name in names for name in wanted)
        return np.stack([columns[name] for name in wanted], -1).astype(np.float64) if has else None

    points = stacked("x", "y", "z")
    if points is None:
        raise ValueError("has no x, y, z")
    return Cloud(points, stacked("red", "green", "blue"), stacked("nx", "ny", "nz"), None)
