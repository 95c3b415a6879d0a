"""3D-FRONT on disk as an export: a scene a furnished room, seen by cameras of our own.

Layout that is read, 3D-FRONT's own: house files `3D-FRONT/*.json` (or `*.json`), and, where it is
there, `3D-FUTURE-model/model_info.json`, which knows the categories better than the houses.

A piece of furniture is where a room's child refers to it: metres, y up, rotation a quaternion
x y z w, position the middle of its bottom; its size along the model's own axes is `size`, else
`bbox`, times the child's scale. Our world is z up, (x, -z, y), its origin the middle of the room's
floor. A room is the rectangle around its Floor meshes, as high as its Wall meshes.

No pictures come with 3D-FRONT and nothing of its models is read: the views are ray-cast from the
boxes, a colour a category, along a camera path inside the room, as those of the embedded rooms
(`rooms`). The tokens contain depth; nothing measured on these views compares with real ones.
"""

import colorsys
import dataclasses
import os
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from geode_jax.errors import UserError
from geode_jax.exports import files
from geode_jax.runtime.bars import progress_bar
from geode_jax.sources.datasets import Report, Request
from geode_jax.sources.datasets.scene_export import Scene, exclude_from_training, write_scenes
from geode_jax.sources.rgbd.sequence import Dropped, pose_of_row
from geode_jax.sources.rooms import layout as room_layout
from geode_jax.sources.rooms import raycast
from geode_jax.sources.rooms.arrays import scene_arrays, seen_room
from geode_jax.sources.rooms.layout import RoomObject
from geode_jax.sources.rooms.scene import RoomScene, observe, pictures
from geode_jax.sources.splits import split_places

VERSION = 1
"""Of what an export holds; changes when this converter changes."""
IMAGE_SIDE = 448
FEWEST = 3
"""Pieces of furniture that a room has, and that its views show."""
SMALLEST_ROOM, SMALLEST_PIECE = 1.5, 0.02
"""Metres along an edge."""
HEIGHT = 2.6
"""Metres from floor to ceiling where the walls do not tell, or tell of less than LOWEST."""
LOWEST = 2.0
UPRIGHT = 0.02
"""How far the up of a piece of furniture may lean, as a sine."""
_PATHS = 8


@dataclasses.dataclass(frozen=True)
class FrontRoom:
    """A room of a house, origin in the middle of its floor, z up, metres.

    Attributes:
        house: name of the house's file.
        size: [3].
        names: nouns of the furniture.
        boxes: [N, 7].
    """

    house: str
    size: np.ndarray
    names: tuple[str, ...]
    boxes: np.ndarray


def prepare(request: Request) -> Report:
    """Makes the export; see the module's docstring.

    Raises:
        UserError: nothing there is in the layout, or no room can be used.
        ExportError: the export cannot be written.
    """
    if request.parts:
        raise UserError("--part: 3D-FRONT has none")
    if request.scenes:
        raise UserError("--scenes: 3D-FRONT has scenes of its own")
    if request.patch_grid[0] != request.patch_grid[1]:
        raise UserError("--grid: the views are square, and so must the grid be")
    houses = request.root / "3D-FRONT"
    houses = sorted((houses if houses.is_dir() else request.root).glob("*.json"))
    if not houses:
        raise UserError(f"{request.root}: no house: 3D-FRONT/*.json or *.json are looked for")
    models = read_models(request.root / "3D-FUTURE-model" / "model_info.json")
    report, found = Report(), {}
    for path in progress_bar(houses, desc="houses", unit="house"):
        try:
            for scene_id, room in read_house(path, models, report.dropped).items():
                if found.setdefault(scene_id, room) is not room:
                    report.dropped["scene: two of one name"] += 1
        except UserError as error:
            report.dropped[f"house: {error}"] += 1
    places = split_places((room.house for room in found.values()), request.seed)
    splits = {scene_id: places[room.house] for scene_id, room in found.items()}
    houses_of = {path.stem: path.stem for path in houses}  # a list may name these, too
    houses_of |= {scene_id: room.house for scene_id, room in found.items()}
    splits = exclude_from_training(splits, houses_of, request, report)
    categories = sorted({name for scene_id in splits for name in found[scene_id].names})
    return write_scenes(
        request,
        splits,
        lambda scene_id: make_scene(scene_id, found[scene_id], request, tuple(categories)),
        report,
        source=lambda scene_id: _facts(found[scene_id]),
        producer={
            "project": "geode_jax 3D-FRONT",
            "commit": f"front3d version {VERSION}",
            "weights": "none: tokens are a fixed function of the boxes' geometry and colour",
            "licence": "3D-FRONT Terms of Use: not to be passed on",
        },
        categories=categories,
        tokens_contain_depth=True,
        notes="3D-FRONT layouts. The views are ray-cast from the furniture's boxes, a colour a "
        "category; the tokens are a fixed function of what they show, so they CONTAIN THE DEPTH "
        "that depth metrics score. A room is the rectangle around its floor.",
    )


