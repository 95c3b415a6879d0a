"""Makes the scene rows of a `Batch` from an export: resampled to the patch grid, padded, masked.

Every function is pure. An absent tensor gives zeros and a False mask. The sizes V, P, N, ... come
from `SceneShapes` and are the same for every scene of an export, so a step is compiled once.
"""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
from numpy.typing import DTypeLike
from PIL import Image

from geode_jax.errors import UserError
from geode_jax.exports import Export, ExportError
from geode_jax.targets import held_boxes, held_depth, held_features, held_places

SCENE_TENSORS = (
    "vggt/tokens",
    "vggt/camera_tokens",
    "vggt/depth",
    "vggt/points",
    "camera/extrinsic",
    "camera/intrinsic",
    "target/depth",
    "target/depth_weight",
    "target/boxes",
    "target/labels",
    "target/segmentation",
    "teacher/features",
    "teacher/depth_bins",
    "teacher/detection_probs",
    "teacher/relations",
)
"""Tensors of a scene from which the student's arrays are made."""

GEODE_VISION = ("images", "internvit/tokens")
"""Tensors of a scene that GEODE may see: its pictures, or their InternViT tokens."""
_POINTS = ("sonata/features", "sonata/coord", "sonata/frame")


def scene_tensors(vision: str) -> tuple[str, ...]:
    """Returns the tensors that are read of a scene if the model sees the tensor `vision`."""
    if vision not in GEODE_VISION:
        return SCENE_TENSORS
    student = ("vggt/tokens", "vggt/camera_tokens")
    return (*(name for name in SCENE_TENSORS if name not in student), vision, *_POINTS)


@dataclasses.dataclass(frozen=True)
class SceneShapes:
    """Sizes of a batch's scene arrays.

    Attributes:
        views: V, the most views of any scene; scenes with fewer are padded.
        grid: (gh, gw); P = gh * gw.
        token_width: C of the tokens that the model sees, 0 for images.
        view_tokens: number of tokens of a view; 0 for one per patch.
        camera_width: C if the student sees camera tokens, else 0.
        depth_ratio: r; `target_depth` is [gh * r, gw * r].
        boxes: N; a scene with more keeps its first N and is not `boxes_known`.
        categories: c, width of the teacher's detection probabilities, 0 without a teacher.
        features: F, width of the teacher's patch features, 0 without a teacher.
        depth_bins: Z of the teacher's depth distribution, 0 without a teacher.
        topk: k of the teacher's logits, 0 without logits over this vocabulary.
        vision: the tensor that the model sees.
        token_dtype: dtype of vision and camera tokens. VGGT's tokens keep their stored dtype: a
            scene of them takes 90 MB in float32.
        image: (h, w) of the largest images, (0, 0) if the model does not see images; smaller ones
            are scaled up.
        points: J, the most points of any scene; 0 without points and for the student.
        point_width: C of the points.
        point_frames: whether the view of every point is known.
    """

    views: int
    grid: tuple[int, int]
    token_width: int
    depth_ratio: int
    boxes: int
    camera_width: int = 0
    categories: int = 0
    features: int = 0
    depth_bins: int = 0
    topk: int = 0
    view_tokens: int = 0
    vision: str = "vggt/tokens"
    token_dtype: str = "float32"
    image: tuple[int, int] = (0, 0)
    points: int = 0
    point_width: int = 0
    point_frames: bool = False

    @property
    def patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True)
class ExportSizes:
    """The largest sizes in an export, and the tensors and the number of boxes of every scene.

    `image` (h, w) is 0 unless the model sees images, `view_tokens` and `view_width` are 0 unless it
    sees InternViT's tokens, `points` and `point_width` are 0 unless it sees one of the two.
    """

    views: int
    features: int
    depth_bins: int
    topk: int
    tensors: dict[str, frozenset[str]]
    box_counts: dict[str, int]
    has_detection_probs: bool
    has_camera_tokens: bool
    image: tuple[int, int]
    view_tokens: int
    view_width: int
    points: int
    point_width: int
    point_frames: bool


