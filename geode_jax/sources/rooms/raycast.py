"""Rays, oriented boxes and surfaces of a rectangular room, in plain numpy.

Conventions. World: metres, z up, floor at z = 0, origin at the centre of the floor. A box is
(centre x, y, z, size x, y, z, yaw), yaw in radians about z. Every box stands upright, so it is its
footprint (a rotated rectangle) times a height interval. A room is (size x, size y, size z).
Cameras are camera-from-world [V, 3, 4] with OpenCV axes. Pixel centres are integers, so an image
spans [-0.5, width - 0.5]. Ray directions have camera z = 1, so the ray parameter is the depth.

Dimension key: N boxes, V views, n rays of a view, s = N + 6 surfaces (the boxes, then floor,
ceiling, and the walls at -x, +x, -y, +y).
"""

import dataclasses

import numpy as np

FLOOR, CEILING, WALLS = 0, 1, slice(2, 6)
"""Indices of the room's own surfaces, counted from the N boxes on."""
STRUCTURES = 6
"""Number of the room's own surfaces."""

_LIGHT = (np.array([0.35, 0.25, 0.9]) / np.linalg.norm([0.35, 0.25, 0.9])).astype(np.float32)
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_TINY = np.float32(1e-30)
"""Replaces components of rays that are exactly zero, which cannot be divided by."""


# ----------------------------------------------------------------------------------- cameras