def _facts(room: FrontRoom) -> list:
    """All that a room's scene is made from."""
    return [room.house, room.size.tolist(), room.names, room.boxes.tolist()]


# --------------------------------------------------------------------------------------- houses


def read_models(path: Path) -> dict[str, str]:
    """3D-FUTURE's model id -> category; empty where there is no such file.

    Raises:
        UserError: it is there and damaged.
    """
    if not os.path.lexists(path):
        return {}
    models = files.read_json(path)
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise UserError(f"{path}: must be a list of models")
    return {
        str(model.get("model_id")): name
        for model in models
        if (name := _noun(model.get("category")) or _noun(model.get("super-category")))
    }


def read_house(path: Path, models: dict[str, str], dropped: Counter) -> dict[str, FrontRoom]:
    """The furnished rooms of a house by their scene ids.

    Args:
        path: of its JSON file.
        models: of `read_models`.
        dropped: reasons are added to it, of furniture and of rooms.

    Raises:
        UserError: the file cannot be read, or is no house.
    """
    house = files.read_json(path)
    try:
        furniture = {str(piece["uid"]): piece for piece in house["furniture"]}
        meshes = {str(mesh["uid"]): mesh for mesh in house["mesh"]}
        parts = [
            (str(room["instanceid"]), list(room["children"])) for room in house["scene"]["room"]
        ]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a house of 3D-FRONT: {error}") from None
    found = {}
    for name, children in parts:
        scene_id = re.sub(r"[^A-Za-z0-9_-]+", "_", f"{path.stem}_{name}")[:128]
        try:
            room = _read_room(path.stem, children, furniture, meshes, models, dropped)
        except Dropped as reason:
            dropped[f"scene: {reason}"] += 1
            continue
        if scene_id in found:
            dropped["scene: two of one name"] += 1
            continue
        found[scene_id] = room
    return found


def _read_room(house: str, children: list, furniture, meshes, models, dropped) -> FrontRoom:
    low, high, height = _extent(children, meshes)
    middle, size = (low + high) / 2, high - low
    size = np.array([size[0], size[2], height])
    if size[:2].min() < SMALLEST_ROOM:
        raise Dropped(f"less than {SMALLEST_ROOM} m wide")
    names, boxes = [], []
    for child in children:
        ref = str(child.get("ref")) if isinstance(child, dict) else None
        if ref in meshes:
            continue
        piece = furniture.get(ref)
        if piece is None:
            dropped["furniture: not in its house"] += 1
            continue
        try:
            name, box = _category(piece, models), _box(child, piece, middle, size)
        except Dropped as reason:
            dropped[f"furniture: {reason}"] += 1
            continue
        names.append(name)
        boxes.append(box)
    if len(boxes) < FEWEST:
        raise Dropped(f"fewer than {FEWEST} pieces of furniture")
    return FrontRoom(house, size, tuple(names), np.array(boxes))


def _extent(children: list, meshes: dict) -> tuple[np.ndarray, np.ndarray, float]:
    """Corners [3] of the floor, y up, its own height in both, and the height of the walls on it."""
    floors, walls = [], []
    for child in children:
        mesh = meshes.get(str(child.get("ref"))) if isinstance(child, dict) else None
        kind = str(mesh.get("type")) if mesh else ""
        of_kind = floors if "Floor" in kind else walls if "Wall" in kind else None
        if of_kind is None:
            continue
        points = _numbers(mesh.get("xyz"))
        if points is None or not points.size or points.size % 3:
            continue  # broken meshes are known of; others of the kind may tell
        try:
            pose, scale = _placed(child)
        except Dropped:
            continue
        of_kind.append(points.reshape(-1, 3) * scale @ pose[:3, :3].T + pose[:3, 3])
    if not floors:
        raise Dropped("no floor")
    floor = np.concatenate(floors)
    low, high = floor.min(0), floor.max(0)
    low[1] = high[1]
    height = np.concatenate(walls)[:, 1].max() - high[1] if walls else 0
    return low, high, float(height) if height >= LOWEST else HEIGHT


