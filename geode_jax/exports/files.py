"""Reads and writes small files. Everything that a user or another program made is read here.

All text, lists, JSON and JSON lines that come from outside are read here, and all small files are
written here. A file that cannot be read raises `UserError`: one line with the path and the rule.

* Only regular files and links to them are read; a pipe or device could block.
* Text is UTF-8, with or without a byte order mark.
* JSON that Python cannot hold (nesting, digits, numbers beyond float) is refused as not JSON.
* A file is written atomically, whole or not at all, with the mode that the user's umask gives.

This module stands alone (Python 3.9, standard library): exporters load it in other environments.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MAX_TEXT_BYTES = 1 << 30
"""Largest text or JSON file that is read whole."""

MAX_MESSAGE = 600
"""Longest message, in characters; the middle of a longer one is cut out."""


def one_line(text: str, most: int = MAX_MESSAGE) -> str:
    """Returns a text as one line of at most `most` printable characters.

    Runs of white space become one space, control characters and lone surrogates become their
    escapes, and `...` replaces the middle of a text that is too long.
    """
    if len(text) > 8 * most:  # first, since the steps below take time per character
        text = f"{text[: 4 * most]} {text[-4 * most :]}"
    text = " ".join(text.split())
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > most:
        half = (most - 5) // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return text


class UserError(ValueError):
    """Bad input in one line: what, where, which rule. Entry points print it and exit with 2.

    Any message becomes one printable line of at most `MAX_MESSAGE` characters, see `one_line`.
    """

    def __init__(self, message: str):
        super().__init__(one_line(str(message)))


# --- Reading --------------------------------------------------------------------------------------


def _reason(error: OSError) -> str:
    return error.strerror or one_line(str(error))


def open_regular(path: str | os.PathLike) -> Any:
    """Opens a file for reading bytes.

    Raises:
        UserError: the path is missing, no regular file (a folder, pipe or device), or not readable.
    """
    try:
        # Without O_NONBLOCK, opening a pipe blocks until a process opens it for writing.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = _reason(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: cannot be read: {reason}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "is a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise UserError(f"{path}: cannot be read: {kind}")
    return os.fdopen(descriptor, "rb")


def refuse_foreign_link(path: Path) -> None:
    """Refuses a symbolic link that leaves its folder, so that no other file is read as a model's.

    The cache of huggingface_hub has links from `MODEL/snapshots/REVISION` to `MODEL/blobs`; these
    are allowed.

    Raises:
        UserError: the path is such a link.
    """
    folder, target = (Path(os.path.realpath(p)) for p in (path.parent, path))
    allowed = [folder]
    if "snapshots" in folder.parts:
        at = len(folder.parts) - 1 - folder.parts[::-1].index("snapshots")
        allowed.append(Path(*folder.parts[:at]) / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(f"{path}: a link to {target}, out of its folder; copy the file instead")


def read_bytes(path: str | os.PathLike, most: int = MAX_TEXT_BYTES) -> bytes:
    """Returns the content of a regular file of at most `most` bytes.

    Raises:
        UserError: see `open_regular`, or the file is larger.
    """
    with open_regular(path) as file:
        try:
            # Not read(most + 1), which would allocate that many bytes first.
            fits = os.fstat(file.fileno()).st_size <= most
            data = file.read() if fits else b""
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {_reason(error)}") from None
    if not fits or len(data) > most:
        raise UserError(f"{path}: larger than {most:,} bytes")
    return data


def decode(where: str | os.PathLike, data: bytes) -> str:
    """Decodes UTF-8 bytes; a byte order mark at their beginning is dropped.

    Raises:
        UserError: the bytes are not UTF-8; the message begins with `where`.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{where}: is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line}: not UTF-8: byte {data[error.start]:#04x}") from None


def read_text(path: str | os.PathLike, most: int = MAX_TEXT_BYTES) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: the file cannot be read, is larger than `most` bytes, or is not UTF-8.
    """
    return decode(path, read_bytes(path, most))


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"the number {one_line(text, 40)} is beyond a float")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{one_line(twice, 40)!r} appears twice in an object")
    return found


def parse_json(where: str | os.PathLike, data: bytes | str, *, nan: bool = False) -> Any:
    """Parses a JSON text.

    Args:
        where: beginning of error messages, `PATH` or `PATH:LINE`.
        data: UTF-8 bytes, or text.
        nan: whether NaN, Infinity and -Infinity, which Python's writer makes, are accepted.

    Raises:
        UserError: the text is not UTF-8, not JSON, nested too deeply, has a number beyond a float,
            or repeats a name in one object.
    """
    constant: Callable[[str], float] = float if nan else _constant
    text = decode(f"{where}: not JSON", data) if isinstance(data, bytes) else data
    try:
        return json.loads(
            text, parse_float=_finite, parse_constant=constant, object_pairs_hook=_unique
        )
    except RecursionError:
        raise UserError(f"{where}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {one_line(str(error), 120)}") from None


def read_json(path: str | os.PathLike, *, nan: bool = False, most: int = MAX_TEXT_BYTES) -> Any:
    """Returns the value of a JSON file.

    Raises:
        UserError: see `read_bytes` and `parse_json`.
    """
    return parse_json(path, read_bytes(path, most), nan=nan)


def read_json_object(
    path: str | os.PathLike, *, nan: bool = False, most: int = MAX_TEXT_BYTES
) -> dict[str, Any]:
    """Returns the object of a JSON file.

    Raises:
        UserError: see `read_json`; or the value is no object.
    """
    value = read_json(path, nan=nan, most=most)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object, is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


MAX_LINE_BYTES = 1 << 26
"""Longest line of a file of JSON lines."""


def json_lines(path: str | os.PathLike, *, nan: bool = False) -> Iterator[tuple[int, Any]]:
    """Yields (line number from 1, value) of a file of JSON lines; blank lines are skipped.

    A line that is not JSON yields its `UserError` in place of a value, so the caller decides
    whether to raise it, to skip and count the line, or to end there.

    Raises:
        UserError: the file cannot be read.
    """
    with open_regular(path) as file:
        number = 0
        while True:
            try:
                line = file.readline(MAX_LINE_BYTES + 1)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {_reason(error)}") from None
            if not line:
                return
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{where}: longer than {MAX_LINE_BYTES:,} bytes")
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if line.strip():
                try:
                    yield number, parse_json(where, line, nan=nan)
                except UserError as error:
                    yield number, error


class Entry(NamedTuple):
    """An entry of a list file.

    Attributes:
        where: beginning of error messages: `PATH: line N`, or `PATH: entry N` of a JSON list.
        fields: the words of the line; one word in a list of names.
    """

    where: str
    fields: tuple[str, ...]


MAX_LIST_BYTES = 1 << 26
"""Largest list file."""


def read_list(path: str | os.PathLike, fields: int = 1) -> list[Entry]:
    """Reads a list file; all lists of scenes, splits and question ids are read here.

    Three formats are read: lines of words separated by spaces or tabs; CSV with commas or
    semicolons; and a JSON list (a file that begins with `[`) of texts or whole numbers, or of
    lists of `fields` of these. In lines, `#` at the beginning or after a space begins a comment,
    except between double quotation marks, which must be closed. A line has `fields` words or
    cells; with `fields` = 1 it may have any number, each an entry. A byte order mark, Windows line
    ends and blank lines are ignored, and so are repetitions of an entry.

    Callers must refuse entries that match nothing; otherwise a table's heading, or a list in
    another format, would be read as an empty list.

    Raises:
        UserError: the file cannot be read, has no entry, an entry has another number of fields, or
            entries with the same first field differ in the others.
    """
    text = read_text(path, MAX_LIST_BYTES)
    if text.lstrip().startswith("["):
        entries = _json_entries(path, text)
    elif text.lstrip().startswith("{"):
        raise UserError(f"{path}: must be a list, is a JSON object")
    else:
        entries = list(_line_entries(path, text))
    if fields == 1:
        entries = [Entry(entry.where, (field,)) for entry in entries for field in entry.fields]
    seen: dict[str, Entry] = {}
    for entry in entries:
        if len(entry.fields) != fields:
            shown = " ".join(entry.fields)
            rule = f"must have {fields} words, has {len(entry.fields)}: {one_line(shown, 80)!r}"
            raise UserError(f"{entry.where}: {rule}")
        if not all(entry.fields):
            raise UserError(f"{entry.where}: has an empty cell")
        if any(not field.isprintable() for field in entry.fields):
            raise UserError(f"{entry.where}: {entry.fields[0]!r} has unprintable characters")
        before = seen.setdefault(entry.fields[0], entry)
        if before.fields != entry.fields:
            place = before.where.rpartition(": ")[2]
            raise UserError(f"{entry.where}: {entry.fields[0]} has other values in {place}")
    if not seen:
        raise UserError(f"{path}: has no entry")
    return list(seen.values())


def _json_entries(path: str | os.PathLike, text: str) -> list[Entry]:
    entries = []
    for number, item in enumerate(parse_json(path, text), 1):
        row = item if isinstance(item, list) else [item]
        where = f"{path}: entry {number}"
        if not all(type(field) in (str, int) for field in row):
            raise UserError(f"{where}: must be text or a whole number")
        entries.append(Entry(where, tuple(str(field).strip() for field in row)))
    return entries


_QUOTED = re.compile(r'"[^"]*"')


def _without_comment(where: str, line: str) -> str:
    """Returns a line without its comment; a `#` in a quoted cell begins none.

    Raises:
        UserError: a quoted cell does not end.
    """
    mark, begins = "", True  # the open quotation mark; True where a cell or word may begin
    for place, char in enumerate(line):
        if mark:
            mark = "" if char == mark else mark  # "" inside of a cell closes and opens it
        elif char == "#" and (place == 0 or line[place - 1].isspace()):
            return line[:place].strip()
        elif char == '"' and (begins or line[place - 1] == '"'):
            mark = char
        begins = not mark and (char.isspace() or char in ",;")
    if mark:
        raise UserError(f"{where}: a quotation mark is not closed")
    return line.strip()


def _line_entries(path: str | os.PathLike, text: str) -> Iterator[Entry]:
    # Not splitlines, which also splits at form feeds and other signs, so line numbers would differ.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        line = _without_comment(where, line)
        bare = _QUOTED.sub("", line)
        comma = next((c for c in ",;" if c in bare), " " if '"' in line else "")
        if comma:
            line = line.replace("\t", " ") if comma == " " else line
            try:
                cells = next(csv.reader([line], delimiter=comma, skipinitialspace=True), [])
            except csv.Error as error:
                raise UserError(f"{where}: not CSV: {error}") from None
            while cells and not cells[-1].strip():  # a comma at the end of the line
                cells.pop()
        else:
            cells = [word.strip("\"'") for word in line.split()]
        if cells:
            yield Entry(where, tuple(cell.strip() for cell in cells))


# --- Writing --------------------------------------------------------------------------------------


def cannot_write(path: str | os.PathLike, error: OSError) -> UserError:
    """Returns the UserError of a file that cannot be written, from the system's error."""
    return UserError(f"{path}: cannot be written: {_reason(error)}")


@contextlib.contextmanager
def writing(path: str | os.PathLike, *, durable: bool = False) -> Iterator[Any]:
    """Opens a binary file that replaces `path` atomically at the end of the block.

    If the block raises, `path` stays as it was. The mode is what the umask gives; missing parent
    folders are made. A symbolic link stays: the file that it points to is replaced.

    Args:
        path: path of the file, which may exist.
        durable: whether to fsync, so that the bytes are on the disk when the block ends.

    Raises:
        UserError: the file cannot be written, or the path is something other than a regular file.
    """
    path = Path(path)
    if "\0" in str(path):
        raise UserError(f"{path}: cannot be written: a null character in its name")
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.part")
    try:
        if target.is_symlink() or (target.exists() and not target.is_file()):  # links in a circle
            raise UserError(f"{path}: cannot be written: not a regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_bytes(
    path: str | os.PathLike, data: bytes | Iterable[Any], *, durable: bool = False
) -> None:
    """Writes bytes, or an iterable of chunks, whole or not at all; see `writing`."""
    with writing(path, durable=durable) as file:
        for chunk in [data] if isinstance(data, bytes) else data:
            file.write(chunk)


def write_text(path: str | os.PathLike, text: str, *, durable: bool = False) -> None:
    """Writes text as UTF-8, whole or not at all; see `writing`.

    A lone surrogate (Python's form of a file name that is not UTF-8) becomes its escape.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"), durable=durable)


def write_json(
    path: str | os.PathLike,
    value: Any,
    *,
    indent: int | None = 1,
    default: Callable[[Any], Any] | None = None,
    durable: bool = False,
) -> None:
    """Writes a value as JSON with a line end, whole or not at all; see `writing`."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=default)
    write_text(path, text + "\n", durable=durable)


def is_full(error: OSError) -> bool:
    """Returns whether an error means that the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
