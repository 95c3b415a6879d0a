"""Metrics of a run: JSON lines, TensorBoard events, result files, and the progress bar."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.runtime.bars import progress_bar
from geode_jax.runtime.distributed import is_main
from geode_jax.training.event_file import EventFile


def read_metrics(path: Path) -> list[dict]:
    """Returns the rows of a metrics.jsonl without a half-written last line (of a killed run).

    Raises:
        UserError: the file cannot be read, or another line is not a row.
    """
    rows, damage = _read_rows(path)
    if damage:
        raise UserError(damage[0])
    return [row for row, _ in rows]


def _read_rows(path: Path) -> tuple[list[tuple[dict, bytes]], list[str]]:
    """Returns the rows with their lines, and one message for each line that is not a row."""
    rows: list[tuple[dict, bytes]] = []
    damage: list[str] = []
    if not path.exists():
        return rows, damage
    *lines, last = files.read_bytes(path).split(b"\n")
    for number, line in enumerate([*lines, last] if last else lines, 1):
        where = f"{path}:{number}"
        try:
            row = files.parse_json(where, line, nan=True)
            _check_row(where, row, rows[-1][0]["step"] if rows else 0)
            rows.append((row, line + b"\n"))
        except UserError as error:
            if number <= len(lines):
                damage.append(str(error))
    return rows, damage


def _check_row(where: str, row: Any, least: int) -> None:
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < least:
        raise UserError(f"{where}: must be an object whose step is not below the row's before")
    wrong = [name for name, value in row.items() if type(value) not in (int, float)]
    if wrong:
        raise UserError(f"{where}: {wrong[0]}: must be a number")


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file atomically, in process 0; arrays of one number become floats."""
    if not is_main():
        return
    files.write_json(path, value, default=plain_value)


def plain_value(value: Any) -> Any:
    """Returns a value that JSON can hold: the fields of a dataclass, or an array's one number."""
    if dataclasses.is_dataclass(value):
        assert not isinstance(value, type)
        return dataclasses.asdict(value)
    return float(value)


class MetricsWriter:
    """Writes `WORKDIR/metrics.jsonl` and TensorBoard events, one row per call, in process 0 only.

    Rows after the checkpoint that a run resumes from are dropped, so that a resumed run leaves the
    same file as an uninterrupted one, except for `speed/...`. If the rows before it are not those
    that were written, the file is renamed, and the new one starts with the rows that can be read.
    """

    def __init__(self, workdir: Path, last_step: int, written: Mapping[str, Any] | None = None):
        """Args:
        workdir: of the run.
        last_step: the step a run resumes from.
        written: `written` of the writer at that step; None where it is not known.
        """
        self._writes = is_main()
        if not self._writes:
            return
        path = workdir / "metrics.jsonl"
        lines = _kept_lines(path, last_step, written)
        self._rows, self._checksum = len(lines), zlib.crc32(b"".join(lines))
        files.write_bytes(path, lines)
        self._path, self._file = path, path.open("ab")
        self._events = EventFile(workdir / "events", purge_step=last_step + 1)

    @property
    def written(self) -> dict[str, Any]:
        """The number of rows in the file and their checksum; empty in processes other than 0."""
        return {"rows": self._rows, "checksum": self._checksum} if self._writes else {}

    def write(self, step: int, values: dict) -> None:
        """Writes one row; values become floats."""
        if not self._writes:
            return
        row = {name: float(np.asarray(value)) for name, value in values.items()}
        line = (json.dumps({"step": step, **row}) + "\n").encode()
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise files.cannot_write(self._path, error) from None
        self._rows, self._checksum = self._rows + 1, zlib.crc32(line, self._checksum)
        for name, value in row.items():
            self._events.write(step, name, value)

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._writes:
            try:
                self._file.close()
            except OSError as error:
                raise files.cannot_write(self._path, error) from None
            finally:
                self._events.close()


def _kept_lines(path: Path, last_step: int, written: Mapping[str, Any] | None) -> list[bytes]:
    """Returns the lines of a metrics.jsonl up to the checkpoint that a run resumes from."""
    try:
        rows, damage = _read_rows(path)
    except UserError as error:  # too large, or not a regular file
        rows, damage = [], [str(error)]
    if written:
        lines = [line for _, line in rows][: written["rows"]]
        if len(lines) == written["rows"] and zlib.crc32(b"".join(lines)) == written["checksum"]:
            return lines
        if not damage:
            damage = [f"{path}: its rows to step {last_step} are not those that were written"]
    lines = [line for row, line in rows if row["step"] <= last_step]
    if damage:
        print(damage[0], flush=True)
        aside = path.with_name(f"metrics_damaged_{last_step}.jsonl")
        if path.exists():
            path.rename(aside)
        print(f"{path}: kept as {aside.name}; going on with {len(lines)} rows of it", flush=True)
    return lines


def progress(total: int | None, initial: int, unit: str, label: str) -> tqdm:
    """Returns a progress bar with rate and ETA on stderr, shown in process 0 only."""
    return progress_bar(total=total, initial=initial, unit=unit, desc=label, disable=not is_main())
