"""Furniture and camera walks of synthetic rooms: categories, sizes, places, paths.

Everything is drawn from a numpy Generator, so a scene is a pure function of its seed. Frames and
boxes are those of `raycast`. No box overlaps another, and sizes stay close to their category's.
"""

import colorsys
import dataclasses
import functools

import numpy as np

from geode_jax.geometry.upright_boxes import footprint_gaps, footprints
from geode_jax.sources.questions import margins
from geode_jax.sources.rooms import raycast

VIEWS = 4
"""Views of a synthetic room."""
MAX_OBJECTS = 10
"""Largest number of objects in a room."""
CLEARANCE = 0.08
"""Objects that do not touch are at least this far apart, metres."""


@dataclasses.dataclass(frozen=True)
class Category:
    """Priors of a category.

    Attributes:
        name: noun.
        size: typical x, y, z in metres.
        hsv: hue, saturation and value in [0, 1].
        pattern, period: texture, see `raycast.Appearance`; the period in metres.
    """

    name: str
    size: tuple[float, float, float]
    hsv: tuple[float, float, float]
    pattern: tuple[float, float, float]
    period: float


_PLAIN, _UPRIGHT, _LEVEL, _CHECK = (0, 0, 0), (0.3, 0, 0), (0, 0.3, 0), (0, 0, 0.45)

CATEGORIES = (
    Category("bed", (1.7, 1.3, 0.6), (0.00, 0.70, 0.85), _PLAIN, 0.5),
    Category("sofa", (1.6, 0.8, 0.75), (0.06, 0.75, 0.45), _UPRIGHT, 0.5),
    Category("table", (1.2, 0.8, 0.7), (0.12, 0.65, 0.90), _LEVEL, 0.5),
    Category("chair", (0.6, 0.6, 0.85), (0.18, 0.80, 0.50), _CHECK, 0.4),
    Category("desk", (1.3, 0.7, 0.75), (0.25, 0.65, 0.85), _PLAIN, 0.5),
    Category("cabinet", (0.9, 0.6, 1.0), (0.31, 0.75, 0.45), _UPRIGHT, 0.3),
    Category("bookshelf", (0.9, 0.5, 1.5), (0.37, 0.65, 0.85), _LEVEL, 0.3),
    Category("lamp", (0.5, 0.5, 1.2), (0.43, 0.75, 0.50), _CHECK, 0.6),
    Category("television", (1.1, 0.45, 0.7), (0.50, 0.65, 0.90), _PLAIN, 0.5),
    Category("stool", (0.55, 0.55, 0.6), (0.56, 0.80, 0.50), _UPRIGHT, 0.5),
    Category("refrigerator", (0.75, 0.7, 1.4), (0.62, 0.60, 0.90), _LEVEL, 0.5),
    Category("plant", (0.6, 0.6, 0.9), (0.68, 0.75, 0.50), _CHECK, 0.4),
    Category("trash can", (0.55, 0.55, 0.65), (0.75, 0.55, 0.90), _PLAIN, 0.5),
    Category("nightstand", (0.6, 0.55, 0.65), (0.81, 0.75, 0.50), _UPRIGHT, 0.3),
    Category("stove", (0.7, 0.65, 0.9), (0.87, 0.60, 0.90), _LEVEL, 0.3),
    Category("washer", (0.7, 0.65, 0.85), (0.93, 0.80, 0.50), _CHECK, 0.6),
)
NAMES = tuple(category.name for category in CATEGORIES)
_SIZES = np.array([category.size for category in CATEGORIES])


@dataclasses.dataclass(frozen=True)
class RoomObject:
    """A piece of furniture.

    Attributes:
        category: index into its scene's nouns.
        colour: RGB albedo in [0, 1].
        pattern, period, phase: texture, see `raycast.Appearance`.
        box: (7,) metres and radians.
    """

    category: int
    colour: tuple[float, float, float]
    pattern: tuple[float, float, float]
    period: float
    phase: tuple[float, float]
    box: np.ndarray


# ---------------------------------------------------------------------------------- furniture


