"""Measures how well a run uses its devices: step time, tokens, FLOPs, input wait, compiling."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from geode_jax.measure.chips import Device, chip_of
from geode_jax.measure.cost import peak_memory
from geode_jax.runtime.distributed import is_main
from geode_jax.shapes import Batch

_COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event for each program that it compiles or takes from its cache."""

PROFILED_STEPS = 5
PROFILE_AFTER = 5
"""Number of first steps that `--profile` skips, because they compile and fill the queues."""


class Meter:
    """Measures the steps of a loop, from the wait for a batch to the metrics of the previous step.

    Evaluations and checkpoints between steps are not measured, nor is the first step, which
    compiles.
    """

    def __init__(self, flops: int, devices: Sequence[Device], share: float):
        """Starts to count compilations.

        Args:
            flops: model FLOPs of a step on all devices; 0: not known.
            devices: devices of the mesh.
            share: fraction of the batch that this process reads.
        """
        chip = chip_of(devices[0])
        self._roof = len(devices) * chip.flops if chip else 0.0
        self._flops, self._share = flops, share
        self._rows: list[dict[str, float]] = []
        self._steps = self._compilations = 0
        self._began = self._waited = 0.0
        self._tokens = 0
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        self._compilations += event == _COMPILED

    def close(self) -> None:
        """Stops counting compilations."""
        jax.monitoring.unregister_event_duration_listener(self._note)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context of the wait for a batch, with which a step begins."""
        self._began = time.monotonic()
        yield
        self._waited = time.monotonic() - self._began

    @contextlib.contextmanager
    def computing(self, batch: Batch) -> Iterator[None]:
        """Context of the step on a host batch, until the metrics of the previous step arrive.

        A step after the second that compiles prints a warning, since one of its shapes changes.
        """
        before = self._compilations
        answered = batch.answer_length_SQ > 0
        tokens = np.sum((batch.question_length_SQ + batch.answer_length_SQ) * answered)
        # Share of occupied columns: the segment of a padding column starts behind the column.
        columns = np.arange(batch.packed_start_SWT.shape[-1])
        occupancy = float(np.mean(batch.packed_start_SWT <= columns))
        yield
        seconds = time.monotonic() - self._began
        self._steps += 1
        if self._steps == 1:
            return
        if self._compilations > before and self._steps > 2:
            print(f"warning: step {self._steps} of this start was compiled again", flush=True)
        row = {
            "speed/step_seconds": seconds,
            "speed/input_wait": self._waited / seconds,
            "speed/tokens_per_second": float(tokens) / self._share / seconds,
            "speed/occupancy": occupancy,
        }
        if self._roof and self._flops:
            row["speed/mfu"] = self._flops / (seconds * self._roof)
        if (memory := peak_memory().get("peak_device_memory_bytes")) is not None:
            row["speed/device_memory_bytes"] = memory
        self._rows.append(row)

    @property
    def last(self) -> dict[str, float]:
        """Metrics `speed/...` of the last step; empty before the second step."""
        return self._rows[-1] if self._rows else {}

    def summary(self) -> dict[str, float]:
        """Returns medians over the steps of this start, and the number of compilations."""
        names = self._rows[0] if self._rows else {}
        out = {n.partition("/")[2]: float(np.median([r[n] for r in self._rows])) for n in names}
        return out | {"compilations": self._compilations}


class Profile:
    """Traces a few steps for TensorBoard or Perfetto, in WORKDIR/profile."""

    def __init__(self, workdir: Path, wanted: bool, first: int):
        """Plans the trace.

        Args:
            workdir: folder of the run.
            wanted: False: do not trace.
            first: step at which the loop starts.
        """
        self._folder, self._first = workdir / "profile", first + PROFILE_AFTER
        self._wanted, self._running = wanted and is_main(), False

    def at(self, step: int) -> None:
        """Starts or ends the trace; to be called before every step."""
        if self._wanted and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step == self._first + PROFILED_STEPS:
            self.close()

    def close(self) -> None:
        """Ends the trace, if there is one, and prints its folder."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = self._wanted = False
            print(f"profile: {self._folder}", flush=True)
        elif self._wanted:
            self._wanted = False
            print(f"profile: none, it begins after {PROFILE_AFTER} steps", flush=True)
