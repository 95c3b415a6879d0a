"""Vertices of PLY meshes, binary little endian.

Not read with the package plyfile, because files come from elsewhere: it reads a header without a
line end into memory character by character (23 s for 20 MB), and cannot skip the faces, which it
reads one by one unless all have a known number of corners.
"""

import re
from pathlib import Path

import numpy as np

from geode_jax.errors import UserError
from geode_jax.exports import files

_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "<i2"),
    **dict.fromkeys(("ushort", "uint16"), "<u2"),
    **dict.fromkeys(("int", "int32"), "<i4"),
    **dict.fromkeys(("uint", "uint32"), "<u4"),
    **dict.fromkeys(("float", "float32"), "<f4"),
    **dict.fromkeys(("double", "float64"), "<f8"),
}
_MAX_HEADER_BYTES = 1 << 16


def read_vertices(path: str | Path) -> np.ndarray:
    """Returns the positions [n, 3] float64 of a mesh's vertices, in the file's order and unit.

    Raises:
        UserError: the file cannot be read, is no binary little-endian PLY, is truncated, or has a
            vertex that is not finite.
    """
    path = Path(path)
    try:
        with files.open_regular(path) as file:
            count, fields = _read_header(path, file)
            rest = path.stat().st_size - file.tell()
            if count * fields.itemsize > rest:
                raise UserError(f"{path}: truncated: {count} vertices do not fit in {rest} bytes")
            vertices = np.fromfile(file, fields, count)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    positions = np.stack([vertices[axis].astype(np.float64) for axis in "xyz"], axis=-1)
    if not np.isfinite(positions).all():
        raise UserError(f"{path}: a vertex is not finite")
    return positions


def _read_header(path: Path, file) -> tuple[int, np.dtype]:
    """Returns the number of vertices and their fields; the file is then at the first vertex."""
    lines: list[list[str]] = []
    while not lines or lines[-1] != ["end_header"]:
        line = file.readline(_MAX_HEADER_BYTES)
        if not line.endswith(b"\n") or file.tell() > _MAX_HEADER_BYTES:
            raise UserError(f"{path}: not a PLY file: no end_header")
        lines.append(line.decode("latin-1").split())
        if lines[0] != ["ply"]:
            raise UserError(f"{path}: not a PLY file")
    lines = [line for line in lines if line and line[0] not in ("comment", "obj_info")]
    if lines[1] != ["format", "binary_little_endian", "1.0"]:
        shown = " ".join(lines[1])[:60]
        raise UserError(f"{path}: {shown!r}: only binary_little_endian 1.0 is read")
    count = re.fullmatch(r"element vertex (\d{1,12})", " ".join(lines[2]))
    if not count:
        raise UserError(f"{path}: the first element is not the vertices")
    fields = []
    for line in lines[3:]:
        if line[0] != "property":
            break
        if len(line) != 3 or line[1] not in _TYPES:
            raise UserError(f"{path}: {' '.join(line)[:60]!r} is no property of vertices")
        fields.append((line[2], _TYPES[line[1]]))
    names = {name for name, _ in fields}
    if not {"x", "y", "z"} <= names or len(names) < len(fields):
        raise UserError(f"{path}: vertices must have one x, y and z each")
    return int(count[1]), np.dtype(fields)