def camera_poses(positions: np.ndarray, yaw: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Returns camera-from-world [..., 3, 4] of cameras without roll.

    Args:
        positions: [..., 3] camera centres.
        yaw: [...] heading in radians, 0 = along x, anticlockwise.
        pitch: [...] radians, negative is downwards.
    """
    cos, sin = np.cos(yaw), np.sin(yaw)
    level, up = np.cos(pitch), np.sin(pitch)
    right = [sin, -cos, np.zeros_like(cos)]
    down = [up * cos, up * sin, -level]
    forward = [level * cos, level * sin, up]
    rotation = np.moveaxis(np.array([right, down, forward]), (0, 1), (-2, -1))
    return np.concatenate([rotation, -rotation @ positions[..., None]], axis=-1)


def pinhole(fov: float, height: int, width: int) -> np.ndarray:
    """Returns the intrinsic [3, 3] for a horizontal field of view (radians) and square pixels."""
    focal = width / 2 / np.tan(fov / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def camera_centres(extrinsic: np.ndarray) -> np.ndarray:
    """Returns the centres [V, 3] of cameras [V, 3, 4] in the world."""
    return -np.einsum("vji,vj->vi", extrinsic[:, :, :3], extrinsic[:, :, 3])


def pixel_rays(extrinsic: np.ndarray, intrinsic: np.ndarray, height: int, width: int):
    """Returns world ray directions [V, height * width, 3] through pixel centres, camera z = 1."""
    v, u = np.mgrid[:height, :width].reshape(2, -1).astype(np.float64)
    ones = np.ones_like(u)
    pixels = np.stack([u, v, ones], axis=-1)
    # Row vectors: the world direction R^T c of a camera direction c is c R.
    return (pixels @ np.linalg.inv(intrinsic).T) @ extrinsic[:, :, :3]


# ---------------------------------------------------------------------------------- ray casting


@dataclasses.dataclass(frozen=True)
class Hits:
    """First hit of each ray; all arrays are [V, n, ...].

    Attributes:
        depth: camera z of the hit, metres.
        surface: index of the surface: 0 to N - 1 for boxes, N + k for the room's k-th surface.
        normal: [V, n, 3] unit normal of the face, world frame, pointing to the camera's side.
        point: [V, n, 3] the hit in the world, metres.
        plane: [V, n, 2] coordinates on the face in metres (horizontal, vertical; x, y on level
            faces), in the frame of the box or of the room.
    """

    depth: np.ndarray
    surface: np.ndarray
    normal: np.ndarray
    point: np.ndarray
    plane: np.ndarray


def cast(boxes: np.ndarray, room: np.ndarray, origins: np.ndarray, rays: np.ndarray) -> Hits:
    """Returns the first hits of rays [V, n, 3] from origins [V, 3].

    The origins must be inside the room and outside all boxes. Computes in float32, which is
    precise to micrometres in a room and takes half the time of float64.
    """
    count = len(boxes)
    boxes, room, origins, rays = (a.astype(np.float32) for a in (boxes, room, origins, rays))
    wall_depth, wall_axis, structure = _leave_room(room, origins, rays)
    box_depth, box_axis, nearest = _enter_boxes(boxes, origins, rays)
    on_box = box_depth < wall_depth
    depth = np.where(on_box, box_depth, wall_depth)
    face = np.where(on_box, box_axis, wall_axis)
    point = origins[:, None] + depth[..., None] * rays
    # The room's surfaces have a frame too, at the world's origin.
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
    """Returns the index [V, n] of the first box on each ray, -1 where there is none."""
    depth, _, nearest = _enter_boxes(*(a.astype(np.float32) for a in (boxes, origins, rays)))
    return np.where(np.isfinite(depth), nearest, -1)


def _enter_boxes(boxes: np.ndarray, origins: np.ndarray, rays: np.ndarray):
    """Returns the depth (inf = none), the face's axis and the index of the first box, [V, n] each.

    Slab method: in the frame of a box, a ray is inside between the last entry into and the first
    exit from the three pairs of faces.
    """
    if not len(boxes):
        nothing = np.zeros(rays.shape[:2], int)
        return np.full_like(rays[..., 0], np.inf), nothing, nothing
    # Box frames: move to the centre, rotate about z by -yaw. Arrays are [N, V, n].
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
    """Returns depth, axis and room surface (0 floor to 5 wall at +y) of each ray, [V, n] each."""
    low = room * np.array([-0.5, -0.5, 0], np.float32)
    high = room * np.array([0.5, 0.5, 1], np.float32)
    x, y, z = (
        (np.where(ray > 0, up, down) - start[:, None]) / np.where(ray == 0, _TINY, ray)
        for ray, down, up, start in zip(np.moveaxis(rays, -1, 0), low, high, origins.T, strict=True)
    )
    depth = np.minimum(np.minimum(x, y), z)
    axis = np.where(z == depth, 2, np.where(y == depth, 1, 0))
    forward = np.take_along_axis(rays, axis[..., None], -1)[..., 0] > 0
    return depth, axis, np.where(axis == 2, 0, 2 + 2 * axis) + forward


def _face_normals(face: np.ndarray, cos: np.ndarray, sin: np.ndarray, rays: np.ndarray):
    """Returns world normals [V, n, 3] of the faces across local axis `face`, against the rays."""
    x = np.where(face == 0, cos, np.where(face == 1, -sin, np.float32(0)))
    y = np.where(face == 0, sin, np.where(face == 1, cos, np.float32(0)))
    z = np.where(face == 2, np.float32(1), np.float32(0))
    facing = x * rays[..., 0] + y * rays[..., 1] + z * rays[..., 2]
    return (
        np.stack([x, y, z], axis=-1)
        * np.where(facing > 0, np.float32(-1), np.float32(1))[..., None]
    )


def _face_plane(face: np.ndarray, cos: np.ndarray, sin: np.ndarray, offset: np.ndarray):
    """Returns coordinates [V, n, 2] on faces across axis `face` of world offsets [V, n, 3]."""
    x = cos * offset[..., 0] + sin * offset[..., 1]
    y = cos * offset[..., 1] - sin * offset[..., 0]
    return np.stack([np.where(face == 0, y, x), np.where(face == 2, y, offset[..., 2])], axis=-1)


# -------------------------------------------------------------------------------- appearance


@dataclasses.dataclass(frozen=True)
class Appearance:
    """Appearance of the s surfaces.

    Attributes:
        colour: [s, 3] albedo in [0, 1].
        pattern: [s, 3] weights (a, b, c) of the texture
            a cos(2 pi x / p) + b cos(2 pi y / p) + c cos(2 pi x / p) cos(2 pi y / p).
        period: [s] p, metres.
        phase: [s, 2] shift of the texture, metres.
    """

    colour: np.ndarray
    pattern: np.ndarray
    period: np.ndarray
    phase: np.ndarray


def shade(hits: Hits, appearance: Appearance) -> tuple[np.ndarray, np.ndarray]:
    """Returns colour [V, n, 3] in [0, 1] and texture slopes [V, n, 2] of the hits.

    Lambert shading with one fixed light plus ambient light. The slopes are the absolute
    derivatives of the luminance along the two directions of the face, per decimetre: the texture
    that a camera with more pixels would see around the ray.
    """
    surface = hits.surface
    wave = 2 * np.pi / appearance.period[surface][..., None]
    angle = (hits.plane + appearance.phase[surface]) * wave
    cos, sin = np.cos(angle), np.sin(angle)
    a, b, c = np.moveaxis(appearance.pattern[surface], -1, 0)
    texture = a * cos[..., 0] + b * cos[..., 1] + c * cos[..., 0] * cos[..., 1]
    light = 0.7 + 0.3 * (hits.normal @ _LIGHT)
    albedo = appearance.colour[surface]
    colour = albedo * (light * (1 + texture))[..., None]
    slopes = np.stack(
        [(a + c * cos[..., 1]) * sin[..., 0], (b + c * cos[..., 0]) * sin[..., 1]], axis=-1
    )
    slopes = np.abs(slopes) * wave * (albedo @ _LUMINANCE * light)[..., None] / 10
    return np.clip(colour, 0, 1), slopes


def luminance(colour: np.ndarray) -> np.ndarray:
    """Returns the Rec. 601 luminance [...] of colours [..., 3]."""
    return colour @ _LUMINANCE
