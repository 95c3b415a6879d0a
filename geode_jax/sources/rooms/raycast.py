"""Rays, oriented boxes and surfaces of a rectangular room, in plain numpy.

Conventions. World: metres, z up, floor at z = 0, origin at the centre of the floor. A box is
(centre x, y, z, size x, y, z, yaw), yaw in radians about z; every box stands upright, so a box is
its footprint (a rotated rectangle) times a height interval. A room is (size x, size y, size z).
Cameras are camera-from-world [V, 3, 4] with OpenCV axes; pixel centres are integers, so the image
spans [-0.5, width - 0.5]. Ray directions have camera z = 1, hence the ray parameter IS the depth.

Dimension key: N boxes, V views, R rays of a view, S = N + 6 surfaces (the boxes, then floor,
ceiling, and the walls at -x, +x, -y, +y).
"""

import dataclasses

import numpy as np

FLOOR, CEILING, WALLS = 0, 1, slice(2, 6)
"""Positions of the room's own surfaces after the N boxes."""
STRUCTURES = 6

_LIGHT = (np.array([0.35, 0.25, 0.9]) / np.linalg.norm([0.35, 0.25, 0.9])).astype(np.float32)
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_TINY = np.float32(1e-30)
"""Stands for a ray's component that is exactly zero."""


# ------------------------------------------------------------------------------------- boxes


# In the horizontal plane points are complex numbers x + iy: a rotation is one multiplication.


# ----------------------------------------------------------------------------------- cameras


