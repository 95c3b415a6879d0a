"""Synthetic rooms: scenes drawn from a seed, and what their cameras see."""

import colorsys
import dataclasses
import functools
import re

import numpy as np

from geode_jax.sources.rooms import layout, raycast
from geode_jax.sources.rooms.layout import RoomObject

GRID, PATCH_SIDE = 8, 4
"""Patches along a side of a view; pixels along a side of a patch."""
MIN_VISIBLE_PIXELS = 24
"""A visible object covers at least this many of all views' 4096 pixels, and half of some patch."""
MIN_OBJECTS = 6
"""Least number of objects in a room, and of visible ones."""


@dataclasses.dataclass(frozen=True)
class RoomScene:
    """A furnished room and the cameras that see it.

    Attributes:
        scene_id: id in exports; a synthetic room's is `room_s<seed>_<index>`.
        room: size x, y, z in metres.
        objects: the furniture, visible or not.
        structure: [6, 3] albedo of floor, ceiling and walls (order of `raycast`).
        extrinsic: [V, 3, 4] camera-from-world; synthetic rooms have four views.
        fov: horizontal field of view of all cameras, radians; pixels are square.
        pairs: indices of two objects placed for a question about contact; a fair coin decides
            whether they touch.
        nouns: names of the categories.
    """

    scene_id: str
    room: np.ndarray
    objects: tuple[RoomObject, ...]
    structure: np.ndarray
    extrinsic: np.ndarray
    fov: float
    pairs: tuple[tuple[int, int], ...] = ()
    nouns: tuple[str, ...] = layout.NAMES

    @functools.cached_property
    def boxes(self) -> np.ndarray:
        """Boxes [N, 7] of all objects."""
        return np.array([item.box for item in self.objects]).reshape(-1, 7)

    def intrinsic(self, height: int, width: int) -> np.ndarray:
        """Returns intrinsics [V, 3, 3] for images of this size."""
        return np.repeat(raycast.pinhole(self.fov, height, width)[None], len(self.extrinsic), 0)


def make_scene(seed: int, index: int) -> RoomScene:
    """Returns scene `index` of `seed`, a pure function of the two."""
    return make_and_observe(seed, index)[0]


def scene_from_id(scene_id: str) -> RoomScene:
    """Returns the scene of an id such as `room_s0_000123`.

    Raises:
        ValueError: the id is not that of a synthetic room.
    """
    return make_scene(*seed_and_index(scene_id))


def seed_and_index(scene_id: str) -> tuple[int, int]:
    """Returns the seed and the index of a synthetic room; raises ValueError for other ids."""
    match = re.fullmatch(r"room_s(\d+)_(\d{6,})", scene_id)
    if not match:
        raise ValueError(f"scene {scene_id}: not an id of a room (room_s<seed>_<index>)")
    return int(match[1]), int(match[2])


def make_and_observe(seed: int, index: int) -> tuple[RoomScene, "Observation"]:
    """Returns a scene and what its cameras see; at least MIN_OBJECTS objects are visible."""
    rng = np.random.default_rng([seed, index])
    while True:
        room = layout.sample_room(rng)
        objects, pairs = layout.furnish(rng, room)
        if len(objects) < MIN_OBJECTS:
            continue
        path = layout.walk(rng, room, np.array([item.box for item in objects]))
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
    """What the cameras of a scene see, at the three resolutions that the arrays need.

    Sizes in parentheses are those of synthetic rooms.

    Attributes:
        grid: patches along a side of a view (GRID).
        pixels: hits of the images' pixels (32 x 32).
        colour: [V, pixels, 3] in [0, 1].
        slopes: [V, pixels, 2] texture slopes, see `raycast.shade`.
        cells: hits at the centres of the depth maps' pixels (16 x 16).
        patches: hits at the centres of the patches (8 x 8).
        rays: [V, N] pixels of each view that show each object.
        visible: [N] whether an object counts as visible, see MIN_VISIBLE_PIXELS.
    """

    grid: int
    pixels: raycast.Hits
    colour: np.ndarray
    slopes: np.ndarray
    cells: raycast.Hits
    patches: raycast.Hits
    rays: np.ndarray
    visible: np.ndarray


