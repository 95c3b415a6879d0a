"""Real RGB-D folders (`rgbd_folder`) as exports: depth, points, poses, pictures, questions.

- Frames that cannot be used are dropped and counted by reason (`Dropped`).
- The world frame is the folder's own. Gravity is unknown in general, so the direction up, which
  some questions need, is estimated (`estimate_up`) and told in the manifest's notes.
- Colour is resampled to the depth camera's field of view, so that picture and depth map of a view
  show the same; both cameras are taken to stand at the same place with the same axes.
- A scene is a group of views in random order (so that the views' numbers tell nothing), drawn
  from a window of the sequence so that they overlap.
- Splits are by frames: the end of the sequence is held out, first `val`, then `test` (only where
  each gets a full group), so no frame of a training scene is in another split. The room is the
  same: this tests new views, not new rooms.

No VGGT runs here. What stands in for `vggt/tokens` is a fixed function of the measured depth and
of the colour (`patch_tokens`), the same as for the rooms: the tokens contain depth.
"""

import dataclasses
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from geode_jax.bars import progress_bar
from geode_jax.data.raycast import luminance
from geode_jax.data.rgbd_folder import RgbdFolder, open_folder
from geode_jax.data.rgbd_questions import PLACES, Questioner, SeenView
from geode_jax.data.rgbd_sequence import Dropped, RgbdSequence, resized
from geode_jax.data.rooms import TOKEN_WIDTH, patch_tokens
from geode_jax.errors import UserError
from geode_jax.exports import ExportWriter, cameras

VERSION = 1
"""Of what an export of a folder holds; changes when this converter changes."""
HELD_OUT = 0.15
"""Share of the frames that each of val and test gets."""
SLOPE_UNIT = 0.1
"""Change of luminance per pixel that counts as texture slope 1."""
ONE_SURFACE = 0.03
"""Depths that differ by less than this share are taken to lie on one surface."""
STEADY = 0.05
"""Largest spread of depth around a place, relative to its median (10th to 90th percentile)."""
UP_CONE, UP_WIDTH = np.radians(40), np.radians(10)
"""How far up may be from the cameras' mean up, and the width of the search for its mode."""


# ------------------------------------------------------------------------------------ one frame


@dataclasses.dataclass(frozen=True)
class Frame:
    """What the export keeps of a frame. Cells are 2 x 2 to a patch, the pixels of the depth map.

    Attributes:
        depth: [2 gh, 2 gw] float32 metres at the cells' centres, 0 = missing.
        points, normals: [2 gh, 2 gw, 3], world frame; normals face the camera; 0 = unknown.
        tokens: [gh * gw, TOKEN_WIDTH].
        image: [H, W, 3] uint8 over the depth camera's field of view.
        view: what questions are made from.
    """

    depth: np.ndarray
    points: np.ndarray
    normals: np.ndarray
    tokens: np.ndarray
    image: np.ndarray
    view: SeenView


