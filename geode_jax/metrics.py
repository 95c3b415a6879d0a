"""Metrics of a run: JSON lines, TensorBoard events, result files, and the progress bar."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from geode_jax.distributed import is_main
from geode_jax.event_file import EventFile
from geode_jax.exports import files


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl; a half-written last line (a killed run) is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file at once or not at all, process 0's; arrays of one number become floats."""
    if not is_main():
        return
    files.write_json(path, value, default=_plain)


def _plain(value):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return float(value)


class MetricsWriter:
    """Writes `WORKDIR/metrics.jsonl` and TensorBoard events, one row a call; process 0's alone.

    Rows past `last_step`, the step a run resumes from, are what a killed run did after its last
    checkpoint; they are dropped, so that a resumed run leaves the same file as an unbroken one, but
    for `speed/...`.
    """

    def __init__(self, workdir: Path, last_step: int):
        self._writes = is_main()
        if not self._writes:
            return
        path = workdir / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row["step"] <= last_step]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._path, self._file = path, path.open("a")
        self._events = EventFile(workdir / "events", purge_step=last_step + 1)

    def write(self, step: int, values: dict) -> None:
        """One row; values become floats."""
        if not self._writes:
            return
        row = {name: float(np.asarray(value)) for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        except OSError as error:
            raise files.cannot_write(self._path, error) from None
        for name, value in row.items():
            self._events.write(step, name, value)

    def close(self) -> None:
        """Flush both files."""
        if self._writes:
            try:
                self._file.close()
            except OSError as error:
                raise files.cannot_write(self._path, error) from None
            finally:
                self._events.close()


def progress(total: int, initial: int, unit: str, label: str) -> tqdm:
    """A bar with rate and ETA on stderr, of process 0."""
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=label,
        file=sys.stderr,
        dynamic_ncols=True,
        disable=not is_main(),
    )