def export_sizes(export: Export, vision: str = "vggt/tokens") -> ExportSizes:
    """Measures the sizes of all scenes of an export from the headers of their files alone.

    A scene with a damaged header is left out here and refused when it is read.

    Args:
        export: opened export.
        vision: the tensor that the model sees.

    Raises:
        UserError: widths of the teacher's tensors or the points, or sizes of InternViT's tokens,
            differ between scenes.
    """
    views, box_counts, has_detection_probs, has_camera_tokens = 1, {}, False, False
    tensors: dict[str, frozenset[str]] = {}
    kept: dict[frozenset[str], frozenset[str]] = {}  # most scenes have the same tensors
    widths = {"teacher/features": 0, "teacher/depth_bins": 0, "teacher/topk_id": 0}
    of_views, view, points, point_frames = "vggt/tokens", None, 0, True
    if vision in GEODE_VISION:
        of_views = vision
        widths["sonata/features"] = 0
    for scene_id in export.scene_ids():
        try:
            shapes = export.scene_shapes(scene_id)
        except ExportError:
            shapes = {}
        names = frozenset(shapes)
        tensors[scene_id] = kept.setdefault(names, names)
        views = max(views, shapes.get(of_views, [0])[0])
        if vision in GEODE_VISION and vision in shapes:
            size = tuple(shapes[vision][1:])
            if view and vision == "images":  # scaled to the largest
                size = (max(size[0], view[0]), max(size[1], view[1]), 3)
            elif view not in (None, size):
                rule = f"a view is {size}, {view} in earlier scenes; an export has one size"
                raise UserError(f"scene {scene_id}: tensor {vision}: {rule}")
            view = size
        if "sonata/features" in widths:
            points = max(points, shapes.get("sonata/features", [0])[0])
            point_frames &= "sonata/frame" in shapes or "sonata/features" not in shapes
        box_counts[scene_id] = shapes.get("target/boxes", [0])[0]
        has_detection_probs |= "teacher/detection_probs" in shapes
        has_camera_tokens |= "vggt/camera_tokens" in shapes
        for name in widths.keys() & shapes.keys():
            width = shapes[name][-1]
            if widths[name] not in (0, width):
                rule = f"width {width}, {widths[name]} in earlier scenes; an export has one"
                raise UserError(f"scene {scene_id}: tensor {name}: {rule}")
            widths[name] = width
    return ExportSizes(
        views=views,
        features=widths["teacher/features"],
        depth_bins=widths["teacher/depth_bins"],
        topk=widths["teacher/topk_id"],
        tensors=tensors,
        box_counts=box_counts,
        has_detection_probs=has_detection_probs,
        has_camera_tokens=has_camera_tokens,
        image=(view[0], view[1]) if view and vision == "images" else (0, 0),
        view_tokens=view[0] if view and vision != "images" else 0,
        view_width=view[1] if view and vision != "images" else 0,
        points=points,
        point_width=widths.get("sonata/features", 0),
        point_frames=points > 0 and point_frames,
    )


