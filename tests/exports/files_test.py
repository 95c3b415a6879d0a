"""The reader and writer of small files, on files of users and other programs."""

import contextlib
import csv
import io
import json
import os
import stat
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from geode_jax.exports import files
from geode_jax.exports.files import Entry, UserError

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,12}", fullmatch=True)
ROWS = st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=8, unique_by=lambda row: row[0])


def written(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(path: Path, data: bytes | str, fields: int = 1) -> list[tuple[str, ...]]:
    return [entry.fields for entry in files.read_list(written(path, data), fields)]


@st.composite
def list_texts(draw, fields: int) -> tuple[list[tuple[str, ...]], str]:
    """Draws rows of words, and a text that lists them in one of the formats."""
    rows = [row[:fields] for row in draw(ROWS)]
    layout = draw(st.sampled_from(["words", "csv", "json"]))
    if layout == "json":
        value = [list(row) for row in rows] if fields > 1 else [row[0] for row in rows]
        text = json.dumps(value, indent=draw(st.sampled_from([None, 1])))
    else:
        lines = []
        for row in [*rows, *draw(st.lists(st.sampled_from(rows), max_size=3))]:  # some repeated
            if layout == "csv":
                out = io.StringIO()
                quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
                comma = draw(st.sampled_from([",", ";"]))
                csv.writer(out, delimiter=comma, quoting=quoting, lineterminator="").writerow(row)
                # A single cell has no comma between cells; some programs add one at the end.
                lines.append(out.getvalue() + (comma if fields == 1 else ""))
            else:
                lines.append(draw(st.sampled_from([" ", "\t", "  "])).join(row))
            lines += draw(st.sampled_from([[], [""], ["# a, comment"], ["   "]]))
            lines[-1] += draw(st.sampled_from(["", " ", " # a comment; of a line"]))
        text = "\n".join(lines) + draw(st.sampled_from(["", "\n"]))
    text = text.replace("\n", draw(st.sampled_from(["\n", "\r\n", "\r"])))
    return rows, draw(st.sampled_from(["", "\ufeff"])) + text


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from([1, 2]))
def test_a_list_is_the_same_in_every_format(tmp_path, data, fields):
    rows, text = data.draw(list_texts(fields))
    assert read(tmp_path / "list", text, fields) == rows


@pytest.mark.parametrize(
    ("line", "cells"),
    [
        ('"a #2 of the lab",b', ["a #2 of the lab", "b"]),
        ('"a #2", "b ""x"" #3";c # "of', ["a #2", 'b "x" #3;c']),
        ('"a #2" # one, two', ["a #2"]),
        ('"a b"\t"c"', ["a b", "c"]),
        ('a,#b #"', ["a", "#b"]),
        ("'a' b", ["a", "b"]),
    ],
)
def test_a_comment_begins_outside_of_quotation_marks(tmp_path, line, cells):
    assert [row for (row,) in read(tmp_path / "list", f"first\n{line}\nlast")] == [
        "first",
        *cells,
        "last",
    ]
    with pytest.raises(UserError, match="line 2: a quotation mark is not closed"):
        read(tmp_path / "list", f'x\ny,"z # {line.replace(chr(34), "")}\nlast"')


def test_entries_know_where_they_stand(tmp_path):
    path = written(tmp_path / "a.txt", "# scenes\n\na b\x0c c\u2028d\nmy#room e\n")
    lines = [(entry.where, *entry.fields) for entry in files.read_list(path)]
    assert lines[0] == (f"{path}: line 3", "a") and lines[-1] == (f"{path}: line 4", "e")
    assert ("my#room",) in [line[1:] for line in lines]
    path = written(tmp_path / "a.json", "[\n  7,\n  8\n]")
    assert files.read_list(path)[1] == Entry(f"{path}: entry 2", ("8",))


@pytest.mark.parametrize(
    ("data", "fields", "rule"),
    [
        (b"", 1, "has no entry"),
        (b"\xef\xbb\xbf\r\n# nothing\n", 1, "has no entry"),
        (b"[]", 1, "has no entry"),
        ("a\n".encode("utf-16"), 1, "is UTF-16"),
        (b"a\n\xff\n", 1, "line 2: not UTF-8"),
        (b"a\nb\0\n", 1, "line 2: .* unprintable"),
        ("a\n\ufeffb\n", 1, "line 2: .* unprintable"),  # two concatenated lists
        (b"a,,b\n", 1, "line 1: has an empty cell"),
        (b'{"a": "train"}', 2, "must be a list, is a JSON object"),
        (b'["a"', 1, "not JSON"),
        (b"[" * 100_000, 1, "not JSON: nested too deeply"),
        (b'["a", null]', 1, "entry 2: must be text or a whole number"),
        (b"[true]", 1, "entry 1: must be text or a whole number"),
        (b'["a"]', 2, "entry 1: must have 2 words, has 1"),
        (b"a train\nb\n", 2, "line 2: must have 2 words, has 1"),
        (b"a train\na val\n", 2, "line 2: a has other values in line 1"),
        (b"a,train,extra\n", 2, "line 1: must have 2 words, has 3"),
        (b'a,"' + b"x" * 200_000 + b'"', 1, "line 1: not CSV"),
    ],
)
def test_bad_lists_are_one_line(tmp_path, data, fields, rule):
    with pytest.raises(UserError, match=rule) as caught:
        read(tmp_path / "list", data, fields)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "list")) and message.isprintable()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from([1, 2]))
