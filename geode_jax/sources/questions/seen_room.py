"""What the views of a room show of its objects: the input of all questions."""

import dataclasses

import numpy as np

_VIEW_RELATION_SCALE = 0.02
"""Scale of the logistic function of `pair_relations`, as the tangent of an angle."""


@dataclasses.dataclass(frozen=True)
class SeenRoom:
    """The visible objects of a room, and what is known of their categories.

    Attributes:
        scene_id: id of the scene.
        room: size x, y, z, metres.
        floor: area in square metres; less than x times y where a corner is missing.
        names: noun of each of the N visible objects.
        boxes: [N, 7] of the visible objects, the rows of `target/boxes`.
        rays: [V, N] pixels of each view that show each visible object.
        vague: nouns of categories of which another object is partly seen but does not count as
            visible. How many there are is ambiguous, so no question names them.
        contacts: {(row, row): gap in metres} of the pairs that questions about contact may name;
            those in contact have a gap of 0, up to `margins.MAX_CONTACT_GAP`.
        extrinsic: [V, 3, 4] camera-from-world.
        larger: P(volume of a > volume of b) by the nouns (a, b); a missing pair means one half.
        typical: median of the longest edge by noun, metres, where it is known.
    """

    scene_id: str
    room: np.ndarray
    floor: float
    names: tuple[str, ...]
    boxes: np.ndarray
    rays: np.ndarray
    vague: frozenset[str]
    contacts: dict[tuple[int, int], float]
    extrinsic: np.ndarray
    larger: dict[tuple[str, str], float]
    typical: dict[str, float]


def pair_relations(boxes: np.ndarray, extrinsic: np.ndarray) -> np.ndarray:
    """Returns P(left), P(right), P(above), P(below) of box i relative to box j in a view.

    Each probability is a logistic function of the distance of the two centres in the image, in
    tangents of the viewing angle, so that it is close to 0 or 1 beyond a few degrees. It is one
    half where a centre is behind the camera, and for a box and itself.

    Args:
        boxes: [N, 7].
        extrinsic: [3, 4] camera-from-world.

    Returns:
        [N, N, 4].
    """
    centre = boxes[:, :3] @ extrinsic[:, :3].T + extrinsic[:, 3]
    front = centre[:, 2] > 0.1
    image = centre[:, :2] / np.where(front, centre[:, 2], 1.0)[:, None]
    # Image x grows to the right and y downwards, so smaller is left of and above.
    difference = image[None, :] - image[:, None]
    difference = np.where((front[:, None] & front[None, :])[..., None], difference, 0.0)
    sure = 1 / (1 + np.exp(-np.clip(difference / _VIEW_RELATION_SCALE, -30, 30)))
    return np.stack([sure[..., 0], 1 - sure[..., 0], sure[..., 1], 1 - sure[..., 1]], axis=-1)
