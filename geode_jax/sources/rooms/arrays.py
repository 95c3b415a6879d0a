"""The tensors of a synthetic room, as the contract names them."""

import numpy as np

from geode_jax.sources.questions import asker
from geode_jax.sources.rooms import layout, raycast
from geode_jax.sources.rooms.layout import CATEGORIES, VIEWS
from geode_jax.sources.rooms.scene import GRID, PIXELS, Observation, RoomScene, blocks, by_patch
from geode_jax.sources.stand_ins import patch_tokens
from geode_jax.targets import depth_bin_centres

DEPTH_BINS = 16


VOXEL = 0.75
"""Edge of a point token's voxel, metres: furniture of half a metre and more has one or more."""


def soft_depth_bins(depth: np.ndarray, bins: int) -> np.ndarray:
    """Depth [...] as probabilities [..., bins]: linear in log depth between two neighbours."""
    centres = np.log(depth_bin_centres(bins))
    position = (np.log(depth) - centres[0]) / (centres[1] - centres[0])
    return np.maximum(0, 1 - np.abs(np.clip(position, 0, bins - 1)[..., None] - np.arange(bins)))


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
    colour = blocks(seen.colour, side, 2)
    slopes = blocks(seen.slopes, side, 2)
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
    kind = by_patch(category[seen.pixels.surface] % (classes + 1), GRID)
    share = (kind[..., None] == np.arange(classes + 1)).mean(2)
    bins = soft_depth_bins(seen.patches.depth, DEPTH_BINS)
    relations = asker.pair_relations(scene.boxes[visible], scene.extrinsic[0])
    return {
        "features": share.reshape(VIEWS, GRID, GRID, classes + 1).astype(np.float16),
        "depth_bins": bins.reshape(VIEWS, GRID, GRID, DEPTH_BINS).astype(np.float16),
        "detection_probs": np.eye(classes, dtype=np.float16)[category[visible]],
        "relations": relations.reshape(-1, 4).astype(np.float16),
    }


def seen_room(scene: RoomScene, seen: Observation) -> asker.SeenRoom:
    """What questions about the scene are made from."""
    visible = np.flatnonzero(seen.visible)
    row = {int(n): k for k, n in enumerate(visible)}
    glimpsed = np.flatnonzero(~seen.visible & (seen.rays.sum(0) >= asker.GLIMPSE))
    return asker.SeenRoom(
        scene_id=scene.scene_id,
        room=scene.room,
        floor=float(scene.room[0] * scene.room[1]),
        names=tuple(scene.nouns[scene.objects[n].category] for n in visible),
        boxes=scene.boxes[visible],
        rays=seen.rays[:, visible],
        vague=frozenset(scene.nouns[scene.objects[n].category] for n in glimpsed),
        pairs=tuple((row[a], row[b]) for a, b in scene.pairs if a in row and b in row),
        extrinsic=scene.extrinsic,
        larger=layout.larger_prior(),
        typical=layout.typical_lengths(),
    )
