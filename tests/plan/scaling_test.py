"""The tables of planned runs in the documentation are written from kept plans."""

import json

import pytest

from benchmarks import scaling
from geode_jax.errors import UserError


def test_the_documents_tables_come_from_kept_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = scaling.weak(scaling.STUDENT, "v5e:4x4")
    assert (row.scenes, row.mesh) == (64, (1, -1, 1))
    assert scaling.weak(scaling.STUDENT, "h100:2x8").mesh == (2, -1, 1)
    assert scaling.line(row).startswith("| v5e:4x4 | | 64 | not planned yet |")
    facts = {
        "devices": 16,
        "mesh": {"data": 1, "fsdp": 16, "model": 1},
        "scenes_per_batch": 64,
        "fits": True,
        "hbm_peak_bytes": 9 * 10**9,
        "hbm_bytes": 16 * 2**30,
        "bound": "compute",
        "seconds": {"compute": 0.25, "memory": 0.01, "network": 0.2},
        "mfu_ceiling": 0.8,
        "tokens_per_second": 262144.0,
        "chip_hours": 1.5,
        "step_seconds": 0.25,
        "scenes_per_second": 256.0,
        "collective_bytes": {"fsdp": {"all-gather": 7 * 10**9, "all-to-all": 10}},
    }
    scaling.CACHE.mkdir(parents=True)
    row.file.write_text(json.dumps(facts))
    assert "| fsdp 16 | 64 | yes | 9.0 of 17 GB | 250 ms |" in scaling.line(row)
    other = scaling.weak(scaling.GEODE, "v5e:4x4")
    other.file.write_text(json.dumps({"failed": "INTERNAL: no"}))
    assert "failed to compile" in scaling.line(other)
    assert scaling.result(other) is None
    names = scaling.sections()
    document = tmp_path / "SCALING.md"
    document.write_text("".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in names))
    scaling.write(document)
    text = document.read_text()
    assert "old" not in text
    assert "all-gather along fsdp 7.00 GB |" in text
    assert text.count("Not planned: ") == 1
    document.write_text("no markers")
    with pytest.raises(UserError, match="no marker"):
        scaling.write(document)


def test_every_marker_is_in_the_document():
    text = (scaling.DOCUMENT).read_text()
    for name in scaling.sections():
        assert f"<!-- {name} -->" in text