def sample_sizes(rng: np.random.Generator, categories: np.ndarray) -> np.ndarray:
    """Returns a size [k, 3] (x >= y, z) for each of k categories, metres.

    The typical size is scaled by 0.6 to 1.6, then each edge by 0.83 to 1.2; edges stay within 0.4
    and 2.4 m.
    """
    scale = np.exp(rng.uniform(np.log(0.6), np.log(1.6), (len(categories), 1)))
    jitter = np.exp(rng.uniform(-0.18, 0.18, (len(categories), 3)))
    return tidy_sizes(np.clip(_SIZES[categories] * scale * jitter, 0.4, [2.4, 2.4, 2.0]))


def tidy_sizes(size: np.ndarray) -> np.ndarray:
    """Returns sizes [..., 3] with the longer horizontal edge first, in even millimetres.

    Then centres are whole millimetres, and boxes written as text are exact.
    """
    size = np.round(size / 0.002) * 0.002
    level = np.sort(size[..., :2], axis=-1)[..., ::-1]
    return np.concatenate([level, size[..., 2:]], axis=-1)


def sample_room(rng: np.random.Generator) -> np.ndarray:
    """Returns the size (x, y, z) of a room in metres.

    Edges are 3 to 8 m; the area is log-uniform in 10 to 56 square metres.
    """
    area = np.exp(rng.uniform(np.log(10), np.log(56)))
    x = np.exp(rng.uniform(np.log(max(3, area / 8)), np.log(min(8, area / 3))))
    return np.round(np.array([x, area / x, rng.uniform(2.4, 3.2)]) / 0.002) * 0.002


@functools.cache
def typical_lengths() -> dict[str, float]:
    """Returns the median of the longest edge by category noun, metres."""
    rng = np.random.default_rng(1)
    return {
        name: float(np.median(sample_sizes(rng, np.full(2_000, category)).max(-1)))
        for category, name in enumerate(NAMES)
    }


@functools.cache
def larger_prior() -> dict[tuple[str, str], float]:
    """Returns P(volume of a > volume of b) by the category nouns (a, b).

    Only pairs whose volumes differ by MIN_VOLUME_RATIO count. Monte Carlo from the size priors,
    with a fixed seed.
    """
    rng = np.random.default_rng(0)
    every = np.repeat(np.arange(len(NAMES)), 20_000)
    volumes = sample_sizes(rng, every).prod(-1).reshape(len(NAMES), -1)
    larger = np.empty((len(NAMES),) * 2)
    for a, volume in enumerate(volumes):
        larger[a] = (volume >= margins.MIN_VOLUME_RATIO * volumes).mean(-1)
    prior = larger / np.maximum(larger + larger.T, 1e-9)
    return {(a, b): float(prior[i, j]) for i, a in enumerate(NAMES) for j, b in enumerate(NAMES)}


def _paint(rng: np.random.Generator, category: int, size: np.ndarray, place: np.ndarray):
    """Returns an object at (x, y, bottom z, yaw), its colour and texture jittered."""
    prior = CATEGORIES[category]
    jitter = rng.uniform(-1, 1, 7)
    hue, saturation, value = np.array(prior.hsv) + jitter[:3] * (0.015, 0.1, 0.08)
    # Half a turn does not change a box. Yaw is kept in [-pi / 4, 3 pi / 4), whose ends are far
    # from the yaws of objects along walls.
    yaw = (place[3] + np.pi / 4) % np.pi - np.pi / 4
    box = np.round([*place[:2], place[2] + size[2] / 2, *size, 0.0], 3)
    box[6] = round(yaw, 4)
    strength = 1 + 0.2 * jitter[3]
    return RoomObject(
        category,
        colorsys.hsv_to_rgb(hue % 1, saturation, value),
        tuple(strength * weight for weight in prior.pattern),
        prior.period * (1 + 0.15 * jitter[4]),
        tuple(jitter[5:7]),
        box,
    )


# -------------------------------------------------------------------------------------- layout
# Candidates are [k, 4]: x, y, bottom z, yaw.

_TRIES = 32
"""Candidates for the place of an object."""


