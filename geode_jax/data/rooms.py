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

import colorsys
import concurrent.futures.process
import dataclasses
import functools
import multiprocessing
import os
import re
import sys
from pathlib import Path

import numpy as np

from geode_jax import exports
from geode_jax.bars import progress_bar
from geode_jax.data import raycast, room_layout, room_questions
from geode_jax.data.room_layout import CATEGORIES, VIEWS, RoomObject
from geode_jax.data.workers import deaf_to_ctrl_c
from geode_jax.errors import UserError

GRID, PIXELS = 8, 4
"""Patches along a side of a view, pixels along a side of a patch."""
DEPTH_SIDE = 2 * GRID
"""Side of the depth maps and segmentations."""
DEPTH_BINS = 16
FREQUENCIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Cycles per metre of the Fourier features."""
TOKEN_WIDTH = 4 * 13 + 3 * len(FREQUENCIES) * 2
VOXEL = 0.75
"""Edge of a point token's voxel, metres: furniture of half a metre and more has one or more."""
PRODUCER = {
    "project": "geode_jax rooms",
    "commit": "rooms version 6",
    "weights": "none: tokens are a fixed function of the true geometry and colour",
    "licence": "CC0-1.0",
}
"""The version changes with anything that the generator makes of a scene id."""
TEST_SEED_OFFSET = 1_000_000
"""The test split of seed s is made of the first scenes of seed s + this."""

MIN_RAYS = 24
"""A visible object covers this many of the 4096 pixels, and half of some patch."""
MIN_OBJECTS = 6


@dataclasses.dataclass(frozen=True)
class RoomScene:
    """A furnished room and the cameras that see it.

    Attributes:
        scene_id: name in exports; of the embedded rooms `room_s<seed>_<index>`.
        room: size x, y, z in metres.
        objects: the furniture, visible or not.
        structure: [6, 3] albedo of floor, ceiling and walls (order of `raycast`).
        extrinsic: [V, 3, 4] camera-from-world; of the embedded rooms four.
        fov: horizontal field of view of all cameras, radians; pixels are square.
        pairs: index pairs laid out to be asked about contact, touching or apart by a fair coin.
        nouns: of the categories.
    """

    scene_id: str
    room: np.ndarray
    objects: tuple[RoomObject, ...]
    structure: np.ndarray
    extrinsic: np.ndarray
    fov: float
    pairs: tuple[tuple[int, int], ...] = ()
    nouns: tuple[str, ...] = room_layout.NAMES

    @functools.cached_property
    def boxes(self) -> np.ndarray:
        """All boxes [N, 7]."""
        return np.array([item.box for item in self.objects]).reshape(-1, 7)

    def intrinsic(self, height: int, width: int) -> np.ndarray:
        """Intrinsics [4, 3, 3] for images of this size."""
        return np.repeat(raycast.pinhole(self.fov, height, width)[None], len(self.extrinsic), 0)


# -------------------------------------------------------------------------------------- scenes


def make_scene(seed: int, index: int) -> RoomScene:
    """Scene `index` of `seed`, a pure function of the two."""
    return make_and_observe(seed, index)[0]


def scene_from_id(scene_id: str) -> RoomScene:
    """The scene of an id such as `room_s0_000123`.

    Raises:
        ValueError: the id is not one of a rooms scene.
    """
    return make_scene(*_seed_and_index(scene_id))


def _seed_and_index(scene_id: str) -> tuple[int, int]:
    match = re.fullmatch(r"room_s(\d+)_(\d{6,})", scene_id)
    if not match:
        raise ValueError(f"scene {scene_id}: not an id of a room (room_s<seed>_<index>)")
    return int(match[1]), int(match[2])


