"""Rooms: the embedded data set. Deterministic indoor scenes, their exact answers, as an export.

A scene is a rectangular room with 6 to 10 upright boxes (furniture of 16 categories) seen by a
camera on a short walk of four views. Scene `index` of seed `seed` is a pure function of these two
numbers. `make_rooms` writes the array contract of `exports`; nothing here needs JAX.

What stands in for a pre-trained vision encoder. `vggt/tokens` [4, 64, 76] is a fixed function of
what the camera sees. A patch is 4 x 4 pixels of a 32 x 32 image; its 2 x 2 sub-cells, row-major,
give 13 numbers each:

    point / 4 (world), depth / 4, normal (world), mean colour, contrast, two texture slopes

(point, depth, normal at the sub-cell's centre; the other numbers over its 2 x 2 pixels: mean
colour in [0, 1], standard deviation of the luminance, mean slopes of `raycast.shade`), followed by
sin and cos of 2 pi f p for the point p seen at the patch centre, f in `FREQUENCIES`, [3 axes, 4
frequencies, (sin, cos)]. No identity, category or box enters it.

What stands in for a pre-trained point encoder. `sonata/coord` [G, 3] and `sonata/features`
[G, 10] are the occupied VOXEL-metre voxels of the points at the sub-cells' centres (1,024 of all
views): mean place, and mean colour, normal, contrast and texture slopes, and the log of 1 + their
number / 8. `sonata/frame` [G] is the view that most of a voxel's points are of, the first of
equals. The places are metres, z up, the room centred in x and y, its floor at 0: what
`frames.to_sonata_frame` makes of a reconstruction.

The teacher is the exact oracle, not a model: `features` = share of the 16 pixels of a patch per
category (last column: room surfaces); `depth_bins` = the depth at the patch centre, shared between
its two neighbours of `depth_bin_centres(16)` linearly in log depth; `detection_probs` = one-hot
category of each box; `relations` = see `room_questions.pair_relations`.

`images`, where asked for, are square pictures of the four views. At 32 pixels a side they are the
very pixels of which the tokens are made.

Nothing measured on rooms compares with numbers measured on real scenes.
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
from geode_jax.sources.questions.room import make_questions
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
from geode_jax.sources.workers import deaf_to_ctrl_c

DEPTH_SIDE = 2 * GRID
"""Side of the depth maps and segmentations."""
PRODUCER = {
    "project": "geode_jax rooms",
    "commit": "rooms version 6",
    "weights": "none: tokens are a fixed function of the true geometry and colour",
    "licence": "CC0-1.0",
}
"""The version changes with anything that the generator makes of a scene id."""
TEST_SEED_OFFSET = 1_000_000
"""The test split of seed s is made of the first scenes of seed s + this."""


# -------------------------------------------------------------------------------------- scenes


# --------------------------------------------------------------------------------------- arrays


def questions(scene: RoomScene, seen: Observation) -> list[dict]:
    """Question records of a scene, drawn from random streams of their own, see `make_questions`."""
    numbers = seed_and_index(scene.scene_id)
    streams = (np.random.default_rng([*numbers, stream]) for stream in (1, 2))
    return make_questions(seen_room(scene, seen), *streams)


# --------------------------------------------------------------------------------------- export


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a worker process needs to write one scene."""

    folder: str
    manifest: dict
    seed: int
    index: int
    split: str
    images: int


def _write(job: _Job) -> tuple[dict, list[dict]]:
    """Makes and writes one scene; returns its manifest entry and its questions."""
    scene, seen = make_and_observe(job.seed, job.index)
    arrays, teacher = scene_arrays(scene, seen), teacher_arrays(scene, seen)
    if job.images:
        arrays["images"] = pictures(scene, seen, job.images)
    entry = exports.write_scene(
        job.folder, scene.scene_id, arrays, teacher, split=job.split, manifest=job.manifest
    )
    return entry, questions(scene, seen)


def plan_splits(scenes: int, seed: int, test_scenes: int | None) -> list[tuple[int, int, str]]:
    """(seed, index, split) of every scene: each fifth validates, the test set has its own seed."""
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

    The content depends on `scenes`, `seed`, `test_scenes` and `images` only, never on `workers`.

    Args:
        folder: absent, empty, or an unfinished export of rooms.
        scenes: train and val scenes together, 80 : 20.
        seed: of train and val; test scenes come from seed + TEST_SEED_OFFSET.
        test_scenes: scenes // 16 where None, at least 1 from 4 scenes on.
        images: side in pixels of `images` [4, side, side, 3]; 0 writes none. At 448 they take
            2.4 MB and about 0.5 s a scene, at GRID * PIXELS = 32 12 kB and no time.
        workers: processes; all available cores where None. 1 works in this process. More are
            spawned, so a script that calls this needs the `if __name__ == "__main__"` guard.
        progress: show a progress bar on stderr.

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
    """Results of the jobs in their order."""
    if workers <= 1:
        yield from map(_write, jobs)
        return
    # Spawn: no fork of a process that may hold threads or an accelerator.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    try:
        with deaf_to_ctrl_c():
            chunk = max(1, min(32, len(jobs) // (4 * workers)))
            results = pool.map(_write, jobs, chunksize=chunk)
        yield from results
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "rooms: a worker was killed, for want of memory perhaps; try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
