"""3D detection: IoU of oriented boxes, F1 and mean average precision at IoU 0.25 and 0.5.

A box is (centre xyz, size xyz, yaw about z in radians), world frame, metres: 7 numbers.
Matching and AP follow PASCAL VOC (2010 on) as ScanNet detectors report them: predictions of a
class, best score first, each claim the box of highest IoU of their class in their scene; a box
claimed twice makes the second a false positive; AP is the area under the precision envelope. An IoU
of just the threshold counts, as in VOC's own code; the Python versions of it ask for more.
"""

import dataclasses

import numpy as np

IOU_THRESHOLDS = (0.25, 0.5)


def _rectangle_overlap(corners: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Area of convex polygons inside the axis-aligned rectangles |x| <= hx, |y| <= hy.

    Sutherland-Hodgman clipping for many pairs at once. To keep the number of vertices the same for
    all pairs, a vertex outside a border is moved onto it instead of dropped, after the point where
    its edge crosses that border has been inserted: a walk along the border encloses no area.

    Args:
      corners: [..., 4, 2] counter-clockwise, in the rectangle's frame.
      half: [..., 2] half sizes.

    Returns:
      [...] areas.
    """
    points = corners
    for axis in (0, 1):
        for sign in (1.0, -1.0):
            border = half[..., None, axis]
            inside = border - sign * points[..., axis]  # [..., n] distance, negative is outside
            following = np.roll(points, -1, axis=-2)
            inside_following = np.roll(inside, -1, axis=-1)
            crosses = (inside < 0) != (inside_following < 0)
            step = np.where(crosses, inside - inside_following, 1.0)
            share = np.where(crosses, inside / step, 0.0)
            inserted = points + share[..., None] * (following - points)
            points = np.stack([points, inserted], axis=-2)
            points = points.reshape(*points.shape[:-3], 2 * points.shape[-3], 2)
            clamp = np.minimum if sign > 0 else np.maximum
            points[..., axis] = clamp(points[..., axis], sign * border)
    x, y = points[..., 0], points[..., 1]
    twice = x * np.roll(y, -1, axis=-1) - y * np.roll(x, -1, axis=-1)
    return np.maximum(0.5 * np.sum(twice, axis=-1), 0.0)


_LARGEST = 1e300
"""Larger numbers of a box leave float64 in a sum."""


def _usable(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [..., 7], those with numbers that cannot be computed with as zeros; which are sound."""
    usable = (np.abs(boxes) <= _LARGEST).all(-1)
    return np.where(usable[..., None], boxes, 0.0), usable


def oriented_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of the volumes of every pair of oriented boxes, in float64.

    Args:
      boxes: [M, 7].
      others: [N, 7].

    Returns:
      [M, N] in [0, 1]; a box without volume, or with a number that is not finite (or beyond
      `_LARGEST`), has IoU 0 with everything.
    """
    a, usable_a = _usable(np.asarray(boxes, np.float64).reshape(-1, 1, 7))
    b, usable_b = _usable(np.asarray(others, np.float64).reshape(1, -1, 7))
    # The IoU depends on no common scale. A power of two loses no digit, and no product overflows.
    apart = a[..., :3] - b[..., :3]  # [M, N, 3]
    sizes = np.maximum(np.abs(a[..., 3:6]), np.abs(b[..., 3:6]))
    exponent = np.frexp(np.maximum(np.abs(apart), sizes).max(-1))[1][..., None]
    apart = np.ldexp(apart, -exponent)
    a, b = (
        np.concatenate(
            [centre, np.ldexp(box[..., 3:6], -exponent), 0 * centre[..., :1] + box[..., 6:]], -1
        )
        for centre, box in ((apart, a), (np.zeros_like(apart), b))
    )

    # Corners of a in b's frame: only the difference of the yaws and of the centres matters.
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.float64)
    local = 0.5 * signs * a[..., None, 3:5]  # [M, 1, 4, 2]
    turn = a[..., 6] - b[..., 6]
    cos, sin = np.cos(turn)[..., None], np.sin(turn)[..., None]
    offset = a[..., :2] - b[..., :2]
    cos_b, sin_b = np.cos(b[..., 6]), np.sin(b[..., 6])
    centre_x = cos_b * offset[..., 0] + sin_b * offset[..., 1]
    centre_y = -sin_b * offset[..., 0] + cos_b * offset[..., 1]
    corners = np.stack(
        [
            cos * local[..., 0] - sin * local[..., 1] + centre_x[..., None],
            sin * local[..., 0] + cos * local[..., 1] + centre_y[..., None],
        ],
        axis=-1,
    )  # [M, N, 4, 2]
    half = np.broadcast_to(0.5 * b[..., 3:5], (*corners.shape[:2], 2))
    area = _rectangle_overlap(corners, half)

    top = np.minimum(a[..., 2] + 0.5 * a[..., 5], b[..., 2] + 0.5 * b[..., 5])
    bottom = np.maximum(a[..., 2] - 0.5 * a[..., 5], b[..., 2] - 0.5 * b[..., 5])
    intersection = area * np.maximum(top - bottom, 0.0)
    union = np.prod(a[..., 3:6], axis=-1) + np.prod(b[..., 3:6], axis=-1) - intersection
    positive = (union > 0) & (intersection > 0) & usable_a & usable_b
    return np.where(positive, np.minimum(intersection / np.where(positive, union, 1.0), 1.0), 0.0)


@dataclasses.dataclass(frozen=True)
class _Scene:
    boxes: np.ndarray
    labels: np.ndarray
    iou: np.ndarray  # [predictions, boxes], 0 where the classes differ


class DetectionMetrics:
    """Accumulates detections scene by scene."""

    def __init__(self, score_threshold: float = 0.5):
        """Precision, recall and F1 use the detections of at least this score; AP uses all."""
        self.score_threshold = score_threshold
        self._scenes: list[_Scene] = []
        self._detections: list[tuple[float, int, int, int]] = []  # (score, label, scene, row)

    def update(self, boxes, labels, scores, target_boxes, target_labels) -> None:
        """Adds one scene whose boxes are all known.

        Args:
          boxes: [M, 7] predicted. Their sizes may be 0 or less: such a box matches nothing.
          labels: [M] int predicted category.
          scores: [M] confidence.
          target_boxes: [N, 7]; `target_labels` -1 is padding.
          target_labels: [N] int category.
        """
        boxes = np.asarray(boxes, np.float64).reshape(-1, 7).copy()
        boxes[:, 3:6] = np.maximum(boxes[:, 3:6], 0.0)
        labels = np.asarray(labels, int).reshape(-1)
        target_boxes = np.asarray(target_boxes, np.float64).reshape(-1, 7)
        target_labels = np.asarray(target_labels, int).reshape(-1)
        known = target_labels >= 0
        target_boxes, target_labels = target_boxes[known], target_labels[known]

        iou = oriented_iou(boxes, target_boxes)
        iou = np.where(labels[:, None] == target_labels[None, :], iou, 0.0)
        index = len(self._scenes)
        self._scenes.append(_Scene(target_boxes, target_labels, iou))
        for row, score in enumerate(np.asarray(scores, np.float64).reshape(-1)):
            self._detections.append((float(score), int(labels[row]), index, row))

    def _true_positives(self, detections, threshold: float) -> np.ndarray:
        """[len(detections)] bool, for detections in descending order of score."""
        claimed = [np.zeros(len(scene.labels), bool) for scene in self._scenes]
        hits = np.zeros(len(detections), bool)
        for i, (_, _, index, row) in enumerate(detections):
            iou = self._scenes[index].iou[row]
            if not iou.size:
                continue
            best = int(np.argmax(iou))
            if iou[best] >= threshold and not claimed[index][best]:
                claimed[index][best] = True
                hits[i] = True
        return hits

    def result(self) -> dict[str, float]:
        """`detection_precision_25`, `_recall_25`, `_f1_25`, `detection_map_25`, and the same at 50.

        mAP is the mean over the categories that have at least one box. Empty when there is none.
        """
        labels = np.concatenate([scene.labels for scene in self._scenes] or [np.zeros(0, int)])
        if not labels.size:
            return {}
        # Stable: equal scores stay in the order they came, so the result is deterministic.
        ordered = sorted(self._detections, key=lambda detection: -detection[0])
        confident = [item for item in ordered if item[0] >= self.score_threshold]
        scores = {}
        for threshold in IOU_THRESHOLDS:
            suffix = f"{round(100 * threshold)}"
            hits = int(self._true_positives(confident, threshold).sum())
            precision = hits / len(confident) if confident else 0.0
            recall = hits / labels.size
            scores[f"detection_precision_{suffix}"] = precision
            scores[f"detection_recall_{suffix}"] = recall
            scores[f"detection_f1_{suffix}"] = (
                2 * hits / (len(confident) + labels.size)  # = 2PR / (P + R), also at P = R = 0
            )
            classes = [
                average_precision(
                    self._true_positives([d for d in ordered if d[1] == label], threshold),
                    int(np.sum(labels == label)),
                )
                for label in np.unique(labels)
            ]
            scores[f"detection_map_{suffix}"] = float(np.mean(classes))
        return scores


def average_precision(hits: np.ndarray, boxes: int) -> float:
    """Area under the precision envelope (PASCAL VOC 2010 on, all points).

    Args:
      hits: [n] bool, detections in descending order of score.
      boxes: number of true boxes, > 0.
    """
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(envelope[np.asarray(hits, bool)]) / boxes)
