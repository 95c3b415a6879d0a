"""Targets that the paper takes from its teacher, and LLaVA-3D does not give, made from an export.

| tensor | made from | who teaches |
|---|---|---|
| `teacher/depth_bins` | `vggt/depth` and `vggt/depth_conf` | VGGT |
| `teacher/detection_probs` | a detector's boxes and probabilities | the detector |
| | `target/labels`, smoothed | a pseudo-teacher: it knows the labels |
| `teacher/relations` | `target/boxes` in the first camera | a pseudo-teacher: it knows the boxes |

What each tensor was made from stands in the manifest's producer. A scene's own teacher tensors are
kept, and nothing is made where its source is missing.
"""

import dataclasses
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

from geode_jax import ranges
from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportError, ExportWriter
from geode_jax.runtime.bars import progress_bar
from geode_jax.sources.questions.seen_room import pair_relations
from geode_jax.targets import depth_bin_centres, held_depth

CONFIDENCE_SPREAD = 0.2
"""VGGT's depth loss is conf * |error| - alpha * log conf, whose best confidence for an error is
alpha / |error|. So alpha / conf is the mean absolute error that VGGT expects, with alpha = 0.2 and
in its unit, in which a scene's mean distance is about 1; here it is taken as a relative error."""
LEAST_SHARE = 0.5
"""Least share of a patch's pixels with a depth: a patch with fewer has no distribution."""


@dataclasses.dataclass(frozen=True)
class TeacherRequest:
    """Arguments of `add_teacher_targets`.

    Attributes:
        export: folder of the export.
        out: folder of the new export.
        depth_bins: number of bins; 0 makes no `teacher/depth_bins`.
        detections: folder of a detector's SCENE.npz with `boxes` [M, 7] in the export's world and
            `probs` [M, categories] in the order of its categories; None smooths the labels.
        smoothing: share of probability that the other categories get, 0 to 0.99.
    """

    export: Path
    out: Path
    depth_bins: int = 64
    detections: Path | None = None
    smoothing: float = 0.1

    def __post_init__(self):
        ranges.check(self, {"depth_bins": ranges.whole(0), "smoothing": ranges.real(0, 0.99)})


