"""The tensors of a synthetic room, named as in the array contract (`exports`).

`vggt/tokens` [4, 64, 76] stand in for a pre-trained vision encoder. They are a fixed function of
what the cameras see (`stand_ins.patch_tokens`): no identity, category or box enters it. A patch is
4 x 4 pixels of a 32 x 32 image and has 2 x 2 cells.

`sonata/coord` [J, 3] and `sonata/features` [J, 10] stand in for a pre-trained point encoder. They
are the occupied voxels, VOXEL_EDGE wide, of the points at the cells' centres (1,024 of all views).
The features are the means of colour (3), normal (3), contrast (1) and texture slopes (2) over a
voxel's points, and the log of 1 + their number / 8. `sonata/coord` is their mean place, in metres,
z up, the room centred in x and y, its floor at 0: the frame that `frames.to_sonata_frame` gives a
reconstruction. `sonata/frame` [J] is the view with most of a voxel's points, the first on a tie.

The teacher is the exact oracle, not a model. `features` are the shares of a patch's 16 pixels per
category, the last column for the room's own surfaces. `depth_bins` share the depth at the patch's
centre between its two neighbours of `depth_bin_centres(16)`, linearly in log depth.
`detection_probs` are the one-hot category of each box. `relations` are those of `pair_relations`.
"""

import numpy as np

from geode_jax.geometry.upright_boxes import box_gaps
from geode_jax.sources.questions import margins
from geode_jax.sources.questions.seen_room import SeenRoom, pair_relations
from geode_jax.sources.rooms import layout, raycast
from geode_jax.sources.rooms.layout import CATEGORIES, VIEWS
from geode_jax.sources.rooms.scene import (
    GRID,
    PATCH_SIDE,
    Observation,
    RoomScene,
    blocks,
    by_patch,
)
from geode_jax.sources.stand_ins import patch_tokens
from geode_jax.targets import depth_bin_centres

DEPTH_BINS = 16
"""Bins of the teacher's depth distributions."""
VOXEL_EDGE = 0.75
"""Edge of a point token's voxel, metres. Furniture larger than half a metre fills at least one."""


def soft_depth_bins(depth: np.ndarray, bins: int) -> np.ndarray:
    """Returns depths [...] as probabilities [..., bins], linear in log depth between two bins."""
    centres = np.log(depth_bin_centres(bins))
    position = (np.log(depth) - centres[0]) / (centres[1] - centres[0])
    return np.maximum(0, 1 - np.abs(np.clip(position, 0, bins - 1)[..., None] - np.arange(bins)))


def tokens(seen: Observation) -> np.ndarray:
    """Returns `vggt/tokens` [V, grid * grid, TOKEN_WIDTH] float16."""
    colour, contrast, slopes = _cell_appearance(seen)

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


def _cell_appearance(seen: Observation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns colour [V, cells, 3], contrast [V, cells] and slopes [V, cells, 2].

    Colour and slopes are means over the 2 x 2 pixels of a cell, the contrast is the standard
    deviation of their luminance.
    """
    side = seen.grid * PATCH_SIDE
    colour = blocks(seen.colour, side, 2)
    slopes = blocks(seen.slopes, side, 2)
    return colour.mean(2), raycast.luminance(colour).std(2), slopes.mean(2)


def point_tokens(seen: Observation) -> dict[str, np.ndarray]:
    """Returns `sonata/features` [J, 10], `coord` [J, 3] and `frame` [J], see the module."""
    colour, contrast, slopes = _cell_appearance(seen)
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
    voxel = np.floor(point / VOXEL_EDGE).astype(np.int64)
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
    """Returns the category [s] of every surface, -1 for the room's own."""
    return np.array([item.category for item in scene.objects] + [-1] * raycast.STRUCTURES)


def scene_arrays(scene: RoomScene, seen: Observation) -> dict[str, np.ndarray]:
    """Returns all tensors of a scene except the teacher's."""
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
    """Returns the teacher's tensors of a scene."""
    visible, category = np.flatnonzero(seen.visible), _categories(scene)
    classes = len(CATEGORIES)
    # The remainder turns -1 into the last column.
    kind = by_patch(category[seen.pixels.surface] % (classes + 1), GRID)
    share = (kind[..., None] == np.arange(classes + 1)).mean(2)
    bins = soft_depth_bins(seen.patches.depth, DEPTH_BINS)
    relations = pair_relations(scene.boxes[visible], scene.extrinsic[0])
    return {
        "features": share.reshape(VIEWS, GRID, GRID, classes + 1).astype(np.float16),
        "depth_bins": bins.reshape(VIEWS, GRID, GRID, DEPTH_BINS).astype(np.float16),
        "detection_probs": np.eye(classes, dtype=np.float16)[category[visible]],
        "relations": relations.reshape(-1, 4).astype(np.float16),
    }


def seen_room(scene: RoomScene, seen: Observation) -> SeenRoom:
    """Returns what questions about the scene are made from."""
    visible = np.flatnonzero(seen.visible)
    row = {int(n): k for k, n in enumerate(visible)}
    pairs = [(row[a], row[b]) for a, b in scene.pairs if a in row and b in row]
    gaps = box_gaps(scene.boxes[visible], scene.boxes[visible])
    partly_seen = np.flatnonzero(~seen.visible & (seen.rays.sum(0) >= margins.AMBIGUITY_PIXELS))
    return SeenRoom(
        scene_id=scene.scene_id,
        room=scene.room,
        floor=float(scene.room[0] * scene.room[1]),
        names=tuple(scene.nouns[scene.objects[n].category] for n in visible),
        boxes=scene.boxes[visible],
        rays=seen.rays[:, visible],
        vague=frozenset(scene.nouns[scene.objects[n].category] for n in partly_seen),
        contacts={pair: float(gaps[pair]) for pair in pairs},
        extrinsic=scene.extrinsic,
        larger=layout.larger_prior(),
        typical=layout.typical_lengths(),
    )
