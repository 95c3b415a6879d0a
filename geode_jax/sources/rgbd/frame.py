"""A frame of an RGB-D sequence as arrays of the contract."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from geode_jax.sources.rgbd.intrinsics import resized
from geode_jax.sources.rgbd.questions import PLACES, SeenView
from geode_jax.sources.rgbd.sequence import Dropped, RgbdSequence
from geode_jax.sources.rooms.raycast import luminance
from geode_jax.sources.stand_ins import patch_tokens

SLOPE_UNIT = 0.1
"""Change of luminance per pixel that corresponds to a texture slope of 1."""
SAME_SURFACE_RATIO = 0.03
"""Depths that differ by less than this share are taken to lie on one surface."""
MAX_DEPTH_SPREAD = 0.05
"""Largest spread of depth around a place (10th to 90th percentile), relative to its median."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """What the export keeps of a frame.

    A cell is a pixel of the exported depth map; a patch has 2 x 2 cells.

    Attributes:
        depth: [2 gh, 2 gw] float32 metres at the cells' centres, 0 = missing.
        points: [2 gh, 2 gw, 3] metres, world frame; 0 = unknown.
        normals: [2 gh, 2 gw, 3] unit vectors towards the camera, world frame; 0 = unknown.
        tokens: [gh * gw, TOKEN_WIDTH].
        image: [h, w, 3] uint8 over the depth camera's field of view.
        intrinsic: [3, 3] in pixels of the exported depth map, pixel centres at integers.
        view: what questions are made from.
    """

    depth: np.ndarray
    points: np.ndarray
    normals: np.ndarray
    tokens: np.ndarray
    image: np.ndarray
    intrinsic: np.ndarray
    view: SeenView


def read_frame(
    source: RgbdSequence,
    name: str,
    patch_grid: tuple[int, int],
    image_side: int,
    world: np.ndarray | None = None,
    square: bool = False,
) -> Frame:
    """Returns one frame, decoded and measured.

    Args:
        source: the sequence.
        name: the frame's name.
        patch_grid: (gh, gw).
        image_side: approximate longer side of the picture; at most that of the colour image.
        world: [4, 4] rigid motion from the sequence's world frame to the exported one.
        square: whether the picture is squeezed into a square, the shape of InternViT's inputs.

    Raises:
        Dropped: the frame cannot be used.
    """
    pose = source.read_pose(name)
    pose = pose if world is None else world @ pose
    intrinsic, color_intrinsic = source.read_cameras(name)
    depth, color = source.read_depth(name), source.read_color(name)
    height, width = depth.shape
    rows, columns = 2 * patch_grid[0], 2 * patch_grid[1]
    sampler = _DepthSampler(depth, intrinsic, pose)
    # A cell's depth comes from the middle of the cell: a mean over the cell would mix near and far
    # surfaces.
    reach = max(1, min(width, height) // 160)
    v, u = _centres(rows, height), _centres(columns, width)
    cell_depth, points = sampler.at(v[:, None], u[None, :], reach)
    normals = _normals(sampler, v[:, None], u[None, :], reach, max(2, width // 80))
    _, patch_points = sampler.at(
        _centres(patch_grid[0], height)[:, None], _centres(patch_grid[1], width)[None, :], reach
    )
    image = _aligned_image(
        color, color_intrinsic, intrinsic, (width, height), (rows, columns), image_side, square
    )
    colour, contrast, slopes = _texture(image, rows, columns)
    tokens = patch_tokens(
        *(a[None] for a in (points, cell_depth, normals, colour, contrast, slopes, patch_points))
    )
    step = max(1, width // 64)
    _, surface = sampler.at(
        np.arange(step // 2, height, step)[:, None], np.arange(step // 2, width, step)[None, :], 0
    )
    seen = SeenView(pose, _places(sampler), surface[surface.any(-1)])
    return Frame(
        cell_depth.astype(np.float32),
        points.astype(np.float32),
        normals,
        tokens[0],
        image,
        resized(intrinsic, (width, height), (columns, rows)),
        seen,
    )


def spread_frames(
    source: RgbdSequence,
    views: int,
    patch_grid: tuple[int, int],
    image_side: int,
    world: np.ndarray | None,
    dropped: Counter[str],
) -> list[Frame]:
    """Returns frames spread evenly over those with a pose; a neighbour replaces a broken one.

    The pictures are square.

    Args:
        source: the sequence.
        views: largest number of frames.
        patch_grid, image_side, world: see `read_frame`.
        dropped: gets the counts of the frames that cannot be used, by reason.
    """
    tracked = []
    for name in source.names:
        try:
            source.read_pose(name)
            tracked.append(name)
        except Dropped as reason:
            dropped[f"frame: {reason}"] += 1
    frames = []
    for part in np.array_split(tracked, min(views, len(tracked)) or 1):
        middle = len(part) // 2
        for n in sorted(range(len(part)), key=lambda n: abs(n - middle)):
            try:
                name = str(part[n])
                frames.append(read_frame(source, name, patch_grid, image_side, world, square=True))
                break
            except Dropped as reason:
                dropped[f"frame: {reason}"] += 1
    return frames


def _centres(cells: int, size: int) -> np.ndarray:
    """Returns the pixel positions [cells] of the middles of equal cells."""
    return (np.arange(cells) + 0.5) * size / cells - 0.5


class _DepthSampler:
    """Depths and world points at positions of one frame's depth image."""

    def __init__(self, depth: np.ndarray, intrinsic: np.ndarray, pose: np.ndarray):
        self.depth, self.intrinsic, self.pose = depth, intrinsic, pose

    def window(self, v, u, reach: int) -> np.ndarray:
        """Returns the depths [..., pixels] of the pixels up to `reach` away from positions."""
        height, width = self.depth.shape
        rows, columns = _around(v, reach, height), _around(u, reach, width)
        window = self.depth[rows[..., :, None], columns[..., None, :]]
        return window.reshape(*window.shape[:-2], -1)

    def at(self, v, u, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the median depth [...] of windows at positions, and the world points [..., 3].

        They are 0 and the origin where less than half of a window is known. Where the two middle
        depths of an even number lie on different surfaces, the median is the lower of them, so
        that it is never between surfaces.
        """
        window = self.window(v, u, reach)
        known = (window > 0).sum(-1)
        ordered = np.sort(np.where(window > 0, window, np.inf), axis=-1)
        ordered = np.where(known[..., None] > 0, ordered, 0)
        low, high = (
            np.take_along_axis(ordered, np.maximum(known - k, 0)[..., None] // 2, axis=-1)[..., 0]
            for k in (1, 0)
        )
        depth = np.where(high < (1 + SAME_SURFACE_RATIO) * low, low + (high - low) / 2, low)
        depth = np.where(2 * known >= window.shape[-1], depth, 0).astype(np.float64)
        (fx, _, cx), (_, fy, cy), _ = self.intrinsic
        camera = np.stack([(u - cx) / fx * depth, (v - cy) / fy * depth, depth], axis=-1)
        world = camera @ self.pose[:3, :3].T + self.pose[:3, 3]
        return depth, np.where(depth[..., None] > 0, world, 0)


def _around(position, reach: int, size: int) -> np.ndarray:
    """Returns the pixels [..., n] evenly around positions [...], clipped to the image.

    If all positions are halfway between two pixels, n is even.
    """
    position = np.asarray(position, np.float64)
    between = reach > 0 and bool((position % 1 == 0.5).all())
    first = position - reach + 0.5 if between else np.floor(position + 0.5) - reach
    pixels = first[..., None].astype(int) + np.arange(2 * reach + (not between))
    return np.clip(pixels, 0, size - 1)


def _normals(sampler: _DepthSampler, v, u, reach: int, step: int) -> np.ndarray:
    """Returns unit normals [..., 3] facing the camera, from the four points `step` pixels away."""
    (left, a), (right, b) = sampler.at(v, u - step, reach), sampler.at(v, u + step, reach)
    (upper, c), (lower, d) = sampler.at(v - step, u, reach), sampler.at(v + step, u, reach)
    normal = np.cross(d - c, b - a)  # y (down) times x (right) is -z, towards the camera
    length = np.linalg.norm(normal, axis=-1)
    known = (np.minimum(np.minimum(left, right), np.minimum(upper, lower)) > 0) & (length > 0)
    normal = normal / np.where(known, length, 1)[..., None]
    return np.where(known[..., None], normal, 0).astype(np.float32)


def _places(sampler: _DepthSampler) -> dict[str, np.ndarray]:
    """Returns name -> world point of the places around which the depth is known and uniform."""
    height, width = sampler.depth.shape
    reach = max(2, width // 80)
    places = {}
    for name, (across, down) in PLACES.items():
        v, u = down * height - 0.5, across * width - 0.5
        window = sampler.window(v, u, reach)
        known = window[window > 0]
        if len(known) < 0.9 * len(window):
            continue
        low, middle, high = np.percentile(known, (10, 50, 90))
        if high - low <= MAX_DEPTH_SPREAD * middle:
            places[name] = sampler.at(v, u, reach)[1]
    return places


def _aligned_image(
    color: Image.Image,
    k_color: np.ndarray | None,
    k_depth: np.ndarray,
    depth_size: tuple[int, int],
    cells: tuple[int, int],
    side: int,
    square: bool,
) -> np.ndarray:
    """Returns the colour image resampled to exactly the depth camera's field of view.

    Black where the colour camera saw nothing. Sides are multiples of the cells, so that cells are
    whole pixels.
    """
    width, height = depth_size
    if k_color is None:
        k_color = resized(k_depth, depth_size, color.size)
    scale = min(1.0, side / max(width, height), max(color.size) / max(width, height))
    rows, columns = cells
    if square:
        width = height = max(width, height)
        rows = columns = math.lcm(*cells)
    out = (
        max(1, round(width * scale / columns)) * columns,
        max(1, round(height * scale / rows)) * rows,
    )
    image = Image.new("RGB", out)
    source_box, target_box = [], []
    for axis, (size, limit) in enumerate(zip(depth_size, color.size, strict=True)):
        # The depth image's edges as rays, then as positions in the colour image.
        rays = (np.array([-0.5, size - 0.5]) - k_depth[axis, 2]) / k_depth[axis, axis]
        edges = rays * k_color[axis, axis] + k_color[axis, 2] + 0.5
        inside = np.clip(edges, 0, limit)
        spans = np.round((inside - edges[0]) / (edges[1] - edges[0]) * out[axis]).astype(int)
        source_box.append(inside)
        target_box.append(spans)
    (left, right), (upper, lower) = target_box
    if right > left and lower > upper:
        (x0, x1), (y0, y1) = ((float(a), float(b)) for a, b in source_box)
        part = color.resize(
            (right - left, lower - upper), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)
        )
        image.paste(part, (int(left), int(upper)))
    return np.asarray(image)


def _texture(image: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Returns every cell's mean colour, and its luminance's standard deviation and mean slopes."""
    height, width = image.shape[:2]
    colour = image.astype(np.float32) / 255
    light = luminance(colour)
    slopes = np.abs(np.stack([np.gradient(light, axis=1), np.gradient(light, axis=0)], axis=-1))

    def cells(pixels):
        tiles = pixels.reshape(rows, height // rows, columns, width // columns, -1)
        return tiles.swapaxes(1, 2).reshape(rows, columns, -1, tiles.shape[-1])

    return cells(colour).mean(2), cells(light).std(2)[..., 0], cells(slopes).mean(2) / SLOPE_UNIT


def frame_arrays(frames: Sequence[Frame]) -> dict[str, np.ndarray]:
    """Returns a scene's tensors of its views, named as in the array contract."""
    poses = np.array([frame.view.world_from_camera for frame in frames])
    rotation = poses[:, :3, :3].swapaxes(1, 2)
    extrinsic = np.concatenate([rotation, -rotation @ poses[:, :3, 3:]], axis=2)
    depth = np.array([frame.depth for frame in frames])
    return {
        "vggt/tokens": np.array([frame.tokens for frame in frames]),
        "vggt/depth": depth,
        "vggt/points": np.array([frame.points for frame in frames]),
        "camera/extrinsic": extrinsic.astype(np.float32),
        "camera/intrinsic": np.array([frame.intrinsic for frame in frames], np.float32),
        "images": np.array([frame.image for frame in frames]),
        "target/depth": depth.copy(),
    }