def read_frame(
    source: RgbdSequence,
    name: str,
    patch_grid: tuple[int, int],
    image_side: int,
    world: np.ndarray | None = None,
    square: bool = False,
) -> Frame:
    """Decodes and measures one frame.

    Args:
        source: the sequence.
        name: of the frame.
        patch_grid: (gh, gw).
        image_side: longer side of the picture, about; never larger than the colour image.
        world: [4, 4], a rigid motion from the sequence's world frame to the one that is wanted.
        square: the picture shows the same, squeezed into a square, as InternViT gets its frames.

    Raises:
        Dropped: it cannot be used.
    """
    pose = source.read_pose(name)
    pose = pose if world is None else world @ pose
    depth, color = source.read_depth(name), source.read_color(name)
    height, width = depth.shape
    rows, columns = 2 * patch_grid[0], 2 * patch_grid[1]
    lens = _Lens(depth, source.depth_intrinsic, pose)
    # A cell's depth comes from the middle of the cell alone: a mean over the cell would mix what
    # is near and what is far.
    reach = max(1, min(width, height) // 160)
    v, u = _centres(rows, height), _centres(columns, width)
    cell_depth, points = lens.see(v[:, None], u[None, :], reach)
    normals = _normals(lens, v[:, None], u[None, :], reach, max(2, width // 80))
    _, patch_points = lens.see(
        _centres(patch_grid[0], height)[:, None], _centres(patch_grid[1], width)[None, :], reach
    )
    image = _aligned_image(source, color, (rows, columns), image_side, square)
    colour, contrast, slopes = _texture(image, rows, columns)
    tokens = patch_tokens(
        *(a[None] for a in (points, cell_depth, normals, colour, contrast, slopes, patch_points))
    )
    step = max(1, width // 64)
    _, surface = lens.see(
        np.arange(step // 2, height, step)[:, None], np.arange(step // 2, width, step)[None, :], 0
    )
    seen = SeenView(pose, _places(lens), surface[surface.any(-1)])
    return Frame(
        cell_depth.astype(np.float32), points.astype(np.float32), normals, tokens[0], image, seen
    )


def _centres(cells: int, size: int) -> np.ndarray:
    """Pixel positions [cells] of the middles of equal cells."""
    return (np.arange(cells) + 0.5) * size / cells - 0.5


class _Lens:
    """Depth at positions of one frame's depth image, and the points that it shows."""

    def __init__(self, depth: np.ndarray, intrinsic: np.ndarray, pose: np.ndarray):
        self.depth, self.intrinsic, self.pose = depth, intrinsic, pose

    def window(self, v, u, reach: int) -> np.ndarray:
        """Depths of the pixels around positions, up to `reach` away: [..., pixels]."""
        height, width = self.depth.shape
        rows, columns = _around(v, reach, height), _around(u, reach, width)
        window = self.depth[rows[..., :, None], columns[..., None, :]]
        return window.reshape(*window.shape[:-2], -1)

    def see(self, v, u, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Median depth [...] of the windows at positions and the world points [..., 3] there.

        Where less than half of a window is known: 0 and the origin. Where an edge runs between
        the two middle depths of an even number, the median is the lower: never between surfaces.
        """
        window = self.window(v, u, reach)
        known = (window > 0).sum(-1)
        ordered = np.sort(np.where(window > 0, window, np.inf), axis=-1)
        ordered = np.where(known[..., None] > 0, ordered, 0)
        low, high = (
            np.take_along_axis(ordered, np.maximum(known - k, 0)[..., None] // 2, axis=-1)[..., 0]
            for k in (1, 0)
        )
        depth = np.where(high < (1 + ONE_SURFACE) * low, low + (high - low) / 2, low)
        depth = np.where(2 * known >= window.shape[-1], depth, 0).astype(np.float64)
        (fx, _, cx), (_, fy, cy), _ = self.intrinsic
        camera = np.stack([(u - cx) / fx * depth, (v - cy) / fy * depth, depth], axis=-1)
        world = camera @ self.pose[:3, :3].T + self.pose[:3, 3]
        return depth, np.where(depth[..., None] > 0, world, 0)


def _around(position, reach: int, size: int) -> np.ndarray:
    """Pixels [..., n] that lie evenly around positions [...], clipped to the image.

    Cells of an even size have their centres between two pixels: then n is even.
    """
    position = np.asarray(position, np.float64)
    between = reach > 0 and bool((position % 1 == 0.5).all())
    first = position - reach + 0.5 if between else np.floor(position + 0.5) - reach
    pixels = first[..., None].astype(int) + np.arange(2 * reach + (not between))
    return np.clip(pixels, 0, size - 1)


def _normals(lens: _Lens, v, u, reach: int, step: int) -> np.ndarray:
    """Unit normals [..., 3] facing the camera, from the four points `step` pixels around."""
    (left, a), (right, b) = lens.see(v, u - step, reach), lens.see(v, u + step, reach)
    (upper, c), (lower, d) = lens.see(v - step, u, reach), lens.see(v + step, u, reach)
    normal = np.cross(d - c, b - a)  # y down x x right = -z: towards the camera
    length = np.linalg.norm(normal, axis=-1)
    known = (np.minimum(np.minimum(left, right), np.minimum(upper, lower)) > 0) & (length > 0)
    normal = normal / np.where(known, length, 1)[..., None]
    return np.where(known[..., None], normal, 0).astype(np.float32)


def _places(lens: _Lens) -> dict[str, np.ndarray]:
    """Points of the places around which the depth is known and steady."""
    height, width = lens.depth.shape
    reach = max(2, width // 80)
    places = {}
    for name, (across, down) in PLACES.items():
        v, u = down * height - 0.5, across * width - 0.5
        window = lens.window(v, u, reach)
        known = window[window > 0]
        if len(known) < 0.9 * len(window):
            continue
        low, middle, high = np.percentile(known, (10, 50, 90))
        if high - low <= STEADY * middle:
            places[name] = lens.see(v, u, reach)[1]
    return places


def _aligned_image(
    source: RgbdSequence, color: Image.Image, cells: tuple[int, int], side: int, square: bool
) -> np.ndarray:
    """Colour over exactly the depth camera's field of view; black where colour saw nothing.

    Sides are multiples of the cells, so that cells are whole pixels.
    """
    k_depth, (width, height) = source.depth_intrinsic, source.depth_size
    k_color = source.color_intrinsic
    if k_color is None:
        k_color = resized(k_depth, source.depth_size, color.size)
    scale = min(1.0, side / max(width, height), max(color.size) / max(width, height))
    wanted = ((width, cells[1]), (height, cells[0]))
    if square:
        wanted = ((max(width, height), math.lcm(*cells)),) * 2
    out = [max(1, round(n * scale / c)) * c for n, c in wanted]
    image = Image.new("RGB", tuple(out))
    source_box, target_box = [], []
    for axis, (size, limit) in enumerate(zip((width, height), color.size, strict=True)):
        # Edges of the depth image as rays, and those as positions between the colour's pixels.
        rays = (np.array([-0.5, size - 0.5]) - k_depth[axis, 2]) / k_depth[axis, axis]
        edges = rays * k_color[axis, axis] + k_color[axis, 2] + 0.5
        inside = np.clip(edges, 0, limit)
        spans = np.round((inside - edges[0]) / (edges[1] - edges[0]) * out[axis]).astype(int)
        source_box.append(inside)
        target_box.append(spans)
    (left, right), (upper, lower) = target_box
    if right > left and lower > upper:
        box = tuple(float(source_box[axis][end]) for end in (0, 1) for axis in (0, 1))
        part = color.resize((right - left, lower - upper), Image.Resampling.BILINEAR, box=box)
        image.paste(part, (int(left), int(upper)))
    return np.asarray(image)


def _texture(image: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Mean colour, standard deviation and mean absolute slopes of the luminance of every cell."""
    height, width = image.shape[:2]
    colour = image.astype(np.float32) / 255
    light = luminance(colour)
    slopes = np.abs(np.stack([np.gradient(light, axis=1), np.gradient(light, axis=0)], axis=-1))

    def cells(pixels):
        tiles = pixels.reshape(rows, height // rows, columns, width // columns, -1)
        return tiles.swapaxes(1, 2).reshape(rows, columns, -1, tiles.shape[-1])

    return cells(colour).mean(2), cells(light).std(2)[..., 0], cells(slopes).mean(2) / SLOPE_UNIT


# ----------------------------------------------------------------------------------- the export


def estimate_up(poses: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """The direction against gravity, a unit vector [3].

    Cameras are held roughly upright, so their mean up is near it; floors, tables and ceilings give
    the rest: the densest direction of the normals (either sign) within UP_CONE of that mean,
    found by mean shift. Without such surfaces it stays the mean.

    Args:
        poses: world-from-camera [n, 4, 4], OpenCV axes.
        normals: [m, 3] unit normals of seen surfaces, world frame; zeros are ignored.
    """
    up = -poses[:, :3, 1].sum(0)
    up /= max(np.linalg.norm(up), 1e-9)
    normals = normals[normals.any(-1)].astype(np.float64)
    normals = normals * np.where(normals @ up < 0, -1, 1)[:, None]
    level = normals[normals @ up > np.cos(UP_CONE)]
    if len(level) == 0:
        return up
    starts = level[:: max(1, len(level) // 200)]
    crowd = (starts @ level.T > np.cos(UP_WIDTH)).sum(1)
    up = starts[np.argmax(crowd)]
    for _ in range(10):
        up = level[level @ up > np.cos(UP_WIDTH)].mean(0)
        up /= np.linalg.norm(up)
    return up


def split_frames(count: int, views: int) -> dict[str, range]:
    """Positions of the frames of each split: the end of the sequence is held out.

    Test exists where val and test can both have `views` frames and train three times as many;
    otherwise there is only val, with at most half of the frames.
    """
    held = max(views, round(HELD_OUT * count))
    if count >= 5 * views:
        train, val = count - 2 * held, count - held
        return {"train": range(train), "val": range(train, val), "test": range(val, count)}
    train = count - min(views, count // 2)
    return {"train": range(train), "val": range(train, count)}


def group_views(
    frames: range, views: int, scenes: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Up to `scenes` different groups of `views` frames in random order.

    The groups start evenly over the frames; each is drawn from a window of three times its size.
    """
    views = min(views, len(frames))
    groups: dict[tuple[int, ...], None] = {}
    for start in np.linspace(0, len(frames) - views, scenes).round().astype(int):
        window = frames[start : start + 3 * views]
        for _ in range(20):  # a short sequence may not have as many different groups
            others = rng.choice(window[1:], views - 1, replace=False)
            group = tuple(int(n) for n in rng.permutation([window[0], *others]))
            if group not in groups:
                groups[group] = None
                break
    return list(groups)


def make_rgbd_export(
    folder_in: str | Path,
    folder_out: str | Path,
    *,
    views_per_scene: int = 4,
    patch_grid: tuple[int, int] = (8, 8),
    questions_per_scene: int = 24,
    scenes_per_frame: int = 2,
    max_frames: int = 300,
    image_side: int = 448,
    intrinsic: tuple[float, float, float, float] | None = None,
    depth_scale: float = 1000.0,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Converts an RGB-D folder; see the module's docstring.

    Writes `vggt/tokens`, `vggt/depth`, `vggt/points`, `camera/*`, `images`, `target/depth` and no
    boxes; depth maps are [V, 2 gh, 2 gw].

    Args:
        folder_in: see `open_folder`.
        folder_out: absent, empty, or an unfinished export of the same folder.
        views_per_scene: V; fewer where a split has fewer frames.
        patch_grid: (gh, gw).
        questions_per_scene: at most.
        scenes_per_frame: how many scenes each split gets for each of its frames.
        max_frames: longer sequences are thinned out evenly to this many.
        image_side: longer side of `images`, about.
        intrinsic, depth_scale: see `open_folder`.
        seed: the content depends on it, on the folder and on the arguments, on nothing else.
        progress: show a progress bar and the summary on stderr.

    Returns:
        {"frames": {"found", "thinned_out", "used", "dropped": {reason: count}}, "scenes": {split:
        count}, "questions": {split: {kind: count}}, "up": [x, y, z], "notes": [what was corrected
        on reading, a line each], "warnings": [what shows wrong cameras, see `cameras.Watch`]}.

    Raises:
        UserError: the folder is no RGB-D folder or has less than two usable frames.
        ExportError: the export cannot be written.
    """
    sizes = (views_per_scene, *patch_grid, questions_per_scene, scenes_per_frame, image_side)
    if min(sizes) < 1 or max_frames < 2 or seed < 0:
        raise UserError("rgbd: sizes must be at least 1, max_frames at least 2, seed at least 0")
    source = open_folder(folder_in, intrinsic, depth_scale)
    frames, account = _read_frames(source, patch_grid, image_side, max_frames, progress)
    poses = np.array([frame.view.world_from_camera for frame in frames])
    up = estimate_up(poses, np.concatenate([frame.normals.reshape(-1, 3) for frame in frames]))
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(folder_in).resolve().name)[:64]
    summary = {"frames": account, "scenes": {}, "questions": {}, "up": up.round(4).tolist()}
    summary["notes"] = list(source.notes)
    with ExportWriter(
        folder_out,
        producer={
            "project": "geode_jax RGB-D folder",
            "commit": f"sources version {VERSION}",
            "weights": "none: tokens are a fixed function of the measured depth and the colour",
            "licence": f"that of the data in {name}",
        },
        dtype="float16",
        scale="metric",
        token_width=TOKEN_WIDTH,
        patch_grid=patch_grid,
        tokens_contain_depth=True,
        categories=[],
        notes=_notes(name, summary),
    ) as writer:
        watch = cameras.Watch(metric=True)
        rng = np.random.default_rng(seed)
        plan = [
            (split, group_views(places, views_per_scene, scenes_per_frame * len(places), rng))
            for split, places in split_frames(len(frames), views_per_scene).items()
        ]
        total, made = sum(len(groups) for _, groups in plan), 0
        with progress_bar(total=total, desc="scenes", unit="scene", disable=not progress) as bar:
            for split, groups in plan:
                used = sorted({n for group in groups for n in group})
                questioner = Questioner([frames[n].view for n in used], up, rng)
                counts: Counter = Counter()
                for group in groups:
                    scene_id = f"{name}_{made:04d}"
                    chosen = [frames[n] for n in group]
                    arrays = frame_arrays(source, chosen)
                    watch.add(arrays)
                    writer.add_scene(scene_id, arrays, split=split)
                    records = questioner.ask(
                        scene_id, [frame.view for frame in chosen], questions_per_scene
                    )
                    writer.add_questions(records)
                    counts.update(record["kind"] for record in records)
                    made += 1
                    bar.update()
                summary["scenes"][split] = len(groups)
                summary["questions"][split] = dict(sorted(counts.items()))
    summary["warnings"] = watch.lines()
    if progress:
        warnings = (f"warning: {line}" for line in summary["warnings"])
        print(_account(summary), *warnings, sep="\n", file=sys.stderr)
    return summary


def _read_frames(
    source: RgbdFolder, patch_grid: tuple[int, int], image_side: int, most: int, progress: bool
) -> tuple[list[Frame], dict]:
    """All usable frames of the (thinned out) sequence, and what became of the others."""
    names = source.names
    if len(names) > most:
        names = [names[n] for n in np.linspace(0, len(names) - 1, most).round().astype(int)]
    frames, dropped = [], Counter()
    for name in progress_bar(names, desc="frames", unit="frame", disable=not progress):
        try:
            frames.append(read_frame(source, name, patch_grid, image_side))
        except Dropped as reason:
            dropped[str(reason)] += 1
    if len(frames) < 2:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        rule = f"{len(frames)} of {len(names)} frames usable, at least 2 are needed"
        raise UserError(f"{source.folder}: {rule}" + (f" ({why})" if why else ""))
    return frames, {
        "found": len(source.names),
        "thinned_out": len(source.names) - len(names),
        "used": len(frames),
        "dropped": dict(sorted(dropped.items())),
    }


def frame_arrays(source: RgbdSequence, frames: Sequence[Frame]) -> dict[str, np.ndarray]:
    """A scene's tensors of its views, as `exports` names them."""
    poses = np.array([frame.view.world_from_camera for frame in frames])
    rotation = poses[:, :3, :3].swapaxes(1, 2)
    extrinsic = np.concatenate([rotation, -rotation @ poses[:, :3, 3:]], axis=2)
    depth = np.array([frame.depth for frame in frames])
    intrinsic = resized(source.depth_intrinsic, source.depth_size, depth.shape[:0:-1])
    return {
        "vggt/tokens": np.array([frame.tokens for frame in frames]),
        "vggt/depth": depth,
        "vggt/points": np.array([frame.points for frame in frames]),
        "camera/extrinsic": extrinsic.astype(np.float32),
        "camera/intrinsic": np.repeat(intrinsic[None], len(frames), 0).astype(np.float32),
        "images": np.array([frame.image for frame in frames]),
        "target/depth": depth.copy(),
    }


def _account(summary: dict) -> str:
    """What became of the frames, and what was corrected, in one line."""
    frames = summary["frames"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in frames["dropped"].items())
    found = (
        f"{frames['found']} frames: {frames['used']} used, {frames['thinned_out']} thinned out, "
        f"{sum(frames['dropped'].values())} dropped" + (f" ({dropped})" if dropped else "")
    )
    return "; ".join([found, *summary["notes"]])


def _notes(name: str, summary: dict) -> str:
    x, y, z = summary["up"]
    return (
        f"RGB-D folder {name}. {_account(summary)}. No VGGT: the tokens are a fixed function of "
        "the measured depth and the colour, so they CONTAIN THE DEPTH that depth metrics score. "
        f"World frame: the folder's own; up is estimated as ({x}, {y}, {z}). Splits are by "
        "frames, the end of the sequence held out: new views of the same place."
    )
