"""Training: build -> restore -> loop -> evaluate. The one visible loop."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import ml_collections

from geode_jax.errors import UserError
from geode_jax.measure.chips import chip_of
from geode_jax.measure.cost import peak_memory
from geode_jax.measure.flops import model_flops
from geode_jax.measure.meter import Meter, Profile
from geode_jax.measure.parameters import parameter_table
from geode_jax.results.systems import results_of
from geode_jax.runs.build import Run, build
from geode_jax.runs.config import load_settings, make_settings, save_settings
from geode_jax.runs.identity import made_with, refuse_another_run, same_run
from geode_jax.runs.settings import Settings
from geode_jax.runs.summary import SUMMARY, lost_files, read_summary
from geode_jax.runtime.distributed import Vote, is_main
from geode_jax.runtime.lock import LOCK, locked
from geode_jax.runtime.process import keep_compiled_programs, keep_freed_memory
from geode_jax.runtime.stop import Ballot, Stop, Stopped
from geode_jax.sharding import batch_sharding, rows_of_process, shard_batch
from geode_jax.training.checkpoint import Checkpoints
from geode_jax.training.checkpoint_files import has_model
from geode_jax.training.metrics import MetricsWriter, progress
from geode_jax.training.step import TrainState, make_train_step

SLOW_INPUT = 0.1
"""The progress bar shows the share of time spent waiting for data if it is above this."""


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: Path, *, profile: bool = False
) -> dict[str, Any]:
    """Trains to the end or to an early stop, evaluates the best checkpoint, writes the report.

    The same call on the same `workdir` resumes where the run stood: the data order is a pure
    function of the step, so the result is bitwise that of an uninterrupted run on the same machine.
    A run that has ended is left as it is.

    Args:
        config: of a file in `configs`.
        workdir: of the run.
        profile: whether a few steps leave a trace in `WORKDIR/profile`.

    Returns:
        The content of `WORKDIR/summary.json`.

    Raises:
        UserError, ExportError: one line for the user.
        SystemExit: stopped by SIGTERM or Ctrl-C, with all finished steps saved.
    """
    try:
        with Stop() as stop:
            return _run(make_settings(config), workdir, stop, profile)
    except Stopped as stopped:
        print(stopped.line, flush=True)
        raise


def _run(settings: Settings, workdir: Path, stop: Stop, profile: bool) -> dict[str, Any]:
    keep_compiled_programs()
    keep_freed_memory()
    results = results_of(settings)
    ended = find_ended(settings, workdir)
    if ended is not None:
        again = f"delete {workdir / SUMMARY} to evaluate the run again"
        print(f"the run has ended already; its scores are below; {again}", flush=True)
        results.show(ended, workdir)
        return ended
    lock = locked(workdir / LOCK, str(workdir), must=True)  # of all processes of the run
    with lock if is_main() else contextlib.nullcontext():
        refuse_another_run(settings, workdir)  # which may have begun meanwhile
        print(f"building: {workdir}", flush=True)
        run = build(settings, workdir)
        (workdir / SUMMARY).unlink(missing_ok=True)  # of other settings
        save_settings(settings, workdir)
        _describe(run)
        shown = dict(run.pipelines["train"].dropped)
        own = made_with(settings, run.tokenizer, run.export)
        with jax.set_mesh(run.mesh), Checkpoints(workdir, own) as checkpoints:
            state, position = run_loop(run, workdir, checkpoints, stop, profile)
            state, best = checkpoints.restore_best(state) or (state, position)
            _print_dropped(run.pipelines["train"].dropped, shown)  # found when scenes were read
            if best["best"]:
                print(f"best checkpoint: step {best['step']}", flush=True)
            else:
                print("best checkpoint: none, the last step is evaluated", flush=True)
            losses = best["best"] or run.evaluator.losses(
                state, run.pipelines["val"], settings.eval.val_scenes
            )
            train_facts = {
                "seconds": round(position["seconds"], 1),
                "steps": position["step"],
                "skipped_steps": position["skipped"],
                "best_step": best["step"],
                "dropped": dict(run.pipelines["train"].dropped),
                "speed": position.get("speed", {}),
                **peak_memory(),
            }
            with stop.deferred():
                summary = results.finish(
                    run, state, workdir, train_facts, losses, Ballot(stop, run.mesh).check
                )
        results.show(summary, workdir)
        return summary


def find_ended(settings: Settings, workdir: Path) -> dict[str, Any] | None:
    """Returns the summary of a run that has ended with exactly these settings; else None."""
    refuse_another_run(settings, workdir)
    if not (workdir / SUMMARY).exists() or not same_run(settings, workdir):
        return None
    summary = read_summary(workdir)
    if is_main() and load_settings(workdir).values != settings.values:
        save_settings(settings, workdir)  # its export has moved
    lost = lost_files(workdir, summary)
    if lost and has_model(workdir):
        print(f"{workdir}: evaluated again: {'; '.join(lost)}", flush=True)
        return None
    if not has_model(workdir):
        lost = [*lost, "it has no checkpoint: it cannot be asked, resumed or evaluated again"]
    if lost:
        print(f"{workdir}: {'; '.join(lost)}", flush=True)
    return summary


def run_loop(
    run: Run, workdir: Path, checkpoints: Checkpoints, stop: Stop, profile: bool
) -> tuple[TrainState, dict[str, Any]]:
    """Runs the loop, in this order: evaluate -> checkpoint -> next batch -> step -> log.

    Decisions that depend on a clock or a signal are voted on one step ahead, so that all processes
    carry them out at the same step.

    Returns:
        The last state, and its position.
    """
    train = run.settings.train
    scenes = run.settings.data.scenes_per_batch
    state = run.state
    position = {
        "step": 0,
        "evaluated": 0,  # the last step that was
        "seconds": 0.0,  # spent in this loop, over all resumptions
        "skipped": 0,
        "best": {},  # validation losses where the one that counts was lowest
        "worse": 0,  # evaluations since
        "stopped_early": False,
    }
    restored = checkpoints.restore(state)
    if restored is not None:
        state, position = restored
        # Checkpoints without the field were written after the evaluation of their step.
        position.setdefault("evaluated", position["step"])
        print(f"resuming at step {position['step']}", flush=True)
    first = position["step"]
    train_step = make_train_step(
        run.objective, run.graph, run.optimizer, run.state, train.microbatches
    )
    rows = rows_of_process(run.mesh, scenes)
    devices = list(run.mesh.devices.flat)
    flops = _step_flops(run) if chip_of(devices[0]) else 0
    batches = run.pipelines["train"].iterate(first, run.steps - first, rows)
    vote, every = Vote(run.mesh, 2), 60 * train.checkpoint_minutes
    ballot, compiled = Ballot(stop, run.mesh), False

    def save() -> None:
        log.flush()
        position["seconds"] = time.monotonic() - started
        position["metrics"] = log.written
        if position["step"] > first:
            position["speed"] = meter.summary()
        checkpoints.save(state, position)

    def leave() -> NoReturn:
        checkpoints.finish()
        stop.unsaved = False
        raise Stopped(stop.signum or signal.SIGTERM, f"at step {position['step']}, saved")

    started = time.monotonic() - position["seconds"]
    saved = time.monotonic()
    if first < run.steps:
        print("compiling the training step (once; later runs reuse it) ...", flush=True)
    with (
        contextlib.closing(Meter(flops, devices, (rows.stop - rows.start) / scenes)) as meter,
        contextlib.closing(Profile(workdir, profile, first)) as trace,
        _Log(run, workdir, position, meter) as log,
        stop.deferred(),
    ):
        while True:
            step = position["step"]
            if step > position["evaluated"] and (step % train.eval_every == 0 or step == run.steps):
                if not compiled:  # compiling takes minutes, in which nothing can be saved
                    compiled = True
                    log.pause()
                    save()
                    checkpoints.finish()
                    stop.unsaved = False
                try:
                    values = run.evaluator.losses(
                        state,
                        run.pipelines["val"],
                        run.settings.eval.val_scenes,
                        check=ballot.check,
                    )
                except Stopped:
                    save()
                    leave()
                log.flush()
                log.write(step, values)
                position["evaluated"], stop.unsaved = step, True
                if update_best(values, run.objective.selection_metric, position, train.patience):
                    checkpoints.save_best(state, position)
            done = step >= run.steps or position["stopped_early"]
            due = is_main() and 0 < every <= time.monotonic() - saved
            stopping, due = vote.cast(stop.signum != 0, due)
            due |= step % train.checkpoint_every == 0
            if step > first and (due or done or stopping):
                save()
                saved = time.monotonic()
            if done:
                checkpoints.finish()
                stop.unsaved = False
                return state, position
            if stopping:
                leave()
            trace.at(step)
            with meter.waiting():
                _, batch = next(batches)
            with meter.computing(batch):
                state, metrics = train_step(state, shard_batch(batch, run.mesh, scenes))
                position["step"], stop.unsaved = step + 1, True
                log.step(step + 1, metrics)


def _step_flops(run: Run) -> int:
    """Returns the model FLOPs of a step of this run."""
    scene = run.pipelines["train"].batch(0, slice(0, 1))
    scenes = run.settings.data.scenes_per_batch
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((scenes, *x.shape[1:]), x.dtype), scene)
    microbatches = run.settings.train.microbatches
    return model_flops(run.objective, lambda _: run.optimizer, run.mesh, batch, microbatches)


class _Log:
    """Writes metrics and the bar; a step's numbers are fetched while the next step runs."""

    def __init__(self, run: Run, workdir: Path, position: dict[str, Any], meter: Meter):
        self._position, self._meter = position, meter
        self._max_skipped = run.settings.train.max_skipped
        self._pending = None
        self._writer = MetricsWriter(workdir, position["step"], position.get("metrics"))
        self._bar = progress(run.steps, position["step"], "step", "training")
        data = run.settings.data
        self._samples = data.scenes_per_batch * data.questions_per_scene

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
        self._writer.close()

    def pause(self) -> None:
        """Hides the bar until the next step, as a compiler may print warnings meanwhile."""
        self._bar.clear()

    @property
    def written(self) -> dict[str, Any]:
        """See `MetricsWriter.written`."""
        return self._writer.written

    def step(self, step: int, metrics: dict) -> None:
        """Keeps a dispatched step; logs the one before."""
        before, self._pending = self._pending, (step, metrics)
        self._fetch(before)

    def flush(self) -> None:
        """Logs the last dispatched step."""
        before, self._pending = self._pending, None
        self._fetch(before)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a row of evaluation values."""
        self._writer.write(step, values)
        self._bar.write(
            f"step {step}: "
            + ", ".join(
                f"{n} {values[n]:.3f}" for n in sorted(values) if "/" in n and n.count("/") == 1
            )
        )

    def _fetch(self, pending) -> None:
        if pending is None:
            return
        step, metrics = pending
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        speed = self._meter.last
        self._writer.write(step, values | speed)
        self._bar.update(1)
        rate = self._bar.format_dict["rate"] or 0.0
        text = f"loss {values['loss']:.3f}, {rate * self._samples:.0f} samples/s"
        if "speed/mfu" in speed:
            text += f", MFU {speed['speed/mfu']:.0%}"
        if speed.get("speed/input_wait", 0) > SLOW_INPUT:
            text += f", {speed['speed/input_wait']:.0%} waiting for data"
        self._bar.set_postfix_str(text, refresh=False)
        self._position["skipped"] = int(values["skipped"])
        if values["skipped_in_a_row"] > self._max_skipped:
            raise UserError(
                f"training: step {step}: {int(values['skipped_in_a_row'])} steps in a row had a "
                "loss or gradient that is not finite; lower optimizer.learning_rate"
            )


def update_best(
    values: dict[str, float], metric: str, position: dict[str, Any], patience: int
) -> bool:
    """Updates the early-stopping counters, and returns whether the losses are the best so far.

    The validation loss that the objective names decides, or the total loss if that one is not
    trained (the student's text with `only=feature`). A loss that is not finite is never best.

    Raises:
        UserError: the position comes from a damaged checkpoint, which lacks that loss.
    """
    name = f"val/{metric}" if f"val/{metric}" in values else "val/loss"
    if position["best"] and name not in position["best"]:
        raise UserError(
            f"checkpoint: the position of step {position['step']} has no {name} of best"
        )
    if not math.isfinite(values[name]):
        kept = "the best so far stays" if position["best"] else "there is no best yet"
        print(f"step {position['step']}: {name} is not finite: {kept}", flush=True)
    # Older runs may have a best loss that is not finite.
    elif not math.isfinite(position["best"].get(name, math.inf)) or (
        values[name] < position["best"][name]
    ):
        position["best"], position["worse"] = values, 0
        return True
    position["worse"] += 1
    position["stopped_early"] = 0 < patience <= position["worse"]
    return False


def _print_dropped(dropped: Mapping[str, int], shown: Mapping[str, int]) -> None:
    """Prints what is not trained on, except for counts that were shown before."""
    for reason, count in sorted(dropped.items()):
        if count and count != shown.get(reason):
            print(f"not trained on: {count} x {reason}")


def _describe(run: Run) -> None:
    """Prints parameters, batches and devices of a run that begins."""
    print(parameter_table(run.state.params, run.state.frozen))
    pipeline = run.pipelines["train"]
    batch = pipeline.config
    print(
        f"batches: {batch.scenes_per_batch} scenes x {batch.questions_per_scene} questions, "
        f"question length {batch.question_length}, answer length {batch.answer_length}; "
        f"{run.steps} steps, {pipeline.steps_per_epoch} an epoch"
    )
    _print_dropped(pipeline.dropped, {})
    if run.mesh.size > 1:
        sizes = ", ".join(f"{size} {name}" for name, size in run.mesh.shape.items())
        print(f"devices: {run.mesh.size} ({sizes}) of {jax.process_count()} process(es)")
    scenes = batch.scenes_per_batch // run.settings.train.microbatches
    parts = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    if batch_sharding(run.mesh, scenes).is_fully_replicated and parts > 1:
        print(
            f"note: {scenes} scenes a microbatch cannot be split over {parts} groups of devices: "
            "all compute the same; make data.scenes_per_batch a multiple"
        )
    sys.stdout.flush()
