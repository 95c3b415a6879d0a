"""Topologies of the command line, and the descriptions of GPUs for their compiler."""

import importlib.util
import re

import jax
import pytest

from geode_jax.cli.command import main
from geode_jax.errors import UserError
from geode_jax.measure.chips import CHIPS
from geode_jax.plan.topology import TARGETS, devices_of, parse_topology


def test_every_gpu_has_a_target_with_its_memory_and_bandwidth():
    for chip in CHIPS.values():
        if chip.platform == "cuda":
            text = (TARGETS / f"{chip.name}.txtpb").read_text()
            assert f"device_memory_size: {chip.hbm_bytes}\n" in text
            assert f"memory_bandwidth: {chip.hbm_bandwidth}\n" in text
            assert f'"{chip.device_kinds[0]}"' in text


def test_topologies():
    slice_, nodes = parse_topology("v5p:4x4x4"), parse_topology("h100:2x8")
    assert (slice_.chip.name, slice_.size, slice_.shape) == ("v5p", 64, (4, 4, 4))
    assert (nodes.chip.name, nodes.size, nodes.shape) == ("h100", 16, (2, 8))
    assert parse_topology("a100:1x8").chip.name == "a100-80"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tpu:4x4", "tpu: no such chip; there are v4, v5e"),
        ("v5e", "no shape"),
        ("v5e:4x", "no shape"),
        ("v5e:0x4", "no shape"),
        ("v5e:" + "9" * 5000, "no shape"),
        ("v5p:4x4", "3 axes"),
        ("h100:8", "nodes x GPUs"),
        ("h100:1x16", "a node has at most 8"),
        ("v6e:32x32", "a pod has at most 256"),
    ],
)
def test_topologies_that_there_are_not(text, said):
    with pytest.raises(UserError, match=said):
        parse_topology(text)


@pytest.mark.parametrize(
    ("topology", "remedy"),
    [
        ("v5e:2x2", "libtpu: pip install -e '.[plan]' in the checkout"),
        ("h100:1x1", f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"),
    ],
)
def test_a_missing_compiler_is_one_line_with_the_remedy(topology, remedy, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=re.escape(remedy) + "$"):
        devices_of(parse_topology(topology))
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", "configs/hidden_cot.py", "--topology", topology])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
