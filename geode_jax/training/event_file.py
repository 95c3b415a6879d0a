"""TensorBoard's event files, written by whoever logs.

tensorboardX's own writer has a thread: where the disk is full that dies with a traceback, and who
logs on waits for it for ever.
"""

import os
import socket
import time
from pathlib import Path

from geode_jax.exports import files

FLUSH_SECONDS = 30
"""So old may a scalar get before it reaches the file."""


class EventFile:
    """A new event file of scalars.

    Raises:
        UserError: the file cannot be written, in any method.
    """

    def __init__(self, folder: Path, purge_step: int):
        """Args:
        folder: of the run's event files.
        purge_step: from here on, what earlier files say does not count.
        """
        from tensorboardX.proto import event_pb2  # loads torch wherever torch is installed
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._scalar = event_pb2.Event, scalar
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(str(self._path))
        except OSError as error:
            raise files.cannot_write(self._path, error) from None
        self._flushed = time.monotonic()
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=start)

    def write(self, step: int, name: str, value: float) -> None:
        """A scalar."""
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
        """Writes what is left."""
        try:
            self._records.close()
        except OSError as error:
            raise files.cannot_write(self._path, error) from None
