"""3D-FRONT as an export; a scene is a furnished room, seen by synthetic cameras.

The layout is 3D-FRONT's own: house files `3D-FRONT/*.json` (or `*.json`), and, if it exists,
`3D-FUTURE-model/model_info.json`, whose categories are more reliable than those of the houses.

A room's children refer to furniture and give its pose: metres, y up, rotation a quaternion x y z w,
position the middle of its bottom. The size along the model's own axes is `size`, else `bbox`, times
the child's scale. The export's world is z up, (x, -z, y), its origin the middle of the room's
floor. A room is the rectangle around its Floor meshes, as high as its Wall meshes.

3D-FRONT has no pictures, and its models are not read. The views are ray-cast from the boxes, one
colour per category, along a camera path inside the room, as in synthetic rooms (`sources.rooms`).
The tokens contain depth. Results on these views do not compare with results on real ones.
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
from geode_jax.sources.datasets.scene_export import (
    Scene,
    draw_splits,
    exclude_from_training,
    write_scenes,
)
from geode_jax.sources.questions.measured import box_contacts
from geode_jax.sources.rgbd.sequence import Dropped, pose_of_row
from geode_jax.sources.rooms import layout as room_layout
from geode_jax.sources.rooms import raycast
from geode_jax.sources.rooms.arrays import scene_arrays, seen_room
from geode_jax.sources.rooms.layout import RoomObject
from geode_jax.sources.rooms.scene import RoomScene, observe, pictures

PROJECT = "geode_jax 3D-FRONT"
"""Producer of the exports; the ids of their scenes are HOUSE_ROOM."""
VERSION = 2
"""Version of an export's content; goes up with every change of this converter."""
IMAGE_SIDE = 448
"""Side of the pictures, pixels."""
MIN_PIECES = 3
"""Least number of pieces of furniture in a room, and of those that its views show."""
MIN_ROOM_EDGE, MIN_PIECE_EDGE = 1.5, 0.02
"""Smallest horizontal edge of a room, smallest edge of a piece of furniture, metres."""
DEFAULT_HEIGHT, MIN_HEIGHT = 2.6, 2.0
"""Height of a room whose walls are missing or lower than the second number, metres."""
MAX_TILT = 0.02
"""Largest sine of the angle between a piece of furniture's upward axis and the world's."""
_MAX_PATHS = 8
"""Camera paths that are tried for a room."""


@dataclasses.dataclass(frozen=True)
class FrontRoom:
    """A room of a house, origin in the middle of its floor, z up, metres.

    Attributes:
        house: name of the house's file.
        size: [3] metres.
        names: nouns of the N pieces of furniture.
        boxes: [N, 7].
    """

    house: str
    size: np.ndarray
    names: tuple[str, ...]
    boxes: np.ndarray


def prepare(request: Request) -> Report:
    """Writes the export, see the module.

    Raises:
        UserError: the folder is not in the layout, or no room can be used.
        ExportError: the export cannot be written.
    """
    request.refuse_question_options("3D-FRONT")
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
    splits = draw_splits({scene_id: room.house for scene_id, room in found.items()}, request)
    houses_of = {path.stem: path.stem for path in houses}  # lists may name houses too
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
            "project": PROJECT,
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
    """Returns everything that a room's scene is made from."""
    return [room.house, room.size.tolist(), room.names, room.boxes.tolist()]


# --------------------------------------------------------------------------------------- houses


def read_models(path: Path) -> dict[str, str]:
    """Returns 3D-FUTURE's model id -> category; empty if there is no such file.

    Raises:
        UserError: the file is damaged.
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
    """Returns scene id -> furnished room of a house.

    Args:
        path: the house's JSON file.
        models: model id -> category, see `read_models`.
        dropped: gets the counts of dropped furniture and rooms, by reason.

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
    """Returns one room of a house; raises Dropped with the reason if it cannot be used."""
    low, high, height = _extent(children, meshes)
    middle, size = (low + high) / 2, high - low
    size = np.array([size[0], size[2], height])
    if size[:2].min() < MIN_ROOM_EDGE:
        raise Dropped(f"less than {MIN_ROOM_EDGE} m wide")
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
    if len(boxes) < MIN_PIECES:
        raise Dropped(f"fewer than {MIN_PIECES} pieces of furniture")
    return FrontRoom(house, size, tuple(names), np.array(boxes))


def _extent(children: list, meshes: dict) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the floor's corners [3], y up, at the floor's height, and the walls' height."""
    floors, walls = [], []
    for child in children:
        mesh = meshes.get(str(child.get("ref"))) if isinstance(child, dict) else None
        if not mesh:
            continue
        kind = str(mesh.get("type"))
        of_kind = floors if "Floor" in kind else walls if "Wall" in kind else None
        if of_kind is None:
            continue
        points = _numbers(mesh.get("xyz"))
        if points is None or not points.size or points.size % 3:
            continue  # the data set has broken meshes; others of the room may be valid
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
    return low, high, float(height) if height >= MIN_HEIGHT else DEFAULT_HEIGHT


