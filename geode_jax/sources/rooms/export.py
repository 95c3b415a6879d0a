"""Synthetic rooms as an export, the data set that needs no download.

A scene is a rectangular room with 6 to 10 upright boxes (furniture of 16 categories), seen by a
camera in the four views of a short walk. Scene `index` of seed `seed` is a pure function of these
two numbers. `make_rooms` writes the array contract (`exports`) with the tensors of `arrays.py`, the
questions of `questions.room`, and, if requested, square pictures of the four views. At 32 pixels a
side the pictures are the pixels from which the tokens are made. Nothing here needs JAX.

Results on rooms do not compare with results on real scenes.
"""

import concurrent.futures.process
import dataclasses
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np

from geode_jax import exports
from geode_jax.errors import UserError
from geode_jax.runtime.bars import progress_bar
from geode_jax.sources.questions.room import ROOMS_VERSION, make_questions
from geode_jax.sources.rooms import layout
from geode_jax.sources.rooms.arrays import scene_arrays, seen_room, teacher_arrays
from geode_jax.sources.rooms.scene import (
    GRID,
    Observation,
    RoomScene,
    make_and_observe,
    pictures,
    seed_and_index,
)
from geode_jax.sources.stand_ins import TOKEN_WIDTH
from geode_jax.sources.workers import shielded_from_ctrl_c

PRODUCER = {
    "project": "geode_jax rooms",
    "commit": f"rooms version {ROOMS_VERSION}",
    "weights": "none: tokens are a fixed function of the true geometry and colour",
    "licence": "CC0-1.0",
}
"""Rooms that another version made are refused by name, see `runs.export`."""
TEST_SEED_OFFSET = 1_000_000
"""The test split of seed s has the first scenes of seed s + TEST_SEED_OFFSET."""


def questions(scene: RoomScene, seen: Observation) -> list[dict]:
    """Returns the question records of a scene, drawn from two random streams of its own."""
    numbers = seed_and_index(scene.scene_id)
    rng, box_rng = (np.random.default_rng([*numbers, stream]) for stream in (1, 2))
    return make_questions(seen_room(scene, seen), rng, box_rng)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Input of a worker process that writes one scene."""

    folder: str
    manifest: dict
    seed: int
    index: int
    split: str
    images: int


def _write(job: _Job) -> tuple[dict, list[dict]]:
    """Writes one scene; returns its manifest entry and its questions."""
    scene, seen = make_and_observe(job.seed, job.index)
    arrays, teacher = scene_arrays(scene, seen), teacher_arrays(scene, seen)
    if job.images:
        arrays["images"] = pictures(scene, seen, job.images)
    entry = exports.write_scene(
        job.folder, scene.scene_id, arrays, teacher, split=job.split, manifest=job.manifest
    )
    return entry, questions(scene, seen)


def plan_splits(scenes: int, seed: int, test_scenes: int | None) -> list[tuple[int, int, str]]:
    """Returns (seed, index, split) of every scene.

    Every fifth scene of `seed` is for validation; test scenes have a seed of their own.
    """
    if test_scenes is None:
        test_scenes = max(scenes // 16, int(scenes >= 4))
    plan = [(seed, index, "val" if index % 5 == 4 else "train") for index in range(scenes)]
    if 2 <= scenes < 5:
        plan[-1] = (seed, scenes - 1, "val")
    return plan + [(seed + TEST_SEED_OFFSET, index, "test") for index in range(test_scenes)]


def make_rooms(
    folder: str | Path,
    *,
    scenes: int = 8000,
    seed: int = 0,
    test_scenes: int | None = None,
    images: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Writes an export of rooms.

    The content depends on `scenes`, `seed`, `test_scenes` and `images`, not on `workers`.

    Args:
        folder: absent, empty, or an unfinished export of rooms.
        scenes: number of train and val scenes together, 80 : 20.
        seed: seed of train and val; test scenes have seed + TEST_SEED_OFFSET.
        test_scenes: number of test scenes; None means scenes // 16, at least 1 from 4 scenes on.
        images: side in pixels of `images` [4, side, side, 3]; 0 writes none. A side of 448 takes
            2.4 MB and about 0.5 s a scene, a side of GRID * PATCH_SIDE = 32 takes 12 kB and no
            time.
        workers: number of processes; None means all available cores, and 1 means this process.
            Others are spawned, so a script needs the `if __name__ == "__main__"` guard.
        progress: whether to show a progress bar on stderr.

    Raises:
        ExportError: the folder cannot be written, see `exports.ExportWriter`.
        ValueError: a number is out of range.
    """
    if scenes < 1 or images < 0 or not 0 <= seed < TEST_SEED_OFFSET:
        rule = f"scenes must be >= 1, images >= 0 and seed in [0, {TEST_SEED_OFFSET})"
        raise ValueError(f"rooms: {rule}")
    workers = _cores() if workers is None else workers
    with exports.ExportWriter(
        folder,
        producer=PRODUCER,
        dtype="float16",
        scale="metric",
        token_width=TOKEN_WIDTH,
        patch_grid=(GRID, GRID),
        tokens_contain_depth=True,
        categories=list(layout.NAMES),
        notes="Synthetic rooms; the teacher is the exact oracle.",
    ) as writer:
        jobs = [
            _Job(str(folder), writer.manifest, *place, images)
            for place in plan_splits(scenes, seed, test_scenes)
        ]
        for entry, records in progress_bar(
            _run(jobs, min(workers, len(jobs))),
            total=len(jobs),
            desc="rooms",
            unit="scene",
            disable=not progress,
        ):
            writer.register(entry)
            writer.add_questions(records)


def _run(jobs: list[_Job], workers: int):
    """Yields the results of the jobs in order."""
    if workers <= 1:
        yield from map(_write, jobs)
        return
    # Not fork: this process may hold threads or an accelerator.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    try:
        with shielded_from_ctrl_c():
            chunk = max(1, min(32, len(jobs) // (4 * workers)))
            results = pool.map(_write, jobs, chunksize=chunk)
        yield from results
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "rooms: a worker was killed, perhaps because memory ran out; try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
