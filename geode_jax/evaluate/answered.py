"""The finished batches of an evaluation, kept so that an interrupted one goes on.

    {"of": ...}                                     what was evaluated: model, questions, settings
    {"batch": 0, "predictions": [...], "scenes": [...]}     a line a batch

Every line has a checksum. Whatever is not the next batch of the same evaluation is evaluated again.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.runtime.distributed import is_main
from geode_jax.sealed import seal, unseal
from geode_jax.training.metrics import plain_value


class Answered:
    """A file of finished batches; a context manager.

    Attributes:
        before: those that an earlier, interrupted evaluation finished.
    """

    def __init__(self, path: Path | None, of: str | None):
        """Args:
        path: of the file; None: nothing is kept.
        of: what is evaluated; batches of anything else are dropped.
        """
        self._path, self._of, self._file, self._next = path, of, None, 0
        self.before: list[dict[str, Any]] = [] if path is None else _read(path, of)
        if path is not None and jax.process_count() > 1:
            counts = multihost_utils.process_allgather(np.array(len(self.before)))
            self.before = self.before[: int(counts.min())]

    def __enter__(self):
        if self._path is not None and is_main():
            numbered = [batch | {"batch": i} for i, batch in enumerate(self.before)]
            lines = [_line({"of": self._of}), *map(_line, numbered)]
            self._next = len(numbered)
            files.write_bytes(self._path, lines)
            self._file = self._path.open("ab")
        return self

    def __exit__(self, *_):
        if self._file is not None:
            self._file.close()

    def keep(self, batch: dict[str, Any]) -> None:
        """Adds a finished batch."""
        if self._file is not None:
            try:
                self._file.write(_line(batch | {"batch": self._next}))
                self._file.flush()
            except OSError as error:
                raise files.cannot_write(self._path, error) from None
            self._next += 1


def _line(value: dict[str, Any]) -> bytes:
    plain = json.loads(json.dumps(value, default=plain_value))
    return (json.dumps(seal(plain)) + "\n").encode()


def _read(path: Path, of: str | None) -> list[dict[str, Any]]:
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
    return found[1:] if found and found[0] == {"of": of} else []
