"""The ledger's arithmetic; the script for GPUs runs, and compiles for one that is not there."""

import collections
import importlib.util
import json

import pytest

pytest.importorskip("torch", reason="PyTorch, which benchmarks compare with, is absent")

from benchmarks import __main__ as bench
from benchmarks import ledger
from tests.helpers.own_process import output_of

FACTS = {"dtype": "float32", "shape": [1, 2]}


def test_a_row_has_the_median_of_the_rounds_ratios():
    row = ledger.row("x", [1.0, 2.0, 4.0], [4.0, 4.0, 4.0], unit="s", **FACTS)
    assert (row["ours"], row["theirs"], row["rounds"]) == (2, 4, 3)
    assert (row["ratio"], row["ratio_least"], row["ratio_most"]) == (2, 1, 4)
    rate = ledger.row("x", [1.0, 2.0], [4.0, 4.0], unit="tokens/s", more_is_better=True, **FACTS)
    assert (rate["ratio_least"], rate["ratio_most"]) == (0.25, 0.5)


def test_calls_take_turns():
    calls = []
    times = ledger.alternate(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert calls == ["a", "b"] * 5  # the first pairs warm up
    assert [len(side) for side in times] == [3, 3]


def test_the_other_side_runs_in_a_process_of_its_own():
    theirs = ledger.OtherProcess(collections.Counter, "aab")
    assert theirs.get("most_common", 1) == [("a", 2)]
    theirs.call("update", "bb")
    assert theirs.get("total") == 5
    with pytest.raises(RuntimeError, match="lost in the other process: AttributeError"):
        theirs.call("lost")
    theirs.close()
    assert not theirs.running


def test_results_become_the_document(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    ledger.write("mamba", [ledger.row("x", [1.0], [0.5], unit="s", **FACTS)], ["one thing"])
    text = bench.document()
    assert "| x (float32, 1 x 2) | 1 | 0.5 | s | **0.50** | 0.50 to 0.50 |" in text
    assert "## Mamba" in text and "One thing." in text and "## Not measured" in text
    ledger.write("gpu", json.loads((tmp_path / "mamba.json").read_text())["rows"])
    assert "## Gpu" in bench.document() and "Not measured" not in bench.document()


@pytest.mark.slow
def test_the_script_for_gpus_runs_at_toy_sizes():
    lines = output_of("benchmarks.gpu", "--small", "--rounds", "1").splitlines()
    rows = ("A1", "A2", "A3", "A4", "M1", "C1", "T1", "D1", "D2", "D3", "L1")
    assert [line[2:4] for line in lines] == list(rows)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="no compiler for GPUs"
)
def test_the_script_for_gpus_compiles_for_one_that_is_not_there():
    rows = ("A1", "A2", "A3", "A4", "M1", "D3", "C1", "D1")  # T1 and L1 take minutes
    told = ("--compile", "h100:1x1", "--rows", *rows)
    lines = output_of("benchmarks.gpu", *told, JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1").splitlines()
    assert [line[:2] for line in lines] == list(rows)
    kernels = [int(line.split("compiled, ")[1].split()[0]) for line in lines]
    assert kernels[:6] == [1, 1, 1, 3, 2, 1]
