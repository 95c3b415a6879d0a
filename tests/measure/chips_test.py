"""Chips are found by their device kind."""

import types

import jax

from geode_jax.measure.chips import CHIPS, chip_of


def test_chips_are_known_by_what_devices_call_themselves():
    for chip in CHIPS.values():
        for kind in chip.device_kinds:
            assert chip_of(types.SimpleNamespace(device_kind=kind)) is chip
    assert chip_of(jax.devices("cpu")[0]) is None
    assert chip_of(types.SimpleNamespace(device_kind="NVIDIA H100 PCIe")) is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
