"""Shared parts of the benchmarks: alternating timing, rows, tables, facts about the machine.

A row compares this package ("ours") with the alternative that a user would pick ("theirs"). Both
are measured in one run and in alternation, so that noise of the machine affects both:

    name, unit, dtype, shape    the measured quantity; s is a time, MB memory, others are rates
    ours, theirs                medians of the rounds
    ratio                       median over the rounds of theirs / ours, for rates of ours / theirs:
                                above 1, ours is better
    ratio_least, ratio_most     extremes over the rounds
"""

import argparse
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
    """Returns the number of cores of this process, which is the number of threads of both sides."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Returns the command line of a benchmark with a docstring and a default of `--rounds`."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--rounds", type=int, default=rounds, help=f"timed calls ({rounds})")
    return made


PAUSE_SECONDS = 0.05
"""Pause before each call, in which idle threads of the other side stop to spin for work."""


def seconds(call: Callable[[], Any]) -> float:
    """Returns the duration of a call that waits for its result."""
    time.sleep(PAUSE_SECONDS)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class OtherProcess:
    """Runs PyTorch's side in a process of its own, with the settings that its users have.

    In this process it would get this package's memory setting (`keep_freed_memory`), which makes it
    faster; `keep_memory` sets it there, too.
    """

    def __init__(self, make: Callable[..., Any], *args: Any, keep_memory: bool = False):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        given = (other, keep_memory, make, args)
        self._process = context.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        self._pipe.recv()

    def call(self, method: str, *args: Any) -> None:
        """Calls a method of the object that `make` returned, and drops the result."""
        self.get(method, *args, send_result=False)

    def get(self, method: str, *args: Any, send_result: bool = True) -> Any:
        """Calls a method of the object that `make` returned; returns the result.

        Raises:
            RuntimeError: the method raised an error.
        """
        self._pipe.send((method, args, send_result))
        result, error = self._pipe.recv()
        if error is not None:
            raise RuntimeError(f"{method} in the other process: {error}")
        return result

    def close(self) -> None:
        """Ends the process, and waits until it has ended."""
        self._pipe.send(None)
        self._process.join()

    @property
    def running(self) -> bool:
        """True until the process has ended."""
        return self._process.is_alive()


def _serve(pipe, keep_memory: bool, make: Callable[..., Any], args: tuple) -> None:
    import torch

    from geode_jax.runtime.process import keep_freed_memory

    if keep_memory:
        keep_freed_memory()
    torch.set_num_threads(threads())
    made = make(*args)
    pipe.send(None)
    while (request := pipe.recv()) is not None:
        method, args, send_result = request
        try:
            result, error = getattr(made, method)(*args), None
        except Exception as found:  # any library's; the caller raises it again
            result, error = None, f"{type(found).__name__}: {' '.join(str(found).split())[:300]}"
        pipe.send((result if send_result else None, error))


def alternate(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, warm_up: int = 2
) -> tuple[list[float], list[float]]:
    """Returns the seconds of both, called in alternation after `warm_up` calls of each."""
    for _ in range(warm_up):
        ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return [a for a, _ in pairs], [b for _, b in pairs]


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
    """Returns a row, which the docstring of the module describes."""
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
    """Returns processor, threads and versions."""
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
    """Returns the lines of a Markdown table."""
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