def _on_floor(rng: np.random.Generator, size: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Returns candidates on the floor, half of them anywhere at any yaw and half along a wall."""
    draw = rng.random((6, _TRIES))
    spread = draw[:2] - 0.5
    # Objects along a wall are turned a little; `_place` rejects those that reach outside.
    wall = (4 * draw[3]).astype(int)
    tilted = (wall % 2) * (np.pi / 2) + 0.2 * (draw[4] - 0.5)
    cos, sin = np.abs(np.cos(tilted)), np.abs(np.sin(tilted))
    reach = np.where(wall < 2, cos, sin) * size[0] + np.where(wall < 2, sin, cos) * size[1]
    inset = room[wall // 2] / 2 - reach / 2 - 0.03 - 0.17 * draw[5]
    inset *= np.where(draw[2] < 0.5, -1, 1)
    flush = np.arange(_TRIES) % 2 == 0
    return np.stack(
        [
            np.where(flush & (wall < 2), inset, spread[0] * room[0]),
            np.where(flush & (wall >= 2), inset, spread[1] * room[1]),
            np.zeros(_TRIES),
            np.where(flush, tilted, 2 * np.pi * draw[4]),
        ],
        axis=1,
    )


def _next_to(rng, size: np.ndarray, anchor: np.ndarray, gaps: tuple[float, float]) -> np.ndarray:
    """Returns candidates on the floor, parallel to the box `anchor`, at a gap within `gaps`."""
    side = rng.integers(4, size=_TRIES)
    turned = rng.integers(2, size=_TRIES)
    half = np.where(turned[:, None] == 0, size[:2], size[1::-1]) / 2
    rows, axis = np.arange(_TRIES), side % 2
    step = anchor[3 + axis] / 2 + half[rows, axis] + rng.uniform(*gaps, _TRIES)
    slide = (anchor[4 - axis] / 2 + half[rows, 1 - axis]) * rng.uniform(-0.6, 0.6, _TRIES)
    local = np.empty((_TRIES, 2))
    local[rows, axis] = np.where(side < 2, step, -step)
    local[rows, 1 - axis] = slide
    cos, sin = np.cos(anchor[6]), np.sin(anchor[6])
    x = anchor[0] + cos * local[:, 0] - sin * local[:, 1]
    y = anchor[1] + sin * local[:, 0] + cos * local[:, 1]
    return np.stack([x, y, np.zeros(_TRIES), anchor[6] + turned * (np.pi / 2)], axis=1)


def _on_top(rng, size: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    """Returns candidates on top of the box `anchor`, with their footprints inside its own."""
    turn = rng.uniform(-np.pi, np.pi, _TRIES)
    cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    reach = np.stack([cos * size[0] + sin * size[1], sin * size[0] + cos * size[1]], 1) / 2
    room = anchor[3:5] / 2 - reach
    local = rng.uniform(-1, 1, (_TRIES, 2)) * np.maximum(room, 0)
    cos, sin = np.cos(anchor[6]), np.sin(anchor[6])
    x = anchor[0] + cos * local[:, 0] - sin * local[:, 1]
    y = anchor[1] + sin * local[:, 0] + cos * local[:, 1]
    top = np.full(_TRIES, anchor[2] + anchor[5] / 2)
    return np.stack([x, y, top, anchor[6] + turn], axis=1)[(room > 0.01).all(-1)]


def _place(candidates, size, placed: np.ndarray, clearance: np.ndarray, room) -> np.ndarray | None:
    """Returns the first candidate in the room that keeps `clearance` [N] from N placed boxes."""
    if not len(candidates):
        return None
    boxes = candidates[:, [0, 1, 2, 2, 2, 2, 3]]
    boxes[:, 3:6] = size
    corners = footprints(boxes)
    inside = np.abs(np.real(corners)).max(0) < room[0] / 2 - 0.01
    inside &= np.abs(np.imag(corners)).max(0) < room[1] / 2 - 0.01
    inside &= candidates[:, 2] + size[2] < room[2] - 0.1
    if len(placed):
        inside &= (footprint_gaps(boxes, placed) >= clearance).all(1)
    good = np.flatnonzero(inside)
    return candidates[good[0]] if len(good) else None


def _choose_categories(rng) -> tuple[list[int], list[int]]:
    """Returns 5 or 6 categories that occur once, and those that occur 2 to 5 times, repeated."""
    order = [int(category) for category in rng.permutation(len(CATEGORIES))]
    repeats = [[3, 2], [4], [5]][int(rng.integers(3))]
    many = [order.pop() for _ in repeats]
    most = MAX_OBJECTS - sum(repeats)
    once = [order.pop() for _ in range(int(rng.integers(5, most + 1)))]
    return once, [c for c, times in zip(many, repeats, strict=True) for _ in range(times)]


def furnish(rng, room: np.ndarray) -> tuple[list[RoomObject], list[tuple[int, int]]]:
    """Returns the objects and contact pairs of a room; a full room gets fewer objects.

    Single objects are paired before anything is placed. For each pair a fair coin decides whether
    the second touches the first (beside it or on top) or stands apart (near or anywhere), so that
    the categories do not predict the answer.
    """
    once, many = _choose_categories(rng)
    coins = [bool(rng.integers(2))]
    coins += [not coins[0], bool(rng.integers(2))]
    # Steps: (category, step of the partner or None, whether to touch it).
    plan: list[tuple[int, int | None, bool]] = []
    for first, touching in zip(range(0, len(once) - 1, 2), coins, strict=False):
        plan += [(once[first], None, False), (once[first + 1], first, touching)]
    rest = [(category, None, False) for category in once[len(plan) :] + many]
    plan += [rest[k] for k in rng.permutation(len(rest))]
    # Objects of one category have nearly the same size.
    categories = np.array([category for category, _, _ in plan])
    like = (categories == categories[:, None]).argmax(1)
    jitter = rng.uniform(-0.06, 0.06, (len(plan), 3)) * np.isin(categories, many)[:, None]
    sizes = tidy_sizes(sample_sizes(rng, categories)[like] * np.exp(jitter))
    objects: list[RoomObject] = []
    pairs, row_of_step = [], {}
    for step, (category, partner, touching) in enumerate(plan):
        size = sizes[step]
        placed = np.array([item.box for item in objects]).reshape(-1, 7)
        clearance = np.full(len(placed), CLEARANCE)
        if partner is None:
            place = _place(_on_floor(rng, size, room), size, placed, clearance, room)
        elif partner in row_of_step:
            anchor = row_of_step[partner]
            place = _place_partner(rng, size, placed, clearance, room, anchor, touching)
            if place is not None:
                pairs.append((anchor, len(objects)))
        else:
            continue
        if place is not None:
            row_of_step[step] = len(objects)
            objects.append(_paint(rng, category, size, place))
    return objects, pairs


def _place_partner(rng, size, placed, clearance, room, anchor: int, touching: bool):
    """Returns a place that touches box `anchor`, or keeps MIN_SEPARATION from it; None if full."""
    box = placed[anchor]
    clearance = clearance.copy()
    if not touching:
        clearance[anchor] = margins.MIN_SEPARATION + 0.01
        near = _next_to(rng, size, box, (margins.MIN_SEPARATION + 0.02, 0.8))
        attempts = [near, _on_floor(rng, size, room)]
        if rng.random() < 0.5:
            attempts.reverse()
    else:
        clearance[anchor] = 0.002
        attempts = [_next_to(rng, size, box, (0.004, 0.016))]
        if rng.random() < 0.4:
            clearance_on_top = clearance.copy()
            clearance_on_top[anchor] = -1
            place = _place(_on_top(rng, size, box), size, placed, clearance_on_top, room)
            if place is not None:
                return place
    for candidates in attempts:
        place = _place(candidates, size, placed, clearance, room)
        if place is not None:
            return place
    return None


# ------------------------------------------------------------------------------------- cameras


def walk(rng, room: np.ndarray, boxes: np.ndarray, views: int = VIEWS):
    """Returns extrinsics [views, 3, 4] and field of view of a camera path; None in a full room.

    Paths have four styles, so that the order in which objects come into view varies: around the
    room facing inwards, turning on one spot, walking across, and a tour from object to object.
    """
    eye, fov = rng.uniform(1.3, 1.7), np.deg2rad(rng.uniform(75, 95))
    free = rng.uniform(-0.5, 0.5, (128, 2)) * (room[:2] - 0.5)
    probes = np.zeros((len(free), 7))
    probes[:, :2] = free
    tall = boxes[:, 2] + boxes[:, 5] / 2 > eye - 0.25
    free = free[(footprint_gaps(probes, boxes) > np.where(tall, 0.35, 0.0)).all(1)]
    if len(free) < 8:
        free = probes[:, :2]
        free = free[(footprint_gaps(probes, boxes[tall]) > 0.35).all(1)]
    if len(free) < 8:
        return None
    style = rng.integers(4)
    pitches = -np.deg2rad(rng.uniform(8, 26, views))
    paths = [_path(rng, style, room, boxes, free, views) for _ in range(_PATHS)]
    spots, yaws = zip(*paths, strict=True)
    positions = np.concatenate([np.array(spots), np.full((_PATHS, views, 1), eye)], axis=-1)
    paths = raycast.camera_poses(positions, np.array(yaws), np.tile(pitches, (_PATHS, 1)))
    return paths[_best_path(paths, boxes, fov)], fov


_PATHS = 8
"""Camera paths of which the best is taken."""
_PREVIEW_SIDE = 7
"""Pixels along a side of the images by which paths are compared."""


def _best_path(paths: np.ndarray, boxes: np.ndarray, fov: float) -> int:
    """Returns the index of the path, of [k, V, 3, 4], that shows most objects.

    Tiny images decide. An object counts fully from three pixels on. A view in which a new object
    appears counts like two objects, so that there is an order of appearance to ask about.
    """
    views = paths.reshape(-1, 3, 4)
    side = _PREVIEW_SIDE
    rays = raycast.pixel_rays(views, raycast.pinhole(fov, side, side), side, side)
    surface = raycast.first_box(boxes, raycast.camera_centres(views), rays)
    pixels = surface.reshape(*paths.shape[:2], -1, 1) == np.arange(len(boxes))
    pixels = pixels.sum(2)  # [k, V, N]
    first = np.where(pixels.any(1), (pixels > 0).argmax(1), -1)
    fresh = (first[:, None] == np.arange(paths.shape[1])[:, None]).any(2).sum(1)
    return int((np.minimum(pixels.sum(1), 3).sum(1) + 6 * fresh).argmax())


def _path(rng, style: int, room, boxes, free, views: int):
    """Returns positions [views, 2] out of `free`, and headings [views], of a random camera path."""
    turn = rng.choice([-1, 1]) * VIEWS / views  # the more views, the smaller the turns between
    steps = np.arange(views)
    if style == 0:  # around the room
        angle = rng.uniform(0, 2 * np.pi) + turn * np.deg2rad(rng.uniform(45, 95)) * steps
        target_spots = 0.36 * room[:2] * np.stack([np.cos(angle), np.sin(angle)], 1)
        spots = _nearest(free, target_spots)
        target = rng.normal(0, 0.12, (views, 2)) * room[:2]
    elif style == 1:  # on one spot
        spots = _nearest(free, free[rng.integers(len(free))] + rng.normal(0, 0.2, (views, 2)))
        yaws = rng.uniform(0, 2 * np.pi) + turn * np.deg2rad(rng.uniform(45, 85)) * steps
        return spots, yaws
    elif style == 2:  # across
        ends = free[rng.integers(len(free), size=(8, 2))]
        ends = ends[np.argmax(((ends[:, 0] - ends[:, 1]) ** 2).sum(-1))]
        spots = _nearest(free, ends[0] + (ends[1] - ends[0]) * steps[:, None] / max(1, views - 1))
        heading = np.arctan2(*(ends[1] - ends[0])[::-1])
        sweep = turn * np.deg2rad(rng.uniform(15, 60)) * (steps - (views - 1) / 2)
        return spots, heading + sweep
    else:  # from object to object
        spots = free[rng.integers(len(free), size=views)]
        target = boxes[np.resize(rng.permutation(len(boxes)), views), :2]
    delta = target - spots
    return spots, np.arctan2(delta[:, 1], delta[:, 0])


def _nearest(free: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Returns the positions out of `free` [n, 2] that are nearest to each of `target` [m, 2]."""
    return free[((free[None] - target[:, None]) ** 2).sum(-1).argmin(1)]
