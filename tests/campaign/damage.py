"""Damages one file of a folder in a random way that occurs in practice."""

import dataclasses
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Damage:
    """One damage.

    Attributes:
        kind: name of the function of this module that made it.
        path: path of the file, relative to the folder.
        plain: whether every reader can notice it without a checksum or the true values: the file
            is not regular, not UTF-8, or not JSON.
    """

    kind: str
    path: str
    plain: bool


# --- The file as a whole --------------------------------------------------------------------------


def _pipe(path: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _circle(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _device(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _gone(path: Path, draw: random.Random) -> None:
    path.unlink()


def _empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


# --- Bytes ----------------------------------------------------------------------------------------


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(draw.choice((1, 1, 1, 3))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _zeroes(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data) + 1)
    size = min(draw.choice((8, 64, 512)), len(data) - start)
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def _cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data) + 1)])


def _longer(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice((1, 8, 1000))))


def _huge(path: Path, draw: random.Random) -> None:
    """Makes a size or count near the beginning huge."""
    data = bytearray(path.read_bytes() + bytes(8))[:-8] or bytearray(8)
    start = 4 * draw.randrange(max(1, min(len(data), 512) // 4))
    value = draw.choice((2**31 - 1, 2**32 - 1, 2**62, 10**12, 2**63))
    width = draw.choice((4, 8))
    data[start : start + width] = (value % 256**width).to_bytes(width, "little")
    path.write_bytes(data)


# --- Text -----------------------------------------------------------------------------------------

_NUMBERS = ("nan", "inf", "-inf", "1e999", "-1", "0", "-0.0", "1e-300", "1e30", "9" * 5000, "x", "")
_SIGNS = ("\0", "\x1b[31m", "\u202e", "\ud83d\ude00", "é", "\u0663", ",", ";", "#", '"', "\\", "\t")


def _utf16(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes().decode(errors="replace").encode("utf-16"))


def _latin(path: Path, draw: random.Random) -> None:
    """Inserts a byte that UTF-8 never has."""
    data = path.read_bytes()
    start = draw.randrange(len(data) + 1)
    path.write_bytes(data[:start] + b"\xff" + data[start:])


def _mark(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def _windows(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def _sign(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    start = draw.randrange(len(data) + 1)
    sign = draw.choice(_SIGNS).encode(errors="surrogatepass")
    path.write_bytes(data[:start] + sign + data[start:])


def _number(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    found = list(re.finditer(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?", data))
    if found:
        one = draw.choice(found)
        data = data[: one.start()] + draw.choice(_NUMBERS).encode() + data[one.end() :]
    path.write_bytes(data)


def _line(path: Path, draw: random.Random) -> None:
    """Removes, moves or duplicates a line."""
    lines = path.read_bytes().splitlines(keepends=True)
    if lines:
        line = lines.pop(draw.randrange(len(lines)))
        for _ in range(draw.randrange(3)):
            lines.insert(draw.randrange(len(lines) + 1), line)
    path.write_bytes(b"".join(lines))


# --- JSON -----------------------------------------------------------------------------------------

_RAW = "<raw>"
_VALUES: tuple[Any, ...] = (
    None, True, False, [], {}, "", " ", "x", 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308,
    5e-324, "nan", "1e999", "../../etc/passwd", "/dev/zero", "\ud800", "\0", "a\nb", "\x1b[31mred",
    "w" * 100_000, "7" * 4000, [[]], [None], {"a": 1}, [1, "2"], "é", "\u202e",
)  # fmt: skip
_PLAIN = {
    "digits": "7" * 5000,
    "infinite": "1e999",
    "nested": "[" * 50_000 + "]" * 50_000,
    "nested objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
}
"""JSON of values that no reader can hold."""
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def _places(value: Any, at: tuple = ()) -> Iterable[tuple]:
    yield at
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value[:50]) if isinstance(value, list) else items
    for key, child in items:
        yield from _places(child, (*at, key))


def _replaced(value: Any, at: tuple, change: Callable[[Any], Any]) -> Any:
    if not at:
        return change(value)
    parent = value
    for key in at[:-1]:
        parent = parent[key]
    parent[at[-1]] = change(parent[at[-1]])
    return value


def _changed(value: Any, draw: random.Random) -> tuple[str, Any, str]:
    """Returns (kind, the value with one change, JSON that replaces `_RAW`)."""
    by_depth: dict[int, list] = {}
    for at in _places(value):
        by_depth.setdefault(len(at), []).append(at)
    at = draw.choice(by_depth[draw.choice(list(by_depth))])
    node = value
    for key in at:
        node = node[key]
    what = draw.randrange(10)
    if what == 0:
        kind, raw = draw.choice(list(_PLAIN.items()))
        return f"json {kind}", _replaced(value, at, lambda _: _RAW), raw
    if what == 1:
        return "json nan", _replaced(value, at, lambda _: _RAW), draw.choice(_NOT_FINITE)
    if what == 2 and at:
        parent = value
        for key in at[:-1]:
            parent = parent[key]
        parent.pop(at[-1])
        return "json lost", value, ""
    if what == 3 and isinstance(node, dict):
        node[draw.choice(("new", "", "__class__", "trust_remote_code"))] = draw.choice(_VALUES)
        return "json new", value, ""
    if what == 4 and isinstance(node, (int, float)) and not isinstance(node, bool):
        factor = draw.choice((-1, 0.5, 2, 1000, 10**9, 1 + 1e-9, math.pi))
        return "json number", _replaced(value, at, lambda number: number * factor), ""
    if what == 5:
        return "json list", _replaced(value, at, lambda inner: [inner]), ""
    if what == 6:
        return "json text", _replaced(value, at, lambda inner: json.dumps(inner)), ""
    return "json type", _replaced(value, at, lambda _: draw.choice(_VALUES)), ""


def _json(path: Path, draw: random.Random) -> tuple[str, bool]:
    """Changes one value of a JSON file, or of one line of JSON lines; returns (kind, plain)."""
    data = path.read_bytes()
    lines = data.splitlines(keepends=True) if path.suffix == ".jsonl" else [data]
    number = draw.randrange(len(lines))
    if draw.random() < 0.1:  # repeat a name
        names = list(re.finditer(rb'"(?:[^"\\]|\\.)*"\s*:\s*(?=["\d\[{tfn-])', lines[number]))
        if names:
            name = draw.choice(names)
            twice = lines[number][: name.start()] + name[0] + b"1, " + lines[number][name.start() :]
            lines[number] = twice
            path.write_bytes(b"".join(lines))
            return "json twice", True
    kind, value, raw = _changed(json.loads(lines[number]), draw)
    text = json.dumps(value, indent=None if len(lines) > 1 else 1)
    lines[number] = text.replace(json.dumps(_RAW), raw).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    return kind, kind.removeprefix("json ") in _PLAIN


# --- The draw -------------------------------------------------------------------------------------

_WHOLE = (_pipe, _folder, _dangling, _circle, _device)
_BYTES = (_flip, _flip, _zeroes, _cut, _longer, _huge, _empty, _gone)
_TEXT = (_utf16, _latin, _mark, _windows, _sign, _number, _number, _line, _flip, _cut, _zeroes)
_TEXT_NAMES = (".json", ".jsonl", ".txt", ".py", ".csv", ".zarray")


def _is_json(path: Path) -> bool:
    data = path.read_bytes()
    if data.lstrip()[:1] not in (b"{", b"["):
        return False
    try:
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        return all(isinstance(json.loads(line), (dict, list)) for line in lines)
    except (ValueError, RecursionError):
        return False


def _is_text(path: Path) -> bool:
    return path.suffix in _TEXT_NAMES or _is_json(path)


def files_of(folder: Path, patterns: Iterable[str] = ("**/*",)) -> list[Path]:
    """Returns the files that may be damaged, sorted."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def damage(folder: Path, draw: random.Random, patterns: Iterable[str] = ("**/*",)) -> Damage:
    """Damages one file that matches a pattern.

    Args:
        folder: the folder, which is changed.
        draw: source of randomness.
        patterns: patterns of the files, relative to the folder.
    """
    files = files_of(folder, patterns)
    path = draw.choice(files)
    relative = str(path.relative_to(folder))
    luck = draw.random()
    if luck < 0.08:
        act = draw.choice(_WHOLE)
        act(path, draw)
        return Damage(act.__name__[1:], relative, True)
    if luck < 0.12 and len(files) > 1:
        other = draw.choice([file for file in files if file != path])
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
        return Damage("swap", f"{relative} {other.relative_to(folder)}", False)
    if luck < 0.5 and _is_json(path):
        kind, plain = _json(path, draw)
        return Damage(kind, relative, plain)
    act = draw.choice(_TEXT if luck < 0.85 and _is_text(path) else _BYTES)
    plain = act in (_utf16, _latin) and _is_text(path)
    act(path, draw)
    return Damage(act.__name__[1:], relative, plain)
