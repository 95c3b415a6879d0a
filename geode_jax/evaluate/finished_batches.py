"""The finished batches of an evaluation in a file, so that an interrupted evaluation continues.

    {"of": ...}                                     checksum of model, questions and settings
    {"batch": 0, "predictions": [...], "scenes": [...]}     one line per batch

Every line has a checksum. Reading ends at the first line that is damaged or out of order; the
batches from there on, or all batches of another evaluation, are evaluated again.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.runtime.distributed import is_main
from geode_jax.sealed import seal, unseal
from geode_jax.training.metrics import plain_value


class FinishedBatches:
    """A file of finished batches; a context manager.

    Attributes:
        earlier: the batches that an earlier, interrupted evaluation finished.
    """

    def __init__(self, path: Path | None, identity: str | None):
        """Reads the file where it exists.

        Args:
            path: of the file; None: no batch is stored.
            identity: checksum of what is evaluated; batches of another evaluation are dropped.
        """
        self._path, self._identity, self._next = path, identity, 0
        self._file: BinaryIO | None = None
        self.earlier: list[dict[str, Any]] = [] if path is None else _read(path, identity)
        if path is not None and jax.process_count() > 1:
            counts = multihost_utils.process_allgather(np.array(len(self.earlier)))
            self.earlier = self.earlier[: int(counts.min())]

    def __enter__(self):
        if self._path is not None and is_main():
            numbered = [batch | {"batch": i} for i, batch in enumerate(self.earlier)]
            lines = [_line({"of": self._identity}), *map(_line, numbered)]
            self._next = len(numbered)
            files.write_bytes(self._path, lines)
            self._file = self._path.open("ab")
        return self

    def __exit__(self, *_):
        if self._file is not None:
            self._file.close()

    def append(self, batch: dict[str, Any]) -> None:
        """Writes a finished batch at the end of the file.

        Raises:
            UserError: the file cannot be written.
        """
        if self._path is not None and self._file is not None:
            try:
                self._file.write(_line(batch | {"batch": self._next}))
                self._file.flush()
            except OSError as error:
                raise files.cannot_write(self._path, error) from None
            self._next += 1


def _line(value: dict[str, Any]) -> bytes:
    plain = json.loads(json.dumps(value, default=plain_value))
    return (json.dumps(seal(plain)) + "\n").encode()


def _read(path: Path, identity: str | None) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    try:
        for _, value in files.json_lines(path, nan=True):
            batch = unseal(value) if isinstance(value, dict) else None
            if batch is None or batch.pop("batch", -1) != len(found) - 1:
                break  # the line that was being written, or damage
            found.append(batch)
    except UserError as error:
        print(f"{error}; evaluated again", flush=True)
    return found[1:] if found and found[0] == {"of": identity} else []