def batch_rows(tensors: dict[str, np.ndarray], shapes: SceneShapes) -> dict[str, np.ndarray]:
    """Returns one scene's rows of the scene fields of `Batch`: {field: array without the axis S}.

    Conventions: an intrinsic moves from the (h, w) depth map to the patch grid with pixel centres
    at integers, u' = (u + 1/2) gw / w - 1/2. Depth hint and pooled target depth are means over the
    known pixels. The point of a patch is the one seen by the pixel nearest to its centre. Padding
    views, and scenes without a camera, have identity poses, which can be inverted.

    Args:
        tensors: result of `Export.read_scene` for `scene_tensors`.
        shapes: sizes to pad to.
    """
    V, (gh, gw), P = shapes.views, shapes.grid, shapes.patches
    v_own = tensors[shapes.vision].shape[0]
    if shapes.vision == "images":
        tokens = np.zeros((0, P, 0))
    else:
        tokens = tensors[shapes.vision].reshape(v_own, -1, shapes.token_width)
    r, n = shapes.depth_ratio, shapes.boxes
    dtype = np.dtype(shapes.token_dtype)
    rows = {
        "vision_SVPC": _padded(tokens, (V, shapes.view_tokens or P, shapes.token_width), dtype),
        "view_mask_SV": np.arange(V) < v_own,
    }
    camera = tensors.get("vggt/camera_tokens") if shapes.camera_width else None
    rows["camera_mask_S"] = np.array(camera is not None)
    camera = camera if camera is not None else np.zeros((0, 0))
    rows["camera_SVC"] = _padded(camera, (V, shapes.camera_width), dtype)
    depth = tensors.get("vggt/depth")
    hint = patch_mean(depth, shapes.grid) if depth is not None else np.zeros((v_own, gh, gw))
    rows["depth_hint_SVP"] = _padded(hint.reshape(v_own, P), (V, P))
    rows |= _camera_rows(tensors, shapes, v_own) | _seen_rows(tensors, shapes, v_own)
    target = tensors.get("target/depth", np.zeros((0, gh, gw)))
    rows["target_depth_SVhw"] = _padded(patch_mean(target, (gh * r, gw * r)), (V, gh * r, gw * r))
    weight = np.ones((V, gh * r, gw * r), np.float32)
    if "target/depth_weight" in tensors and "target/depth" in tensors:
        stored, known = tensors["target/depth_weight"], held_depth(target)
        weight[:v_own] = patch_mean(stored, (gh * r, gw * r), known=known)
    rows["target_depth_weight_SVhw"] = weight

    boxes = tensors.get("target/boxes", np.zeros((0, 7)))
    labels = tensors.get("target/labels", np.full(len(boxes), -1))
    held = held_boxes(boxes)
    boxes, labels = np.where(held[:, None], boxes, 0), np.where(held, labels, -1)
    rows["target_boxes_SN7"] = _padded(boxes[:n], (n, 7))
    rows["target_labels_SN"] = _padded(labels[:n], (n,), np.int32, fill=-1)
    rows["boxes_known_S"] = np.array("target/boxes" in tensors and len(boxes) <= n and held.all())
    segments = tensors.get("target/segmentation", np.full((0, gh, gw), -1))
    segments = patch_majority(segments, shapes.grid).reshape(-1, P)
    rows["target_segmentation_SVP"] = _padded(segments, (V, P), np.int32, fill=-2)
    return rows | _teacher_rows(tensors, shapes)


def _seen_rows(tensors, shapes: SceneShapes, v_own: int) -> dict[str, np.ndarray]:
    """Returns the rows of pictures and points, of size zero if the model does not see them."""
    G, width = shapes.points, shapes.point_width
    images = np.zeros((0, 0, 0, 3))
    if shapes.vision == "images":
        images = _scaled(tensors["images"], shapes.image)
    # A point needs both its feature and its coordinates.
    known = G > 0 and "sonata/features" in tensors and "sonata/coord" in tensors
    features = tensors["sonata/features"] if known else np.zeros((0, width))
    coord = tensors["sonata/coord"] if known else np.zeros((0, 3))
    frame = tensors.get("sonata/frame", np.zeros(0)) if known else np.zeros(0)
    frame = np.where(frame < v_own, frame, -1)  # the view does not exist, so it is unknown
    return {
        "image_SVhw3": _padded(images, (shapes.views, *shapes.image, 3), np.uint8),
        "point_SJC": _padded(features, (G, width)),
        "coord_SJ3": _padded(coord, (G, 3)),
        "point_frame_SJ": _padded(frame, (G,), np.int32, fill=-1),
        "point_mask_SJ": np.arange(G) < len(coord),
    }