def _appearance(scene: RoomScene) -> raycast.Appearance:
    """Returns the appearance of the objects, a planked floor, a plain ceiling and plain walls."""
    items = scene.objects
    planks = np.zeros((raycast.STRUCTURES, 3))
    planks[raycast.FLOOR, 0] = 0.12
    columns = (
        [*(item.colour for item in items), *scene.structure],
        [*(item.pattern for item in items), *planks],
        [*(item.period for item in items), *[0.4] * len(planks)],
        [*(item.phase for item in items), *[(0.0, 0.0)] * len(planks)],
    )
    return raycast.Appearance(*(np.array(column, np.float32) for column in columns))


def observe(scene: RoomScene, grid: int = GRID) -> Observation:
    """Casts the rays of all views once and decides which objects are visible."""
    sides = (grid * PATCH_SIDE, 2 * grid, grid)
    rays = [
        raycast.pixel_rays(scene.extrinsic, raycast.pinhole(scene.fov, side, side), side, side)
        for side in sides
    ]
    origins = raycast.camera_centres(scene.extrinsic)
    hits = raycast.cast(scene.boxes, scene.room, origins, np.concatenate(rays, axis=1))
    ends = np.cumsum([side * side for side in sides])[:-1]
    fields = dataclasses.fields(raycast.Hits)
    parts = zip(*(np.split(getattr(hits, f.name), ends, 1) for f in fields), strict=True)
    pixels, cells, patches = (raycast.Hits(*part) for part in parts)
    colour, slopes = raycast.shade(pixels, _appearance(scene))
    shows = by_patch(pixels.surface, grid)[..., None] == np.arange(len(scene.objects))
    share = shows.sum(2)  # [V, patches, N]
    shown = share.sum(1)
    half = (share >= PATCH_SIDE * PATCH_SIDE // 2).any((0, 1))
    visible = (shown.sum(0) >= MIN_VISIBLE_PIXELS) & half
    return Observation(grid, pixels, colour, slopes, cells, patches, shown, visible)


def blocks(pixels: np.ndarray, side: int, block: int) -> np.ndarray:
    """Returns images [V, side * side, ...] as [V, blocks, block * block, ...].

    Blocks, and pixels inside a block, are in row-major order.
    """
    views, rest = pixels.shape[0], pixels.shape[2:]
    n = side // block
    tiles = pixels.reshape(views, n, block, n, block, *rest)
    return tiles.swapaxes(2, 3).reshape(views, n * n, block * block, *rest)


def by_patch(pixels: np.ndarray, grid: int) -> np.ndarray:
    """Returns images [V, pixels, ...] as [V, patches, pixels of a patch, ...]."""
    return blocks(pixels, grid * PATCH_SIDE, PATCH_SIDE)


def render(scene: RoomScene, height: int, width: int) -> dict[str, np.ndarray]:
    """Returns pictures of all views.

    Returns:
        `rgb` [V, height, width, 3] uint8; `depth` [V, height, width] float32 metres along the
        optical axis; `normals` [V, height, width, 3] float32, world frame; `instance`
        [V, height, width] int16, index into `scene.objects`, -1 for the room itself.
    """
    rays = raycast.pixel_rays(
        scene.extrinsic, raycast.pinhole(scene.fov, height, width), height, width
    )
    origins = raycast.camera_centres(scene.extrinsic)
    appearance, count = _appearance(scene), len(scene.objects)
    images: dict[str, list] = {"rgb": [], "depth": [], "normals": [], "instance": []}
    for view in range(len(origins)):
        hits = raycast.cast(
            scene.boxes, scene.room, origins[view : view + 1], rays[view : view + 1]
        )
        colour, _ = raycast.shade(hits, appearance)
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
    """Returns `rgb` [V, side, side, 3] of `render`; casts no rays where `seen` has this size."""
    if side == seen.grid * PATCH_SIDE:
        return _rgb(seen.colour).reshape(-1, side, side, 3)
    return render(scene, side, side)["rgb"]


def _rgb(colour: np.ndarray) -> np.ndarray:
    """Returns colours in [0, 1] as uint8."""
    return np.round(colour * 255).astype(np.uint8)
