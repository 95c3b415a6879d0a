"""3D detection: IoU of oriented boxes, F1 and mean average precision at IoU 0.25 and 0.5.

A box is (centre xyz, size xyz, yaw about z in radians), world frame, metres: 7 numbers.
Matching and AP follow PASCAL VOC (2010 on) as ScanNet detectors report them: predictions of a
class, best score first, each claim the box of highest IoU of their class in their scene; the second
claim of a box is a false positive; AP is the area under the precision envelope. An IoU equal to the
threshold counts, as in VOC's own code; the Python versions of that code need a larger one.
"""

import dataclasses

import numpy as np
import shapely

IOU_THRESHOLDS = (0.25, 0.5)


_LARGEST = 1e300
"""Largest number of a box: sums of larger ones leave float64."""


def _usable(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes [..., 7] with unusable ones as zeros, and [...] bool: which are usable."""
    usable = np.all(np.abs(boxes) <= _LARGEST, axis=-1)
    return np.where(usable[..., None], boxes, 0.0), usable


def _rotate(points: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Turns points [..., 2] counter-clockwise by angles [...] in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def oriented_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of the volumes of every pair of oriented boxes.

    Args:
      boxes: [m, 7].
      others: [N, 7].

    Returns:
      [m, N] float64 in [0, 1]; a box without volume (a size of 0 or less), or with a number that
      is not finite or beyond `_LARGEST`, has IoU 0 with everything.
    """
    a, usable_a = _usable(np.asarray(boxes, np.float64).reshape(-1, 1, 7))
    b, usable_b = _usable(np.asarray(others, np.float64).reshape(1, -1, 7))
    # The IoU does not depend on the scale. Dividing by a power of two is exact, and afterwards no
    # product overflows.
    apart = a[..., :3] - b[..., :3]  # [m, N, 3]
    largest = np.maximum(np.abs(a[..., 3:6]), np.abs(b[..., 3:6]))
    exponent = np.frexp(np.maximum(np.abs(apart), largest).max(-1))[1][..., None]
    apart, size_a, size_b = (np.ldexp(x, -exponent) for x in (apart, a[..., 3:6], b[..., 3:6]))
    volume_a, volume_b = np.prod(size_a, axis=-1), np.prod(size_b, axis=-1)

    top = np.minimum(apart[..., 2] + 0.5 * size_a[..., 2], 0.5 * size_b[..., 2])
    bottom = np.maximum(apart[..., 2] - 0.5 * size_a[..., 2], -0.5 * size_b[..., 2])
    sound = usable_a & usable_b & (size_a > 0).all(-1) & (size_b > 0).all(-1)
    pairs = np.nonzero(sound & (volume_a > 0) & (volume_b > 0) & (top > bottom))

    # Footprints of the pairs in b's frame, where b is aligned with the axes.
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.float64)
    yaw_a, yaw_b = (np.broadcast_to(box[..., 6], sound.shape)[pairs] for box in (a, b))
    corners_a = _rotate(0.5 * signs * size_a[pairs][:, None, :2], (yaw_a - yaw_b)[:, None])
    corners_a += _rotate(apart[pairs][:, :2], -yaw_b)[:, None]
    corners_b = 0.5 * signs * size_b[pairs][:, None, :2]  # [pairs, 4, 2]
    shared = shapely.intersection(shapely.polygons(corners_a), shapely.polygons(corners_b))

    intersection = np.zeros(sound.shape)
    intersection[pairs] = shapely.area(shared) * (top - bottom)[pairs]
    union = volume_a + volume_b - intersection
    return np.minimum(intersection / np.where(intersection > 0, union, 1.0), 1.0)


@dataclasses.dataclass(frozen=True)
class _Scene:
    boxes: np.ndarray
    labels: np.ndarray
    iou: np.ndarray  # [predictions, boxes], 0 where the classes differ


class DetectionMetrics:
    """Accumulates detections over scenes."""

    def __init__(self, score_threshold: float = 0.5):
        """Sets the least score of the detections in precision, recall and F1; AP uses all."""
        self.score_threshold = score_threshold
        self._scenes: list[_Scene] = []
        self._detections: list[tuple[float, int, int, int]] = []  # (score, label, scene, row)

    def update(self, boxes, labels, scores, target_boxes, target_labels) -> None:
        """Adds one scene whose boxes are all known.

        Args:
          boxes: [m, 7] predicted; a box with a size of 0 or less matches nothing.
          labels: [m] int predicted category.
          scores: [m] confidence.
          target_boxes: [N, 7]; `target_labels` -1 is padding.
          target_labels: [N] int category.
        """
        boxes = np.asarray(boxes, np.float64).reshape(-1, 7)
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
        """Returns [len(detections)] bool, for detections in descending order of score."""
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
        """Returns `detection_precision_25`, `_recall_25`, `_f1_25` and `_map_25`, the same at 50.

        mAP is the mean over the categories that have at least one true box. The result is empty
        without a true box.
        """
        labels = np.concatenate([scene.labels for scene in self._scenes] or [np.zeros(0, int)])
        if not labels.size:
            return {}
        # The sort is stable: detections of equal score keep their order, so that the result is
        # deterministic.
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
    """Returns the area under the precision envelope (PASCAL VOC 2010 on, all points).

    Args:
      hits: [n] bool, detections in descending order of score.
      boxes: number of true boxes, > 0.
    """
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(envelope[np.asarray(hits, bool)]) / boxes)
