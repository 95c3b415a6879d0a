"""TensorBoard's event files, written in the calling thread.

tensorboardX's own writer has a thread. On a full disk that thread ends with a traceback, and the
next write waits for it for ever.
"""

import os
import socket
import time
from pathlib import Path

from geode_jax.exports import files

FLUSH_SECONDS = 30
"""Longest time between a write and its flush to the file."""


class EventFile:
    """A new event file of scalars.

    Raises:
        UserError: the file cannot be written, in any method.
    """

    def __init__(self, folder: Path, purge_step: int):
        """Args:
        folder: of the run's event files.
        purge_step: TensorBoard drops the scalars of earlier files from this step on.
        """
        # Here, because tensorboardX imports torch where torch is installed.
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        # protobuf makes the classes of `event_pb2` at import.
        self._event = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        log = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        self._scalar = scalar
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(str(self._path))
        except OSError as error:
            raise files.cannot_write(self._path, error) from None
        self._flushed = time.monotonic()
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=log(status=log.START))

    def write(self, step: int, name: str, value: float) -> None:
        """Writes one scalar."""
        self._write(step=step, summary=self._scalar(name, value))

    def _write(self, **content) -> None:
        event = self._event(wall_time=time.time(), **content)
        now = time.monotonic()
        try:
            self._records.write(event.SerializeToString())
            if now - self._flushed > FLUSH_SECONDS:
                self._flushed = now
                self._records.flush()
        except OSError as error:
            raise files.cannot_write(self._path, error) from None

    def close(self) -> None:
        """Flushes and closes the file."""
        try:
            self._records.close()
        except OSError as error:
            raise files.cannot_write(self._path, error) from None
