"""Attention by tiles on eight devices is attention on one."""

import json

import pytest

from tests.helpers.own_process import output_of


@pytest.mark.slow
def test_rows_and_heads_on_eight_devices():
    found = json.loads(output_of("tests.ops.attention_mesh_run", devices=8))
    assert len(found) == 10
    for name, of in found.items():
        assert of["difference"] < 1e-5, name
        if name.startswith("2x2x2"):  # every device has its own part, and no word for the others
            assert of["spread"] == 8 and of["collectives"] == [], name