def _category(piece: dict, models: dict[str, str]) -> str:
    """Returns the noun of a piece of furniture; raises Dropped if it has none or is not valid."""
    name = models.get(str(piece.get("jid"))) or _noun(piece.get("category"))
    name = name or _noun(piece.get("title"))
    if piece.get("valid") is not True:
        raise Dropped("not valid")
    if not name:
        raise Dropped("no category")
    return name


def _box(child: dict, piece: dict, middle: np.ndarray, room: np.ndarray) -> list[float]:
    """Returns the box (7,) of a piece of furniture, metres, z up, origin in the floor's middle."""
    size = _numbers(piece.get("size"), 3)
    size = _numbers(piece.get("bbox"), 3) if size is None else size
    if size is None:
        raise Dropped("no size")
    pose, scale = _placed(child)
    if pose[1, 1] < np.cos(np.arcsin(MAX_TILT)):
        raise Dropped("leaning or upside down")
    x, y, z = np.abs(size * scale)
    if min(x, y, z) < MIN_PIECE_EDGE or max(x, y, z) > room.max():
        raise Dropped("without extent, or larger than its room")
    place = pose[:3, 3] - middle
    if (np.abs(place[[0, 2]]) > room[:2] / 2).any() or not -0.1 <= place[1] < room[2]:
        raise Dropped("outside its room")
    # Half a turn does not change a box, so yaw is in [-pi / 2, pi / 2).
    yaw = np.arctan2(pose[0, 2], pose[0, 0])
    yaw = (yaw + np.pi / 2) % np.pi - np.pi / 2
    box = [place[0], -place[2], place[1] + y / 2, x, z, y, yaw]
    return [round(float(value), 4) for value in box]


def _placed(child: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pose [4, 4] and scale [3] of a child, y up."""
    pos, rot, scale = (_numbers(child.get(k), n) for k, n in (("pos", 3), ("rot", 4), ("scale", 3)))
    if pos is None or rot is None or scale is None or not rot.any():
        raise Dropped("without a valid pose")
    return pose_of_row([*pos, *rot]), scale


def _numbers(value, count: int | None = None) -> np.ndarray | None:
    """Returns a list of finite numbers as [n] float64, None if it is none or n is not `count`."""
    try:
        array = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    good = array.ndim == 1 and count in (None, len(array)) and np.abs(array).max(initial=0) < 1e6
    return array if good else None


def _noun(name) -> str:
    """Returns a category in lower case, the first of alternatives; "" if it is no text."""
    if not isinstance(name, str):
        return ""
    return " ".join(name.split("/")[0].lower().split())


# ---------------------------------------------------------------------------------------- views


def make_scene(
    scene_id: str, room: FrontRoom, request: Request, categories: tuple[str, ...]
) -> Scene:
    """Returns a room as a scene, seen by cameras on a path through it.

    Args:
        scene_id: id in the export.
        room: the room.
        request: gives the number of views, their grid, and the seed of the path.
        categories: the export's categories.

    Raises:
        Dropped: there is no place for a camera, or no path shows enough furniture.
    """
    rng = np.random.default_rng([request.seed, zlib.crc32(scene_id.encode())])
    objects = tuple(
        RoomObject(k, _colour(k), (0.0, 0.0, 0.0), 0.5, (0.0, 0.0), box)
        for k, box in zip(map(categories.index, room.names), room.boxes, strict=True)
    )
    structure = np.array([[0.6, 0.45, 0.3], *[[0.9, 0.9, 0.87]] * (raycast.STRUCTURES - 1)])
    for _ in range(_MAX_PATHS):
        path = room_layout.walk(rng, room.size, room.boxes, request.views)
        if path is None:
            continue
        scene = RoomScene(scene_id, room.size, objects, structure, *path, nouns=categories)
        seen = observe(scene, request.patch_grid[0])
        if seen.visible.sum() >= MIN_PIECES:
            break
    else:
        raise Dropped(f"no path of cameras that see {MIN_PIECES} pieces of furniture")
    arrays = scene_arrays(scene, seen)
    arrays["images"] = pictures(scene, seen, IMAGE_SIDE)
    hidden = [name for name, shown in zip(room.names, seen.visible, strict=True) if not shown]
    facts = seen_room(scene, seen)
    facts = dataclasses.replace(facts, vague=frozenset(hidden), contacts=box_contacts(facts.boxes))
    return Scene(arrays, facts, +Counter({"box: shown by no view": len(hidden)}))


def _colour(category: int) -> tuple[float, float, float]:
    """Returns the colour of a category; steps of the golden ratio give distinct hues."""
    return colorsys.hsv_to_rgb(category * 0.618034 % 1, 0.65, (0.9, 0.7, 0.5)[category % 3])