def make_and_observe(seed: int, index: int) -> tuple[RoomScene, "Observation"]:
    """The scene and what its cameras see; at least MIN_OBJECTS objects are visible."""
    rng = np.random.default_rng([seed, index])
    while True:
        room = room_layout.sample_room(rng)
        objects, pairs = room_layout.furnish(rng, room)
        if len(objects) < MIN_OBJECTS:
            continue
        path = room_layout.walk(rng, room, np.array([item.box for item in objects]))
        if path is None:
            continue
        grey = rng.uniform(0.75, 0.95) + rng.uniform(-0.03, 0.03, 3)
        floor = colorsys.hsv_to_rgb(*rng.uniform((0.05, 0.1, 0.35), (0.12, 0.3, 0.65)))
        structure = np.concatenate([[floor, [0.97] * 3], np.tile(grey, (4, 1))])
        name = f"room_s{seed}_{index:06d}"
        scene = RoomScene(name, room, tuple(objects), structure, *path, tuple(pairs))
        seen = observe(scene)
        if seen.visible.sum() >= MIN_OBJECTS:
            return scene, seen


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the cameras of a scene see, at the three resolutions the arrays need.

    Attributes:
        grid: patches along a side of a view, of the embedded rooms GRID.
        pixels: hits of the 32 x 32 images; `colour`, `slopes` belong to them ([V, 1024, ...]).
        cells: hits at the centres of the 16 x 16 depth maps.
        patches: hits at the centres of the 8 x 8 patches.
        rays: [V, N] pixels that show each object, per view.
        visible: [N] objects that count as seen, see MIN_RAYS.
    """

    grid: int
    pixels: raycast.Hits
    colour: np.ndarray
    slopes: np.ndarray
    cells: raycast.Hits
    patches: raycast.Hits
    rays: np.ndarray
    visible: np.ndarray


def _looks(scene: RoomScene) -> raycast.Looks:
    """Appearance of the objects, then of a planked floor and plain ceiling and walls."""
    items = scene.objects
    planks = np.zeros((raycast.STRUCTURES, 3))
    planks[raycast.FLOOR, 0] = 0.12
    columns = (
        [*(item.colour for item in items), *scene.structure],
        [*(item.pattern for item in items), *planks],
        [*(item.period for item in items), *[0.4] * len(planks)],
        [*(item.phase for item in items), *[(0.0, 0.0)] * len(planks)],
    )
    return raycast.Looks(*(np.array(column, np.float32) for column in columns))


def observe(scene: RoomScene, grid: int = GRID) -> Observation:
    """Cast the rays of all views once and decide which objects are visible."""
    sides = (grid * PIXELS, 2 * grid, grid)
    rays = [
        raycast.pixel_rays(scene.extrinsic, raycast.pinhole(scene.fov, side, side), side, side)
        for side in sides
    ]
    origins = raycast.camera_centres(scene.extrinsic)
    hits = raycast.cast(scene.boxes, scene.room, origins, np.concatenate(rays, axis=1))
    ends = np.cumsum([side * side for side in sides])[:-1]
    parts = zip(*(np.split(getattr(hits, f.name), ends, 1) for f in _HIT_FIELDS), strict=True)
    pixels, cells, patches = (raycast.Hits(*part) for part in parts)
    colour, slopes = raycast.shade(pixels, _looks(scene))
    shows = _by_patch(pixels.surface, grid)[..., None] == np.arange(len(scene.objects))
    share = shows.sum(2)  # [V, patches, N]
    rays = share.sum(1)
    half = (share >= PIXELS * PIXELS // 2).any((0, 1))
    visible = (rays.sum(0) >= MIN_RAYS) & half
    return Observation(grid, pixels, colour, slopes, cells, patches, rays, visible)


_HIT_FIELDS = dataclasses.fields(raycast.Hits)


def _blocks(pixels: np.ndarray, side: int, block: int) -> np.ndarray:
    """[V, side * side, ...] to [V, blocks, block * block, ...], blocks and insides row-major."""
    views, rest = pixels.shape[0], pixels.shape[2:]
    n = side // block
    tiles = pixels.reshape(views, n, block, n, block, *rest)
    return tiles.swapaxes(2, 3).reshape(views, n * n, block * block, *rest)


def _by_patch(pixels: np.ndarray, grid: int) -> np.ndarray:
    return _blocks(pixels, grid * PIXELS, PIXELS)


def render(scene: RoomScene, height: int, width: int) -> dict[str, np.ndarray]:
    """Pictures of all views.

    Returns:
        `rgb` [V, height, width, 3] uint8; `depth` [V, height, width] float32 metres along the
        optical axis; `normals` [V, height, width, 3] float32, world frame; `instance`
        [V, height, width] int16, index into `scene.objects`, -1 for the room itself.
    """
    rays = raycast.pixel_rays(
        scene.extrinsic, raycast.pinhole(scene.fov, height, width), height, width
    )
    origins = raycast.camera_centres(scene.extrinsic)
    looks, count = _looks(scene), len(scene.objects)
    images: dict[str, list] = {"rgb": [], "depth": [], "normals": [], "instance": []}
    for view in range(len(origins)):
        hits = raycast.cast(
            scene.boxes, scene.room, origins[view : view + 1], rays[view : view + 1]
        )
        colour, _ = raycast.shade(hits, looks)
        images["rgb"].append(_rgb(colour))
        images["depth"].append(hits.depth.astype(np.float32))
        images["normals"].append(hits.normal.astype(np.float32))
        instance = np.where(hits.surface < count, hits.surface, -1)
        images["instance"].append(instance.astype(np.int16))
    return {
        name: np.concatenate(parts).reshape(len(origins), height, width, *parts[0].shape[2:])
        for name, parts in images.items()
    }


def pictures(scene: RoomScene, seen: Observation, side: int) -> np.ndarray:
    """`rgb` [V, side, side, 3] of `render`; no ray is cast where `observe` has cast these."""
    if side == seen.grid * PIXELS:
        return _rgb(seen.colour).reshape(-1, side, side, 3)
    return render(scene, side, side)["rgb"]


def _rgb(colour: np.ndarray) -> np.ndarray:
    """Colours in [0, 1] as uint8."""
    return np.round(colour * 255).astype(np.uint8)


# --------------------------------------------------------------------------------------- arrays


def depth_bin_centres(bins: int, near: float = 0.3, far: float = 10.0) -> np.ndarray:
    """Centres [bins] of log-spaced depth bins, metres."""
    return np.geomspace(near, far, bins)


def soft_depth_bins(depth: np.ndarray, bins: int) -> np.ndarray:
    """Depth [...] as probabilities [..., bins]: linear in log depth between two neighbours."""
    centres = np.log(depth_bin_centres(bins))
    position = (np.log(depth) - centres[0]) / (centres[1] - centres[0])
    return np.maximum(0, 1 - np.abs(np.clip(position, 0, bins - 1)[..., None] - np.arange(bins)))


def patch_tokens(
    point: np.ndarray,
    depth: np.ndarray,
    normal: np.ndarray,
    colour: np.ndarray,
    contrast: np.ndarray,
    slopes: np.ndarray,
    centre: np.ndarray,
) -> np.ndarray:
    """The stand-in for `vggt/tokens` [V, gh * gw, TOKEN_WIDTH], see the module's docstring.

    Args:
        point, normal: [V, 2 gh, 2 gw, 3] at the cells' centres, world frame.
        depth: [V, 2 gh, 2 gw].
        colour: [V, 2 gh, 2 gw, 3] mean in [0, 1].
        contrast: [V, 2 gh, 2 gw] standard deviation of the luminance.
        slopes: [V, 2 gh, 2 gw, 2] mean texture slopes.
        centre: [V, gh, gw, 3] points at the patches' centres.
    """
    cells = np.concatenate(
        [point / 4, depth[..., None] / 4, normal, colour, contrast[..., None], slopes], axis=-1
    )
    v, gh, gw, _ = centre.shape
    cells = cells.reshape(v, gh, 2, gw, 2, -1).swapaxes(2, 3).reshape(v, gh * gw, -1)
    angle = 2 * np.pi * centre[..., None] * np.array(FREQUENCIES)
    waves = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(v, gh * gw, -1)
    return np.concatenate([cells, waves], -1).astype(np.float16)


def tokens(seen: Observation) -> np.ndarray:
    """`vggt/tokens` [V, grid * grid, TOKEN_WIDTH] float16 of what the cameras see."""
    colour, contrast, slopes = _cell_looks(seen)

    def cells(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, 2 * seen.grid, 2 * seen.grid, *values.shape[2:])

    return patch_tokens(
        point=cells(seen.cells.point),
        depth=cells(seen.cells.depth),
        normal=cells(seen.cells.normal),
        colour=cells(colour),
        contrast=cells(contrast),
        slopes=cells(slopes),
        centre=seen.patches.point.reshape(-1, seen.grid, seen.grid, 3),
    )


def _cell_looks(seen: Observation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean colour [V, cells, 3], contrast [V, cells], mean slopes [V, cells, 2] of 2 x 2 pixels."""
    side = seen.grid * PIXELS
    colour = _blocks(seen.colour, side, 2)
    slopes = _blocks(seen.slopes, side, 2)
    return colour.mean(2), raycast.luminance(colour).std(2), slopes.mean(2)