def test_any_bytes_are_read_as_a_list_or_refused(tmp_path, data, fields):
    with contextlib.suppress(UserError):
        found = read(tmp_path / "list", data, fields)
        assert found and all(len(row) == fields and all(row) for row in found)


# --- Reading --------------------------------------------------------------------------------------

READERS = [
    files.read_text,
    files.read_json,
    files.read_json_object,
    files.read_list,
    lambda path: list(files.json_lines(path)),
]


@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_read(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("pipe", "dangling", "nowhere", "", "nul\0l", "x" * 5000):
        with pytest.raises(UserError, match="cannot be read") as caught:
            reader(tmp_path / name)
        assert str(caught.value).isprintable() and len(str(caught.value)) <= files.MAX_MESSAGE
    with pytest.raises(UserError, match="/dev/zero: cannot be read: not a regular file"):
        reader("/dev/zero")


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"9" * 5000, "not JSON"),
        (b"1e999", "beyond a float"),
        (b"-1e400", "beyond a float"),
        (b"NaN", "NaN is no JSON number"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"x": {"\xc3\xa4": 1, "\xc3\xa4": 1}}', "appears twice"),
        (b"{'a': 1}", "not JSON"),
        (b'"\xff"', "line 1: not UTF-8: byte 0xff"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16"),
        (b'{"a": 1', "not JSON"),
        (b"\x1b[31m", "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_what_is_not_json_is_one_line(tmp_path, data, rule):
    path = written(tmp_path / "a.json", data)
    for read_file in (files.read_json, files.read_json_object):
        with pytest.raises(UserError, match=rule) as caught:
            read_file(path)
        assert str(caught.value).startswith(f"{path}: not JSON") or "UTF-16" in rule
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    if data:
        ((number, error),) = files.json_lines(path)
        assert number == 1 and isinstance(error, UserError) and f"{path}:1" in str(error)


def test_json_is_read(tmp_path):
    value = {"a": [1, 2.5, None, "\u00e4"], "b": {"a": {}}}
    path = written(tmp_path / "a.json", "\ufeff" + json.dumps(value, ensure_ascii=False))
    assert files.read_json(path) == files.read_json_object(path) == value
    assert files.read_json(written(path, "[NaN]"), nan=True)[0] != 0
    with pytest.raises(UserError, match="larger than 3 bytes"):
        files.read_json(path, most=3)
    for text, kind in (("[1]", "a list"), ("1", "a number"), ("null", "null"), ('"a"', "text")):
        with pytest.raises(UserError, match=f"must be a JSON object, is {kind}"):
            files.read_json_object(written(path, text))


def test_lines_of_json_keep_their_numbers(tmp_path, monkeypatch):
    path = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\n[1\n "b"')
    rows = list(files.json_lines(path))
    assert [number for number, _ in rows] == [1, 3, 4]
    assert rows[0][1] == {"a": 1} and rows[2][1] == "b"
    assert str(rows[1][1]).startswith(f"{path}:3: not JSON")
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 10)
    with pytest.raises(UserError, match=":2: longer than 10 bytes"):
        list(files.json_lines(written(path, b"1\n" + b" " * 11 + b"\n1")))


@settings(max_examples=60)
@given(st.text(max_size=2000), st.integers(20, 700))
def test_messages_are_one_printable_line(text, most):
    line = files.one_line(text, most)
    assert line.isprintable() and len(line) <= most
    assert len(str(UserError(text))) <= files.MAX_MESSAGE


# --- Writing --------------------------------------------------------------------------------------


@pytest.fixture
def umask():
    """Sets the process's umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_file_has_the_mode_that_the_umask_gives(tmp_path, umask, mask):
    umask(mask)
    files.write_json(tmp_path / "new" / "a.json", {"a": "\u00e4"}, indent=None)
    path = tmp_path / "new" / "a.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert path.read_bytes() == b'{"a": "\xc3\xa4"}\n'
    files.write_text(path, "other", durable=True)
    assert path.read_text() == "other" and os.listdir(path.parent) == ["a.json"]


def test_a_link_keeps_being_one(tmp_path):
    (tmp_path / "real").mkdir()
    written(tmp_path / "real" / "a", "old")
    (tmp_path / "link").symlink_to("real/a")
    (tmp_path / "to_be").symlink_to("real/b")
    for name in ("link", "to_be"):
        files.write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == "new"
    assert sorted(os.listdir(tmp_path / "real")) == ["a", "b"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = written(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), files.writing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    with pytest.raises(UserError, match="a: cannot be written: No space"), files.writing(path):
        raise OSError(28, "No space left on device")
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", ".", "a/b", "loop", "nul\0l"):
        with pytest.raises(UserError, match="cannot be written"):
            files.write_bytes(tmp_path / name, [b"x"])
    with pytest.raises(UserError, match="/dev/null: cannot be written: not a regular file"):
        files.write_text("/dev/null", "x")
    assert sorted(os.listdir(tmp_path)) == ["a", "loop", "pipe"]