def depth_distribution(
    depth: np.ndarray, confidence: np.ndarray | None, grid: tuple[int, int], bins: int
) -> np.ndarray:
    """Returns each patch's distribution over the depth bins (`targets.depth_bin_centres`).

    A pixel's log depth has a Laplace distribution around the predicted one, with the scale
    `CONFIDENCE_SPREAD` / confidence and at least half a bin. A bin gets the probability between its
    edges, halfway to its neighbours in log depth; the outer bins reach to infinity. A patch has the
    mean over its pixels with a depth.

    Args:
        depth: [V, h, w] metres, 0 = unknown.
        confidence: [V, h, w], at least 1; None: the least scale everywhere.
        grid: (gh, gw); divides (h, w).
        bins: Z.

    Returns:
        [V, gh, gw, Z] float16; zeros where fewer than `LEAST_SHARE` of the pixels have a depth.
    """
    centres = np.log(depth_bin_centres(bins))
    step = centres[1] - centres[0] if bins > 1 else 1.0
    edges = (centres[1:] + centres[:-1]) / 2
    (V, h, w), (gh, gw) = depth.shape, grid
    cells = (gh, h // gh, gw, w // gw)
    out = np.zeros((V, gh, gw, bins), np.float16)
    for v in range(V):  # one view at a time: all pixels' distributions would take gigabytes
        known = held_depth(depth[v])
        scale = np.full((h, w), step / 2)
        if confidence is not None:
            usable = np.maximum(np.asarray(confidence[v], np.float64), 1e-6)
            scale = np.maximum(scale, CONFIDENCE_SPREAD / usable)
        place = np.log(np.where(known, depth[v], 1.0).astype(np.float64))
        offset = (edges - place[..., None]) / scale[..., None]
        tail = np.exp(-np.abs(offset)) / 2
        below = np.where(offset < 0, tail, 1 - tail)
        mass = np.diff(below, axis=-1, prepend=0.0, append=1.0) * known[..., None]
        count = known.reshape(cells).sum((1, 3))
        mean = mass.reshape(*cells, bins).sum((1, 3)) / np.maximum(count, 1)[..., None]
        enough = count >= LEAST_SHARE * (h // gh) * (w // gw)
        out[v] = mean * enough[..., None]
    return out


def smoothed_labels(labels: np.ndarray, categories: int, smoothing: float) -> np.ndarray:
    """Returns probabilities [N, categories] float16: 1 - smoothing for the label."""
    if categories == 1:
        return np.ones((len(labels), 1), np.float16)
    probability = np.full((len(labels), categories), smoothing / (categories - 1))
    probability[np.arange(len(labels)), labels] = 1 - smoothing
    return probability.astype(np.float16)


def matched_detections(
    boxes: np.ndarray, found_boxes: np.ndarray, found_probs: np.ndarray
) -> np.ndarray:
    """Returns a detector's probabilities [N, categories] for the boxes of an export.

    A box gets those of the detection whose centre is nearest to its own, if each of the two boxes
    contains the other's centre; the others get zeros, which are no target.

    Args:
        boxes: [N, 7] of the export.
        found_boxes: [M, 7] of the detector, in the same world frame.
        found_probs: [M, categories], rows with a positive sum.
    """
    out = np.zeros((len(boxes), found_probs.shape[1]), np.float16)
    if not len(boxes) or not len(found_boxes):
        return out
    apart = np.linalg.norm(boxes[:, None, :3] - found_boxes[None, :, :3], axis=-1)
    both = _contains(boxes, found_boxes) & _contains(found_boxes, boxes).T
    apart = np.where(both, apart, np.inf)
    nearest = apart.argmin(1)
    hit = np.isfinite(apart.min(1))
    probs = found_probs[nearest[hit]].astype(np.float64)
    out[hit] = probs / probs.sum(-1, keepdims=True)
    return out


def _contains(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns whether boxes [i, 7] contain the centres of others [j, 7]: [i, j]."""
    delta = others[None, :, :3] - boxes[:, None, :3]
    turn = np.exp(-1j * boxes[:, 6])[:, None]
    level = (delta[..., 0] + 1j * delta[..., 1]) * turn
    local = np.stack([level.real, level.imag, delta[..., 2]], -1)
    return np.all(np.abs(local) <= boxes[:, None, 3:6] / 2, axis=-1)


def add_teacher_targets(request: TeacherRequest) -> Counter[str]:
    """Copies an export and adds the targets of the module's table; scene files are rewritten.

    Repeating an interrupted call continues with the next scene.

    Returns:
        {what: scenes or boxes}, for the terminal.

    Raises:
        UserError: depth without scale, or nothing in the whole export that a target could be made
            from.
        ExportError: the export or a detector's file is damaged, or `out` cannot be written.
    """
    old = Export(request.export)
    if request.depth_bins and old.manifest["scale"] != "metric":
        raise UserError(
            f"{request.export}: its depth has no metric scale, which the depth bins need (add "
            "VGGT's arrays to a metric export, or --depth-bins 0)"
        )
    header = old.header()
    header["producer"] = {**header["producer"], **_producer(request, old)}
    counts: Counter[str] = Counter()
    with ExportWriter(request.out, **header, resume=True) as writer:
        finished = writer.finished()
        for entry in progress_bar(old.manifest["scenes"], desc="scenes", unit="scene"):
            scene_id = entry["id"]
            if scene_id in finished:
                writer.register(finished[scene_id])
                counts["scenes made before"] += 1
                continue
            arrays = old.read_scene(scene_id)
            made = _targets(request, old, scene_id, arrays, counts)
            teacher = {n[8:]: array for n, array in arrays.items() if n.startswith("teacher/")}
            own = {n: array for n, array in arrays.items() if not n.startswith("teacher/")}
            writer.add_scene(
                scene_id,
                own,
                split=entry["split"],
                teacher={**made, **teacher},
                alignment=entry.get("alignment"),
            )
        if not counts:
            needed = "vggt/depth, target/labels or target/boxes with camera/extrinsic"
            raise UserError(f"{request.export}: no scene has {needed} to make targets from")
        writer.add_questions(old.questions())
    return counts


def _producer(request: TeacherRequest, export: Export) -> dict[str, str]:
    """Returns the entries of the manifest's producer that say what each target is made from."""
    found = {"teacher_relations": "target/boxes in the first camera: a pseudo-teacher"}
    if request.depth_bins:
        measured = export.manifest["tokens_contain_depth"]
        found["teacher_depth_bins"] = "vggt/depth and its confidence" + (
            ", which is the target depth itself: a pseudo-teacher" if measured else ""
        )
    if request.detections:
        found["teacher_detection_probs"] = f"detections of {request.detections.name}"
    else:
        found["teacher_detection_probs"] = (
            f"target/labels smoothed by {request.smoothing:g}: a pseudo-teacher"
        )
    return found


def _targets(
    request: TeacherRequest,
    export: Export,
    scene_id: str,
    arrays: dict[str, np.ndarray],
    counts: Counter[str],
) -> dict[str, np.ndarray]:
    """Returns a scene's new targets, names without `teacher/`, and counts them."""
    made: dict[str, np.ndarray] = {}
    if request.depth_bins and "vggt/depth" in arrays and "teacher/depth_bins" not in arrays:
        made["depth_bins"] = depth_distribution(
            np.asarray(arrays["vggt/depth"], np.float32),
            arrays.get("vggt/depth_conf"),
            export.patch_grid,
            request.depth_bins,
        )
    boxes = arrays.get("target/boxes")
    if boxes is not None and "target/labels" in arrays and "teacher/detection_probs" not in arrays:
        if request.detections:
            found = _read_detections(request.detections, scene_id, len(export.categories))
            made["detection_probs"] = matched_detections(boxes, *found)
            counts["boxes without a detection"] += int((~made["detection_probs"].any(-1)).sum())
        else:
            made["detection_probs"] = smoothed_labels(
                arrays["target/labels"], len(export.categories), request.smoothing
            )
    if boxes is not None and "camera/extrinsic" in arrays and "teacher/relations" not in arrays:
        relations = pair_relations(boxes, arrays["camera/extrinsic"][0])
        made["relations"] = relations.reshape(-1, 4).astype(np.float16)
    counts.update(f"scenes with new teacher/{name}" for name in made)
    return made


def _read_detections(folder: Path, scene_id: str, categories: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a detector's boxes [M, 7] and probabilities [M, categories] of a scene.

    Raises:
        ExportError: the file is missing, damaged or has other arrays.
    """
    path = folder / f"{scene_id}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            boxes, probs = (np.asarray(file[n], np.float64) for n in ("boxes", "probs"))
    except FileNotFoundError:
        raise ExportError(str(path), "", "no such file") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split())[:80]
        raise ExportError(str(path), "", f"not an .npz with boxes and probs: {why}") from None
    if boxes.ndim != 2 or boxes.shape[1] != 7 or probs.shape != (len(boxes), categories):
        shapes = f"{list(boxes.shape)} and {list(probs.shape)}"
        rule = f"boxes and probs are {shapes}, not [M, 7] and [M, {categories}]"
        raise ExportError(str(path), "", rule)
    if not (np.isfinite(boxes).all() and np.isfinite(probs).all()):
        raise ExportError(str(path), "", "a number is not finite")
    if (boxes[:, 3:6] <= 0).any() or (probs < 0).any() or (probs.sum(-1) <= 0).any():
        raise ExportError(str(path), "", "a size is not positive, or probabilities have no mass")
    return boxes, probs