def _category(piece: dict, models: dict[str, str]) -> str:
    name = models.get(str(piece.get("jid"))) or _noun(piece.get("category"))
    name = name or _noun(piece.get("title"))
    if piece.get("valid") is not True:
        raise Dropped("not valid")
    if not name:
        raise Dropped("no category")
    return name


def _box(child: dict, piece: dict, middle: np.ndarray, room: np.ndarray) -> list[float]:
    """The box (7,) of a piece of furniture, metres, z up, origin in the middle of the floor."""
    size = _numbers(piece.get("size"), 3)
    size = _numbers(piece.get("bbox"), 3) if size is None else size
    if size is None:
        raise Dropped("no size")
    pose, scale = _placed(child)
    if pose[1, 1] < np.cos(np.arcsin(UPRIGHT)):
        raise Dropped("leaning or upside down")
    x, y, z = np.abs(size * scale)
    if min(x, y, z) < SMALLEST_PIECE or max(x, y, z) > room.max():
        raise Dropped("without extent, or larger than its room")
    place = pose[:3, 3] - middle
    if (np.abs(place[[0, 2]]) > room[:2] / 2).any() or not -0.1 <= place[1] < room[2]:
        raise Dropped("outside its room")
    # Half a turn changes no box: yaw in [-pi / 2, pi / 2).
    yaw = np.arctan2(pose[0, 2], pose[0, 0])
    yaw = (yaw + np.pi / 2) % np.pi - np.pi / 2
    box = [place[0], -place[2], place[1] + y / 2, x, z, y, yaw]
    return [round(float(value), 4) for value in box]


def _placed(child: dict) -> tuple[np.ndarray, np.ndarray]:
    """Pose [4, 4] and scale [3] of a child, y up."""
    pos, rot, scale = (_numbers(child.get(k), n) for k, n in (("pos", 3), ("rot", 4), ("scale", 3)))
    if pos is None or rot is None or scale is None or not rot.any():
        raise Dropped("placed by no numbers")
    return pose_of_row([*pos, *rot]), scale


def _numbers(value, count: int | None = None) -> np.ndarray | None:
    """A list of finite numbers as [n] float64; None where it is none, or not of `count`."""
    try:
        array = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    good = array.ndim == 1 and count in (None, len(array)) and np.abs(array).max(initial=0) < 1e6
    return array if good else None


def _noun(name) -> str:
    """A category in words: of alternatives the first, in small letters."""
    if not isinstance(name, str):
        return ""
    return " ".join(name.split("/")[0].lower().split())


# ---------------------------------------------------------------------------------------- views


def make_scene(
    scene_id: str, room: FrontRoom, request: Request, categories: tuple[str, ...]
) -> Scene:
    """A room and what cameras on a path through it see.

    Args:
        scene_id: name in the export.
        room: of `read_house`.
        request: how many views, their grid, and the seed of the path.
        categories: of the export.

    Raises:
        Dropped: no camera has a place, or none sees enough.
    """
    rng = np.random.default_rng([request.seed, zlib.crc32(scene_id.encode())])
    objects = tuple(
        RoomObject(k, _colour(k), (0.0, 0.0, 0.0), 0.5, (0.0, 0.0), box)
        for k, box in zip(map(categories.index, room.names), room.boxes, strict=True)
    )
    structure = np.array([[0.6, 0.45, 0.3], *[[0.9, 0.9, 0.87]] * (raycast.STRUCTURES - 1)])
    for _ in range(_PATHS):
        path = room_layout.walk(rng, room.size, room.boxes, request.views)
        if path is None:
            continue
        scene = RoomScene(scene_id, room.size, objects, structure, *path, nouns=categories)
        seen = observe(scene, request.patch_grid[0])
        if seen.visible.sum() >= FEWEST:
            break
    else:
        raise Dropped(f"no path of cameras that see {FEWEST} pieces of furniture")
    arrays = scene_arrays(scene, seen)
    arrays["images"] = pictures(scene, seen, IMAGE_SIDE)
    hidden = [name for name, shown in zip(room.names, seen.visible, strict=True) if not shown]
    facts = dataclasses.replace(seen_room(scene, seen), vague=frozenset(hidden))
    return Scene(arrays, facts, +Counter({"box: shown by no view": len(hidden)}))


def _colour(category: int) -> tuple[float, float, float]:
    """Hues that differ, however many categories there are: steps of the golden ratio."""
    return colorsys.hsv_to_rgb(category * 0.618034 % 1, 0.65, (0.9, 0.7, 0.5)[category % 3])