def _scaled(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns pictures uint8 [V, h, w, 3] in another size (h, w), by bicubic interpolation.

    Data sets have pictures of different sizes, and a batch has one.
    """
    if images.shape[1:3] == size:
        return images
    height, width = size
    bicubic = Image.Resampling.BICUBIC
    scaled = [Image.fromarray(i).resize((width, height), bicubic) for i in images]
    return np.stack([np.asarray(image) for image in scaled])


def _teacher_rows(tensors: dict[str, np.ndarray], shapes: SceneShapes) -> dict[str, np.ndarray]:
    V, P, n = shapes.views, shapes.patches, shapes.boxes
    none = np.zeros((0, 1, 1, 0))
    features = tensors.get("teacher/features", none)
    learned = held_features(features)
    features = features.reshape(-1, P, shapes.features) if features.size else features[:, 0]
    bins = tensors.get("teacher/depth_bins", none)
    if bins.size:
        bins = patch_mean(np.asarray(bins, np.float32), shapes.grid, known=np.isfinite(bins))
        mass = bins.sum(-1, keepdims=True)
        bins = np.divide(bins, mass, out=np.zeros_like(bins), where=mass > 0)
        bins = bins.reshape(-1, P, shapes.depth_bins)
    else:
        bins = bins[:, 0]
    detection = tensors.get("teacher/detection_probs", np.zeros((0, shapes.categories)))
    return {
        "teacher_features_SVPF": _padded(features, (V, P, shapes.features)),
        "teacher_features_mask_S": np.array("teacher/features" in tensors and learned),
        "teacher_depth_bins_SVPZ": _padded(bins, (V, P, shapes.depth_bins)),
        "teacher_depth_bins_mask_S": np.array("teacher/depth_bins" in tensors),
        "teacher_detection_SNc": _padded(detection[:n], (n, shapes.categories)),
        "teacher_detection_mask_S": np.array("teacher/detection_probs" in tensors),
    }


def _camera_rows(tensors, shapes: SceneShapes, v_own: int) -> dict[str, np.ndarray]:
    """Returns the rows of the cameras on the patch grid and of the point that each patch sees."""
    V, (gh, gw), P = shapes.views, shapes.grid, shapes.patches
    extrinsic = np.tile(np.eye(3, 4, dtype=np.float32), (V, 1, 1))
    intrinsic = np.tile(np.eye(3, dtype=np.float32), (V, 1, 1))
    points, mask = np.zeros((V, P, 3), np.float32), np.zeros((V, P), bool)
    depth = tensors.get("vggt/depth", tensors.get("target/depth"))
    stored = tensors.get("vggt/points")
    has_camera = "camera/extrinsic" in tensors and "camera/intrinsic" in tensors
    image = depth if depth is not None else stored
    if has_camera:
        extrinsic[:v_own] = tensors["camera/extrinsic"]
    if image is not None:
        h, w = image.shape[1:3]
        # The pixel nearest to the centre of patch i, (i + 1/2) h / gh - 1/2; a tie goes up.
        v = ((np.arange(gh) + 0.5) * h / gh).astype(np.int64)
        u = ((np.arange(gw) + 0.5) * w / gw).astype(np.int64)
        if has_camera:
            K = tensors["camera/intrinsic"].astype(np.float32)
            to_grid = np.diag([gw / w, gh / h, 1.0]).astype(np.float32)
            to_grid[:2, 2] = 0.5 * gw / w - 0.5, 0.5 * gh / h - 0.5
            intrinsic[:v_own] = to_grid @ K
        known = np.ones((v_own, gh, gw), bool)
        if depth is not None:
            z = np.asarray(depth[:, v[:, None], u], np.float32)
            known = held_depth(z)
        if stored is not None:
            seen = np.asarray(stored[:, v[:, None], u], np.float32)
        elif has_camera:
            seen = _unproject(u, v, z, K, extrinsic[:v_own])
        else:
            seen, known = np.zeros((v_own, gh, gw, 3), np.float32), np.zeros_like(known)
        known &= held_places(seen)
        points[:v_own] = np.where(known[..., None], seen, 0).reshape(v_own, P, 3)
        mask[:v_own] = known.reshape(v_own, P)
    return {
        "extrinsic_SV34": extrinsic,
        "intrinsic_SV33": intrinsic,
        "points_SVP3": points,
        "points_mask_SVP": mask,
    }


def _unproject(u, v, z, intrinsic, extrinsic) -> np.ndarray:
    """Returns world points [V, gh, gw, 3] of pixels (u [gw], v [gh]) at depths z [V, gh, gw].

    A camera-from-world pose takes world x to camera R x + t, so world = R^T (camera - t).
    """
    grid = np.stack(np.broadcast_arrays(u[None, :], v[:, None], 1.0), axis=-1)
    rays = np.einsum("vij,hwj->vhwi", np.linalg.inv(intrinsic), grid)
    in_camera = rays * z[..., None] - extrinsic[:, None, None, :, 3]
    return np.einsum("vji,vhwj->vhwi", extrinsic[:, :, :3], in_camera).astype(np.float32)


def _padded(
    array: np.ndarray, shape: tuple[int, ...], dtype: DTypeLike = np.float32, fill: int = 0
) -> np.ndarray:
    """Returns an array of a larger shape with the given array at its origin."""
    if array.shape == shape:
        return array.astype(dtype, copy=False)
    out = np.full(shape, fill, dtype)
    if array.size:
        out[tuple(slice(size) for size in array.shape)] = array
    return out


@functools.lru_cache(maxsize=64)
def _starts(size: int, cells: int) -> np.ndarray:
    """Returns the first pixel of every cell: pixel y lies in cell floor((y + 1/2) cells / size).

    If there are more cells than pixels, a cell takes the pixel nearest to its centre.
    """
    first = np.ceil(np.arange(cells) * size / cells - 0.5).astype(np.int64)
    return np.clip(first, 0, size - 1)


def patch_mean(values, cells: tuple[int, int], known=None) -> np.ndarray:
    """Averages the known pixels of every cell: [V, h, w, ...] -> [V, *cells, ...]; 0 = none known.

    Args:
        values: depth or another quantity per pixel.
        cells: rows and columns of the result.
        known: mask of the same shape; None for `targets.held_depth` of the values.
    """
    values = np.asarray(values, np.float32)
    known = held_depth(values) if known is None else known
    rows, columns = _starts(values.shape[1], cells[0]), _starts(values.shape[2], cells[1])

    def total(array):
        return np.add.reduceat(np.add.reduceat(array, rows, axis=1), columns, axis=2)

    if (values.shape[1], values.shape[2]) == tuple(cells):
        return np.where(known, values, 0)
    count = total(known.astype(np.float32))
    return total(np.where(known, values, 0)) / np.maximum(count, 1)


def patch_majority(labels: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
    """Returns the commonest label of every cell: [V, h, w] -> [V, *cells] int32; ties avoid -1."""
    v, h, w = labels.shape
    # More cells than pixels: repeat the pixels first.
    labels = np.repeat(np.repeat(labels, -(-cells[0] // h), axis=1), -(-cells[1] // w), axis=2)
    _, h, w = labels.shape
    row = np.searchsorted(_starts(h, cells[0]), np.arange(h), side="right") - 1
    column = np.searchsorted(_starts(w, cells[1]), np.arange(w), side="right") - 1
    width = int(labels.max(initial=-1)) + 2  # -1 becomes the last, which loses ties
    cell = (np.arange(v)[:, None, None] * cells[0] + row[:, None]) * cells[1] + column
    label = np.where(labels < 0, width - 1, labels)
    ballots = (cell * width + label).reshape(-1)
    votes = np.bincount(ballots, minlength=v * cells[0] * cells[1] * width)
    winner = votes.reshape(v, *cells, width).argmax(-1)
    return np.where(winner == width - 1, -1, winner).astype(np.int32)


def empty_rows(shapes: SceneShapes) -> dict[str, np.ndarray]:
    """Returns the rows of a slot without a scene: one visible view of zeros, nothing supervised."""
    if shapes.vision == "images":
        view = np.zeros((1, *shapes.image, 3), np.uint8)
    else:
        tokens = shapes.view_tokens or shapes.patches
        view = np.zeros((1, tokens, shapes.token_width), np.float32)
    # The zeros are not the teacher's features, even where the student sees such features.
    no_teacher = {"teacher_features_mask_S": np.array(False)}
    return batch_rows({shapes.vision: view}, shapes) | no_teacher


def stack_rows(rows: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the rows of S scenes, stacked along a new leading axis S."""
    rows = list(rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
