"""What every benchmark shares: alternate timing, rows, the table, and what machine it was.

A row says how many times better ours is than what a user would pick instead, measured in one run,
turn by turn, so that both share the machine's moods:

    name, unit, dtype, shape    what was measured; a unit that starts with s is a time, MB memory
    ours, theirs                medians of the rounds
    ratio                       median over the rounds of theirs / ours, for rates of ours / theirs:
                                above 1 ours is better
    ratio_least, ratio_most     over the rounds
"""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
PACKAGES = ("jax", "flax", "torch", "transformers", "numpy")


def threads() -> int:
    """Cores that this process may use; both sides are given so many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


REST = 0.05
"""Seconds before each turn: threads of the other side wait a while for more work, busily."""


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, which awaits its result."""
    time.sleep(REST)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Apart:
    """PyTorch's side in a process of its own, where it runs as its users have it.

    Within our process it would have the memory setting that ours comes with
    (`keep_freed_memory`), which makes it faster; `keep_memory` gives it that.
    """

    def __init__(self, make: Callable[..., Any], *args: Any, keep_memory: bool = False):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        told = (other, keep_memory, make, args)
        self._process = context.Process(target=_serve, args=told, daemon=True)
        self._process.start()
        self._pipe.recv()

    def call(self, method: str, *args: Any) -> None:
        """Returns when the method of what `make` made is done."""
        self.get(method, *args, wanted=False)

    def get(self, method: str, *args: Any, wanted: bool = True) -> Any:
        """The method's result.

        Raises:
            RuntimeError: it failed there.
        """
        self._pipe.send((method, args, wanted))
        result, error = self._pipe.recv()
        if error is not None:
            raise RuntimeError(f"{method} in the other process: {error}")
        return result

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self._process.join()


def _serve(pipe, keep_memory: bool, make: Callable[..., Any], args: tuple) -> None:
    import torch

    from geode_jax.runtime.process import keep_freed_memory

    if keep_memory:
        keep_freed_memory()
    torch.set_num_threads(threads())
    made = make(*args)
    pipe.send(None)
    while (told := pipe.recv()) is not None:
        method, args, wanted = told
        try:
            result, error = getattr(made, method)(*args), None
        except Exception as found:  # of whatever library: told to who asked
            result, error = None, f"{type(found).__name__}: {' '.join(str(found).split())[:300]}"
        pipe.send((result if wanted else None, error))


def alternate(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, warm_up: int = 2
) -> tuple[list[float], list[float]]:
    """Seconds of both, turn by turn, after calls that are not counted."""
    for _ in range(warm_up):
        ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return tuple(map(list, zip(*pairs, strict=True)))


def row(
    name: str,
    ours: list[float],
    theirs: list[float],
    *,
    unit: str,
    dtype: str,
    shape: list[int],
    digits: int = 4,
    more_is_better: bool = False,
) -> dict[str, Any]:
    """A row of the ledger, see the module's docstring."""
    pairs = zip(ours, theirs, strict=True)
    ratios = [a / b if more_is_better else b / a for a, b in pairs]
    return {
        "name": name,
        "ours": float(f"{statistics.median(ours):.{digits}g}"),
        "theirs": float(f"{statistics.median(theirs):.{digits}g}"),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_least": round(min(ratios), 2),
        "ratio_most": round(max(ratios), 2),
        "unit": unit,
        "dtype": dtype,
        "shape": shape,
        "rounds": len(ratios),
    }


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    models = (
        [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": models[0] if models else platform.processor(),
        "threads": threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def write(name: str, rows: list[dict[str, Any]], notes: list[str] | None = None) -> None:
    """Writes `benchmarks/results/NAME.json` and prints the table."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = {
        "command": f"python -m benchmarks.{name}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "rows": rows,
        "notes": notes or [],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(rows)))
    print("\n".join(f"note: {note}" for note in result["notes"]))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| | ours | theirs | unit | times better | least to most |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        spread = f"{r['ratio_least']:.2f} to {r['ratio_most']:.2f}"
        what = f"{r['name']} ({r['dtype']}, {' x '.join(map(str, r['shape']))})"
        lines.append(
            f"| {what} | {r['ours']:g} | {r['theirs']:g} | {r['unit']} "
            f"| **{r['ratio']:.2f}** | {spread} |"
        )
    return lines