def point_tokens(seen: Observation) -> dict[str, np.ndarray]:
    """`sonata/features` [G, 10], `coord` [G, 3] and `frame` [G], see the docstring."""
    colour, contrast, slopes = _cell_looks(seen)
    point = seen.cells.point.reshape(-1, 3)
    parts = np.concatenate(
        [
            point,
            colour.reshape(-1, 3),
            seen.cells.normal.reshape(-1, 3),
            contrast.reshape(-1, 1),
            slopes.reshape(-1, 2),
        ],
        axis=-1,
    )
    voxel = np.floor(point / VOXEL).astype(np.int64)
    _, index, count = np.unique(voxel, axis=0, return_inverse=True, return_counts=True)
    index = index.reshape(-1)
    views = len(seen.rays)
    view = np.repeat(np.arange(views), len(point) // views)
    of_view = np.bincount(index * views + view, minlength=len(count) * views)
    order = np.argsort(index, kind="stable")
    means = np.add.reduceat(parts[order], np.cumsum(count) - count) / count[:, None]
    features = np.concatenate([means[:, 3:], np.log1p(count[:, None] / 8)], axis=-1)
    return {
        "sonata/features": features.astype(np.float16),
        "sonata/coord": means[:, :3].astype(np.float32),
        "sonata/frame": of_view.reshape(-1, views).argmax(1).astype(np.int32),
    }


def _categories(scene: RoomScene) -> np.ndarray:
    """Category [S] of every surface, -1 of the room's own."""
    return np.array([item.category for item in scene.objects] + [-1] * raycast.STRUCTURES)


def scene_arrays(scene: RoomScene, seen: Observation) -> dict[str, np.ndarray]:
    """The scene's tensors, as `exports` names them."""
    visible, category = np.flatnonzero(seen.visible), _categories(scene)
    maps = (-1, 2 * seen.grid, 2 * seen.grid)
    depth = seen.cells.depth.reshape(maps).astype(np.float32)
    return {
        "vggt/tokens": tokens(seen),
        **point_tokens(seen),
        "vggt/depth": depth,
        "camera/extrinsic": scene.extrinsic.astype(np.float32),
        "camera/intrinsic": scene.intrinsic(*depth.shape[1:]).astype(np.float32),
        "target/depth": depth.copy(),
        "target/boxes": scene.boxes[visible].astype(np.float32),
        "target/labels": category[visible].astype(np.int32),
        "target/segmentation": category[seen.cells.surface].reshape(maps).astype(np.int16),
    }


def teacher_arrays(scene: RoomScene, seen: Observation) -> dict[str, np.ndarray]:
    """The tensors of the scene's exact oracle, as `exports` names them."""
    visible, category = np.flatnonzero(seen.visible), _categories(scene)
    classes = len(CATEGORIES)
    # -1 becomes the last column
    kind = _by_patch(category[seen.pixels.surface] % (classes + 1), GRID)
    share = (kind[..., None] == np.arange(classes + 1)).mean(2)
    bins = soft_depth_bins(seen.patches.depth, DEPTH_BINS)
    relations = room_questions.pair_relations(scene.boxes[visible], scene.extrinsic[0])
    return {
        "features": share.reshape(VIEWS, GRID, GRID, classes + 1).astype(np.float16),
        "depth_bins": bins.reshape(VIEWS, GRID, GRID, DEPTH_BINS).astype(np.float16),
        "detection_probs": np.eye(classes, dtype=np.float16)[category[visible]],
        "relations": relations.reshape(-1, 4).astype(np.float16),
    }


def seen_room(scene: RoomScene, seen: Observation) -> room_questions.SeenRoom:
    """What questions about the scene are made from."""
    visible = np.flatnonzero(seen.visible)
    row = {int(n): k for k, n in enumerate(visible)}
    glimpsed = np.flatnonzero(~seen.visible & (seen.rays.sum(0) >= room_questions.GLIMPSE))
    return room_questions.SeenRoom(
        scene_id=scene.scene_id,
        room=scene.room,
        floor=float(scene.room[0] * scene.room[1]),
        names=tuple(scene.nouns[scene.objects[n].category] for n in visible),
        boxes=scene.boxes[visible],
        rays=seen.rays[:, visible],
        vague=frozenset(scene.nouns[scene.objects[n].category] for n in glimpsed),
        pairs=tuple((row[a], row[b]) for a, b in scene.pairs if a in row and b in row),
        extrinsic=scene.extrinsic,
        larger=room_layout.larger_prior(),
        typical=room_layout.typical_lengths(),
    )


def questions(scene: RoomScene, seen: Observation) -> list[dict]:
    """Question records of a scene, drawn from random streams of their own, see `make_questions`."""
    numbers = _seed_and_index(scene.scene_id)
    streams = (np.random.default_rng([*numbers, stream]) for stream in (1, 2))
    return room_questions.make_questions(seen_room(scene, seen), *streams)


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
        categories=list(room_layout.NAMES),
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
