"""Files of rows: a benchmark's questions, a model's predictions."""

import dataclasses
import hashlib
import reprlib
from collections.abc import Callable, Iterator
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
      rows: the rows under their ids as text, in order.
    """

    path: Path
    sha256: str
    rows: dict[str, dict]

    def named(self) -> dict[str, str]:
        """What a result file says of this file."""
        return {"file": str(self.path), "sha256": self.sha256}


def read_rows(path: Path, *checks: Callable[[dict, str], None]) -> RowFile:
    """Reads JSON lines, or parquet where the name ends so.

    Args:
      path: of the file.
      checks: each gets a row and where it stands, and raises what is wrong with it.

    Raises:
      UserError: `FILE:LINE: field: rule` (parquet: `FILE: row N`, from 0), or there is no row.
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
    """Where each row stands, and the row."""
    if path.suffix == ".parquet":
        for number, row in enumerate(_parquet_rows(path, data)):
            yield f"{path}: row {number}", row
        return
    for number, row in files.json_lines(path):
        if isinstance(row, UserError):
            raise row
        yield f"{path}:{number}", row


MAX_UNPACKED_BYTES = 1 << 28
"""Most bytes that the rows of a parquet file may have: some 300 KB can say billions."""


def _parquet_rows(path: Path, data: bytes) -> Iterator[dict]:
    import pyarrow.parquet  # takes a while, and most files are JSON lines

    too_large = UserError(f"{path}: unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        values = sum(g.column(i).num_values for g in groups for i in range(g.num_columns))
        bytes_said = sum(group.total_byte_size for group in groups)
        if max(bytes_said, 8 * values) > MAX_UNPACKED_BYTES:
            raise too_large
        unpacked = 0
        for batch in file.iter_batches(batch_size=16):
            for row in batch.to_pylist():
                # What a file says of its size counts a value once that all rows share.
                unpacked += _weight(row)
                if unpacked > MAX_UNPACKED_BYTES:
                    raise too_large
                yield row
    except UserError:
        raise
    # ValueError: texts that are not UTF-8, dates that there are not.
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:
        raise UserError(f"{path}: not parquet: {error}") from None


def _weight(value: Any) -> int:
    """About the bytes of a row."""
    if isinstance(value, str | bytes):
        return 8 + len(value)
    if isinstance(value, dict):
        return sum(map(_weight, value.values()))
    return 8 + (sum(map(_weight, value)) if isinstance(value, list) else 0)


def require(good: bool, row: dict, field: str, rule: str, where: str) -> None:
    if not good:
        found = f"is {reprlib.repr(row[field])}" if field in row else "is missing"
        raise UserError(f"{where}: {field}: must be {rule}, {found}")


def check_prediction(row: dict, where: str) -> None:
    """Checks the field that a model gives.

    Raises:
      UserError: `where: field: rule`.
    """
    require(isinstance(row.get("prediction"), str), row, "prediction", "a string", where)


def of_no_question(asked: RowFile, said: dict[str, RowFile]) -> list[str]:
    """A line for every file that has answers to no question of `asked`."""
    others = {file.path: len(file.rows.keys() - asked.rows.keys()) for file in said.values()}
    return [
        f"{path}: {count} predictions are of no question of {asked.path}"
        for path, count in others.items()
        if count
    ]
