"""Reading files of rows: the questions of a benchmark, the predictions of a model."""

import dataclasses
import hashlib
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from geode_jax.errors import UserError
from geode_jax.exports import files


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A checked file of rows, or of ids of rows.

    Attributes:
      path: of the file.
      sha256: of its bytes.
      rows: id as text -> row, in order.
    """

    path: Path
    sha256: str
    rows: dict[str, dict]

    def source(self) -> dict[str, str]:
        """Returns the name and checksum of this file, for a result file."""
        return {"file": str(self.path), "sha256": self.sha256}


def read_rows(path: Path, *checks: Callable[[dict, str], None]) -> RowFile:
    """Reads JSON lines, or parquet where the name ends so.

    Args:
      path: of the file.
      checks: each is called with a row and its place, and raises UserError for a bad row.

    Raises:
      UserError: `FILE:LINE: field: rule` (parquet: `FILE: row N`, from 0), or there are no rows.
    """
    data = files.read_bytes(path)
    rows = {}
    for where, row in _parsed(path, data):
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be a JSON object")
        key = row.get("id")
        require(type(key) in (int, str), row, "id", "a whole number or a string", where)
        if str(key) in rows:
            raise UserError(f"{where}: id: duplicate {key!r}")
        for check in checks:
            check(row, where)
        rows[str(key)] = row
    if not rows:
        raise UserError(f"{path}: has no rows")
    return RowFile(path, hashlib.sha256(data).hexdigest(), rows)


def _parsed(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    """Yields the place of each row in the file, and the row."""
    if path.suffix == ".parquet":
        for number, row in enumerate(_parquet_rows(path, data)):
            yield f"{path}: row {number}", row
        return
    for number, row in files.json_lines(path):
        if isinstance(row, UserError):
            raise row
        yield f"{path}:{number}", row


MAX_UNPACKED_BYTES = 1 << 28
"""Most bytes of the rows of a parquet file: 300 KB of compressed data can become billions."""


def _parquet_rows(path: Path, data: bytes) -> Iterator[dict]:
    import pyarrow.parquet  # a slow import, and most files are JSON lines

    too_large = UserError(f"{path}: unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        values = sum(g.column(i).num_values for g in groups for i in range(g.num_columns))
        declared_bytes = sum(group.total_byte_size for group in groups)
        if max(declared_bytes, 8 * values) > MAX_UNPACKED_BYTES:
            raise too_large
        unpacked = 0
        for batch in file.iter_batches(batch_size=16):
            for row in batch.to_pylist():
                # The declared size counts a value that all rows share only once.
                unpacked += _weight(row)
                if unpacked > MAX_UNPACKED_BYTES:
                    raise too_large
                yield row
    except UserError:
        raise
    # ValueError: texts that are not UTF-8, impossible dates.
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
        raise UserError(f"{path}: not parquet: {error}") from None


def _weight(value: Any) -> int:
    """Returns the approximate number of bytes of a row."""
    if isinstance(value, str | bytes):
        return 8 + len(value)
    if isinstance(value, dict):
        return sum(map(_weight, value.values()))
    return 8 + (sum(map(_weight, value)) if isinstance(value, list) else 0)


def require(good: bool, row: dict, field: str, rule: str, where: str) -> None:
    """Raises the UserError `where: field: must be rule, is ...` unless `good`."""
    if not good:
        found = f"is {reprlib.repr(row[field])}" if field in row else "is missing"
        raise UserError(f"{where}: {field}: must be {rule}, {found}")


def check_prediction(row: dict, where: str) -> None:
    """Checks the field that comes from a model.

    Raises:
      UserError: `where: field: rule`.
    """
    require(isinstance(row.get("prediction"), str), row, "prediction", "a string", where)


def unmatched_notes(questions: RowFile, predictions: Iterable[RowFile]) -> list[str]:
    """Returns a note for every file with predictions that belong to none of the questions."""
    others = {file.path: len(file.rows.keys() - questions.rows.keys()) for file in predictions}
    return [
        f"{path}: {count} predictions belong to no question of {questions.path}"
        for path, count in others.items()
        if count
    ]
