"""TensorBoard's files are read back by hand, and a full disk is one line."""

import struct
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from geode_jax.errors import UserError
from geode_jax.training.event_file import EventFile
from geode_jax.training.metrics import MetricsWriter
from tests.helpers.full_disk import full_disk


def events(folder: Path) -> list[event_pb2.Event]:
    (file,) = folder.glob("*.tfevents.*")
    data, found = file.read_bytes(), []
    while data:  # length, its checksum, the event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_scalars_come_back_with_what_they_replace(tmp_path):
    file = EventFile(tmp_path / "events", purge_step=5)
    file.write(5, "loss", 1.5)
    file.close()
    first, purged, scalar = events(tmp_path / "events")
    assert first.file_version == "brain.Event:2"
    assert purged.step == 5 and purged.session_log.status == event_pb2.SessionLog.START
    assert (scalar.step, scalar.summary.value[0].tag) == (5, "loss")
    assert scalar.summary.value[0].simple_value == 1.5


def test_a_full_disk_is_one_line_with_the_path(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    with full_disk(0):
        with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: File too large"):
            writer.write(1, {"loss": 1.0})
        with pytest.raises(UserError, match=r"events.*: cannot be written: File too large"):
            writer.close()