def look(positions: np.ndarray, yaw: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Camera-from-world [..., 3, 4] of cameras without roll.

    Args:
        positions: [..., 3].
        yaw: [...] heading in radians, 0 = along x, anticlockwise.
        pitch: [...] radians, negative looks down.
    """
    cos, sin = np.cos(yaw), np.sin(yaw)
    level, up = np.cos(pitch), np.sin(pitch)
    right = [sin, -cos, np.zeros_like(cos)]
    down = [up * cos, up * sin, -level]
    forward = [level * cos, level * sin, up]
    rotation = np.moveaxis(np.array([right, down, forward]), (0, 1), (-2, -1))
    return np.concatenate([rotation, -rotation @ positions[..., None]], axis=-1)


def pinhole(fov: float, height: int, width: int) -> np.ndarray:
    """Intrinsic [3, 3] of a horizontal field of view `fov` (radians), square pixels."""
    focal = width / 2 / np.tan(fov / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def camera_centres(extrinsic: np.ndarray) -> np.ndarray:
    """World positions [V, 3] of cameras [V, 3, 4]."""
    return -np.einsum("vji,vj->vi", extrinsic[:, :, :3], extrinsic[:, :, 3])


def pixel_rays(extrinsic: np.ndarray, intrinsic: np.ndarray, height: int, width: int):
    """World ray directions with camera z = 1 through all pixel centres, [V, height * width, 3]."""
    v, u = np.mgrid[:height, :width].reshape(2, -1).astype(np.float64)
    ones = np.ones_like(u)
    pixels = np.stack([u, v, ones], axis=-1)
    # Row vectors: the world direction R^T c of a camera direction c is c R.
    return (pixels @ np.linalg.inv(intrinsic).T) @ extrinsic[:, :, :3]


# ---------------------------------------------------------------------------------- ray casting


@dataclasses.dataclass(frozen=True)
class Hits:
    """What each ray meets first; all arrays [V, R, ...].

    Attributes:
        depth: camera z of the hit, metres.
        surface: which surface, 0..N-1 a box, N + k the k-th of the room's six surfaces.
        normal: unit normal of the face, world frame, towards the camera's side.
        point: the hit in the world, metres.
        plane: coordinates on the face in metres (horizontal, vertical; x, y on level faces),
            in the frame of the box or of the room.
    """

    depth: np.ndarray
    surface: np.ndarray
    normal: np.ndarray
    point: np.ndarray
    plane: np.ndarray


def cast(boxes: np.ndarray, room: np.ndarray, origins: np.ndarray, rays: np.ndarray) -> Hits:
    """First hit of rays [V, R, 3] from origins [V, 3], which lie in the room and in no box.

    In float32: micrometres in a room, and half the time of float64.
    """
    count = len(boxes)
    boxes, room, origins, rays = (a.astype(np.float32) for a in (boxes, room, origins, rays))
    wall_depth, wall_axis, structure = _leave_room(room, origins, rays)
    box_depth, box_axis, nearest = _enter_boxes(boxes, origins, rays)
    on_box = box_depth < wall_depth
    depth = np.where(on_box, box_depth, wall_depth)
    face = np.where(on_box, box_axis, wall_axis)
    point = origins[:, None] + depth[..., None] * rays
    # The room is one more frame, at the world's origin.
    frames = np.concatenate([boxes, np.zeros_like(boxes, shape=(1, 7))])
    frame = np.where(on_box, nearest, count)
    cos, sin = np.cos(frames[:, 6])[frame], np.sin(frames[:, 6])[frame]
    return Hits(
        depth,
        np.where(on_box, nearest, count + structure),
        _face_normals(face, cos, sin, rays),
        point,
        _face_plane(face, cos, sin, point - frames[frame, :3]),
    )


def first_box(boxes: np.ndarray, origins: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Index of the first box on each ray, -1 = none, [V, R]: `cast` without the details."""
    depth, _, nearest = _enter_boxes(*(a.astype(np.float32) for a in (boxes, origins, rays)))
    return np.where(np.isfinite(depth), nearest, -1)


def _enter_boxes(boxes: np.ndarray, origins: np.ndarray, rays: np.ndarray):
    """Depth (inf = none), axis of the face and index of the first box on each ray, [V, R] each.

    Slab method: in the frame of a box a ray is inside between the last entry into and the first
    exit from the three pairs of faces.
    """
    if not len(boxes):
        nothing = np.zeros(rays.shape[:2], int)
        return np.full_like(rays[..., 0], np.inf), nothing, nothing
    # Box frames: move to the centre, rotate about z by -yaw. Arrays are [N, V, R].
    cos, sin = np.cos(boxes[:, 6])[:, None, None], np.sin(boxes[:, 6])[:, None, None]
    x, y, z = np.moveaxis(origins - boxes[:, None, :3], -1, 0)[..., None]
    starts = (cos * x + sin * y, cos * y - sin * x, z)
    x, y, z = (np.ascontiguousarray(rays[..., k]) for k in range(3))
    alongs = (cos * x + sin * y, cos * y - sin * x, z)
    nears, leave = [], np.float32(np.inf)
    for k, (start, along) in enumerate(zip(starts, alongs, strict=True)):
        inverse = 1 / np.where(along == 0, _TINY, along)
        middle = -start * inverse
        reach = np.abs(inverse) * (boxes[:, 3 + k] / 2)[:, None, None]
        nears.append(middle - reach)
        leave = np.minimum(leave, middle + reach)
    entry = np.maximum(np.maximum(nears[0], nears[1]), nears[2])
    entry = np.where((entry <= leave) & (entry > 0), entry, np.float32(np.inf))
    nearest = entry.argmin(0)
    entry, *nears = (np.take_along_axis(a, nearest[None], 0)[0] for a in (entry, *nears))
    axis = np.where(nears[0] >= np.maximum(nears[1], nears[2]), 0, 2 - (nears[1] >= nears[2]))
    return entry, axis, nearest


def _leave_room(room: np.ndarray, origins: np.ndarray, rays: np.ndarray):
    """Depth, axis and structure (0 floor to 5 wall at +y) where each ray ends, [V, R] each."""
    low, high = room * np.float32([-0.5, -0.5, 0]), room * np.float32([0.5, 0.5, 1])
    x, y, z = (
        (np.where(ray > 0, up, down) - start[:, None]) / np.where(ray == 0, _TINY, ray)
        for ray, down, up, start in zip(np.moveaxis(rays, -1, 0), low, high, origins.T, strict=True)
    )
    depth = np.minimum(np.minimum(x, y), z)
    axis = np.where(z == depth, 2, np.where(y == depth, 1, 0))
    forward = np.take_along_axis(rays, axis[..., None], -1)[..., 0] > 0
    return depth, axis, np.where(axis == 2, 0, 2 + 2 * axis) + forward


def _face_normals(face: np.ndarray, cos: np.ndarray, sin: np.ndarray, rays: np.ndarray):
    """World normals [V, R, 3] of the faces across local axis `face`, turned against the rays."""
    x = np.where(face == 0, cos, np.where(face == 1, -sin, np.float32(0)))
    y = np.where(face == 0, sin, np.where(face == 1, cos, np.float32(0)))
    z = np.where(face == 2, np.float32(1), np.float32(0))
    facing = x * rays[..., 0] + y * rays[..., 1] + z * rays[..., 2]
    return (
        np.stack([x, y, z], axis=-1)
        * np.where(facing > 0, np.float32(-1), np.float32(1))[..., None]
    )


def _face_plane(face: np.ndarray, cos: np.ndarray, sin: np.ndarray, offset: np.ndarray):
    """Coordinates [V, R, 2] on the faces across local axis `face` of world offsets [V, R, 3]."""
    x = cos * offset[..., 0] + sin * offset[..., 1]
    y = cos * offset[..., 1] - sin * offset[..., 0]
    return np.stack([np.where(face == 0, y, x), np.where(face == 2, y, offset[..., 2])], axis=-1)


# -------------------------------------------------------------------------------- appearance


@dataclasses.dataclass(frozen=True)
class Looks:
    """Appearance of the S surfaces.

    Attributes:
        colour: [S, 3] albedo in [0, 1].
        pattern: [S, 3] weights (a, b, c) of the texture
            a cos(2 pi x / p) + b cos(2 pi y / p) + c cos(2 pi x / p) cos(2 pi y / p).
        period: [S] p, metres.
        phase: [S, 2] shift of the texture, metres.
    """

    colour: np.ndarray
    pattern: np.ndarray
    period: np.ndarray
    phase: np.ndarray


def shade(hits: Hits, looks: Looks) -> tuple[np.ndarray, np.ndarray]:
    """Colour [V, R, 3] in [0, 1] and texture slopes [V, R, 2] of the hits.

    Lambert shading with one fixed light plus ambient light. The slopes are the absolute
    derivatives of the luminance along the two directions of the face, per decimetre: what a
    camera with more pixels would see around the ray.
    """
    surface = hits.surface
    wave = 2 * np.pi / looks.period[surface][..., None]
    angle = (hits.plane + looks.phase[surface]) * wave
    cos, sin = np.cos(angle), np.sin(angle)
    a, b, c = np.moveaxis(looks.pattern[surface], -1, 0)
    texture = a * cos[..., 0] + b * cos[..., 1] + c * cos[..., 0] * cos[..., 1]
    light = 0.7 + 0.3 * (hits.normal @ _LIGHT)
    albedo = looks.colour[surface]
    colour = albedo * (light * (1 + texture))[..., None]
    slopes = np.stack(
        [(a + c * cos[..., 1]) * sin[..., 0], (b + c * cos[..., 0]) * sin[..., 1]], axis=-1
    )
    slopes = np.abs(slopes) * wave * (albedo @ _LUMINANCE * light)[..., None] / 10
    return np.clip(colour, 0, 1), slopes


def luminance(colour: np.ndarray) -> np.ndarray:
    """Rec. 601 luminance of colours [..., 3]."""
    return colour @ _LUMINANCE
