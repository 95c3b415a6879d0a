"""Exports VGGT's tokens, depth, points and cameras of pictures or videos for geode_jax.

Runs in the environment of https://github.com/facebookresearch/vggt (README.md beside this file):

    python export_vggt.py --root scans --subfolder color --out export --shard 0/8
    python export_vggt.py --root scans --subfolder color --out export --merge
    python export_vggt.py --export prepared --out with_vggt

The world of a scene is its first camera's, OpenCV axes, in VGGT's own unit: `scale: scene`. With
`--export`, the scenes and pictures are those of a metric export, whose world, cameras, true depth,
boxes, questions and teacher stay; VGGT's tokens, depth and points are added in that world. Scenes
that are pictures alone (VSI-Bench's) get VGGT's own world.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export_aligned as onto
import export_job as job
import export_pictures as reading
import export_views as views

SIZE = 518
"""Pixels of the longer side (pad) or of the width (crop), as VGGT was trained."""
LICENCES = {
    "facebook/VGGT-1B": "CC-BY-NC-4.0 (weights)",
    "facebook/VGGT-1B-Commercial": "VGGT commercial licence, gated (weights)",
}
MAX_MISFIT = 0.1
"""Largest RMS distance of aligned chunks' shared points, as a share of these points' spread."""


# --- The model ------------------------------------------------------------------------------------


def load_model(torch: Any, weights: str, device: str) -> Any:
    """Returns VGGT with weights from a file (.pt, .safetensors), a folder, or Hugging Face."""
    from vggt.models.vggt import VGGT

    if Path(weights).is_file():
        model = VGGT()
        model.load_state_dict(job.load_weights(torch, Path(weights)))
    else:
        model = VGGT.from_pretrained(weights)
    return model.eval().to(device)


def reconstruct(torch: Any, model: Any, pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the outputs of one pass of VGGT over overlapping views.

    Args:
        torch: the module.
        model: VGGT.
        pictures: uint8 [V, H, W, 3].

    Returns:
        float32 tokens [V, H / 14, W / 14, C] and camera_tokens [V, C] of the aggregator's last
        layer, depth, depth_conf [V, H, W], points [V, H, W, 3], points_conf [V, H, W], extrinsic
        [V, 3, 4] and intrinsic [V, 3, 3] for [H, W].
    """
    from vggt.utils.pose_enc import pose_encoding_to_extri_intri

    device = next(model.parameters()).device
    images = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float()[None] / 255
    cuda = device.type == "cuda"
    half = torch.bfloat16
    if cuda and torch.cuda.get_device_capability(device)[0] < 8:
        half = torch.float16
    with torch.inference_mode():
        # As upstream: the aggregator in half precision, the heads in float32.
        with torch.autocast(device.type, dtype=half, enabled=cuda):
            layers, start = model.aggregator(images)
        # The aggregator keeps the layers that the heads need; the others are None.
        layers = [None if layer is None else layer.float() for layer in layers]
        pose = model.camera_head(layers)[-1]
        depth, depth_conf = model.depth_head(layers, images=images, patch_start_idx=start)
        points, points_conf = model.point_head(layers, images=images, patch_start_idx=start)
        extrinsic, intrinsic = pose_encoding_to_extri_intri(pose, images.shape[-2:])
        if layers[-1] is None:
            raise RuntimeError("VGGT's aggregator does not return its last layer")
        last = layers[-1][0]
        patch = model.aggregator.patch_size
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        out = {
            "tokens": last[:, start:].reshape(len(last), *grid, -1),
            "camera_tokens": last[:, 0],
            "depth": depth[0, ..., 0],
            "depth_conf": depth_conf[0],
            "points": points[0],
            "points_conf": points_conf[0],
            "extrinsic": extrinsic[0],
            "intrinsic": intrinsic[0],
        }
        return {name: tensor.float().cpu().numpy() for name, tensor in out.items()}


# --- Long videos ----------------------------------------------------------------------------------


def chunk_ranges(count: int, chunk: int, overlap: int) -> list[tuple[int, int]]:
    """Returns ranges of at most `chunk` views; each shares `overlap` views with the previous."""
    if count <= chunk:
        return [(0, count)]
    starts = range(0, count - overlap, chunk - overlap)
    return [(start, min(start + chunk, count)) for start in starts]


def misfit_of(moved: np.ndarray, fixed: np.ndarray, weight: np.ndarray) -> float:
    """Returns the RMS distance of points [N, 3], as a share of the fixed ones' from their centre.

    Args:
        moved, fixed: [N, 3], the same points.
        weight: [N], not negative.
    """
    spread = ((fixed - weight @ fixed / weight.sum()) ** 2).sum(-1)
    return float(np.sqrt((weight @ ((moved - fixed) ** 2).sum(-1)) / (weight @ spread)))


def reconstruct_long(
    torch: Any, model: Any, contract: Any, pictures: np.ndarray, chunk: int, overlap: int
) -> tuple[dict[str, np.ndarray], float]:
    """Returns `reconstruct` of many views, in chunks aligned to the first chunk's frame and scale.

    Two chunks share `overlap` views, whose pixels are the same points in both. The similarity is
    fitted to the half with higher confidence. Depths, points and cameras are transformed by it.
    Tokens cannot be: those of a later chunk refer to that chunk's own first camera.

    Returns:
        The arrays, and the largest misfit (0 for one chunk).

    Raises:
        InputError: the misfit of two chunks is too large.
    """
    whole: dict[str, np.ndarray] = {}
    worst = 0.0
    for start, end in chunk_ranges(len(pictures), chunk, overlap):
        part = reconstruct(torch, model, pictures[start:end])
        shared = 0
        if whole:
            shared = len(whole["depth"]) - start
            sure = np.minimum(whole["points_conf"][start:], part["points_conf"][:shared])
            use = sure >= np.median(sure)
            moving = part["points"][:shared][use].astype(np.float64)
            fixed = whole["points"][start:][use].astype(np.float64)
            weight = sure[use].astype(np.float64)
            similarity = contract.alignment.fit_similarity(moving, fixed, weight)
            misfit = misfit_of(similarity.points(moving), fixed, weight)
            worst = max(worst, misfit)
            if not misfit <= MAX_MISFIT:
                raise job.InputError(
                    f"views {start} to {start + shared - 1} do not fit between two chunks "
                    f"(misfit {misfit:.2f} > {MAX_MISFIT}): use a larger --chunk or fewer --views"
                )
            part["points"] = similarity.points(part["points"])
            part["depth"] = similarity.scale * part["depth"]
            part["extrinsic"] = similarity.extrinsic(part["extrinsic"])
        for name, array in part.items():
            array = np.asarray(array[shared:], np.float32)
            whole[name] = np.concatenate([whole[name], array]) if name in whole else array
    return whole, worst


# --- To the contract ------------------------------------------------------------------------------


def half(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns values as float16, and the number of those clipped to its range."""
    limit = np.finfo(np.float16).max
    return np.clip(values, -limit, limit).astype(np.float16), int((np.abs(values) > limit).sum())


def to_contract(
    made: dict[str, np.ndarray],
    pictures: np.ndarray,
    inside: np.ndarray,
    grid: tuple[int, int],
    pixels: int,
    with_images: bool,
) -> tuple[dict[str, np.ndarray], int]:
    """Returns the tensors of the contract, and the number of clipped values.

    Depth outside the picture (padding) is 0, which means missing.
    """
    size = (grid[0] * pixels, grid[1] * pixels)
    tokens = views.area_mean(made["tokens"], grid)
    arrays = {
        "vggt/tokens": tokens.reshape(len(tokens), -1, tokens.shape[-1]),
        "vggt/camera_tokens": made["camera_tokens"],
        "camera/extrinsic": made["extrinsic"],
        "camera/intrinsic": views.resized_intrinsic(made["intrinsic"], inside.shape[1:], size),
    }
    clipped = 0
    made = {**made, "depth": np.where(inside, made["depth"], 0)}
    for name in ("depth", "depth_conf", "points", "points_conf"):
        arrays[f"vggt/{name}"], count = half(views.nearest(made[name], size))
        clipped += count
    if with_images:
        arrays["images"] = pictures
    return arrays, clipped


# --- The command ----------------------------------------------------------------------------------


def scenes_of(args: argparse.Namespace) -> list[job.Scene]:
    """Returns the scenes that the arguments name, with their splits.

    Raises:
        InputError: there is no scene, or two have the same name.
    """
    places = [Path(path) for path in args.scene or ()]
    if args.root:
        if not args.root.is_dir():
            raise job.InputError(f"{args.root}: no such folder")
        places += [
            path
            for path in sorted(args.root.iterdir(), key=reading.natural_order)
            if path.suffix.lower() in reading.VIDEOS or (path / args.subfolder).is_dir()
        ]
    sources = {}
    for place in places:
        is_video = place.suffix.lower() in reading.VIDEOS
        sources[place.stem if is_video else place.resolve().name] = (
            place if is_video else place / args.subfolder
        )
    if not sources or len(sources) != len(places):
        raise job.InputError(
            f"{len(places)} scenes with {len(sources)} different names: see --help"
        )
    for source in sources.values():
        if not source.exists():
            raise job.InputError(f"{source}: no such folder or video")
    splits = job.splits_of(
        sources,
        args.split,
        args.splits,
        allow_missing=args.allow_missing,
        contract=args.contract,
    )
    return [job.Scene(name, splits[name], source) for name, source in sources.items()]


_OF_AN_EXPORT = (
    *("root", "scene", "subfolder", "split", "splits", "allow_missing", "questions"),
    *("preprocess", "views", "pool", "pixels", "no_images"),
)
"""Arguments that say what `--export` says."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the command's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    job.add_arguments(parser)
    parser.add_argument(
        "--root", type=Path, help="data set: a folder of scenes (folders or videos)"
    )
    parser.add_argument("--scene", nargs="+", help="scenes: folders of pictures, or videos")
    parser.add_argument(
        "--export",
        type=Path,
        help="export whose scenes and pictures are taken; VGGT's depth and points are aligned to "
        "its metric world, if it has one",
    )
    parser.add_argument(
        "--max-residual",
        type=float,
        default=onto.MAX_RESIDUAL,
        help="with --export: metres by which a scene may be displaced after the alignment; more "
        "is refused (%(default)s)",
    )
    parser.add_argument(
        "--subfolder", default=".", help="folder of the pictures in a scene, such as color"
    )
    parser.add_argument("--split", default="train", choices=("train", "val", "test"))
    parser.add_argument("--splits", type=Path, help="list of `scene split`; all others get --split")
    parser.add_argument(
        "--allow-missing", action="store_true", help="count entries of --splits that name no scene"
    )
    parser.add_argument("--questions", type=Path, help="questions.jsonl about the scenes")
    parser.add_argument("--weights", default="facebook/VGGT-1B", help="name, folder or file")
    parser.add_argument("--licence", default="", help="licence of other weights")
    parser.add_argument(
        "--commit", default="", help="commit of the vggt checkout, if git does not know it"
    )
    parser.add_argument("--device", default="", help="default: cuda if present, else cpu")
    parser.add_argument("--preprocess", default="crop", choices=("crop", "pad"))
    parser.add_argument(
        "--size", type=int, default=SIZE, help="side of the pictures, pixels (%(default)s)"
    )
    parser.add_argument(
        "--views", type=int, default=32, help="most views of a scene, evenly spaced"
    )
    parser.add_argument("--chunk", type=int, default=100, help="most views of one pass of VGGT")
    parser.add_argument("--overlap", type=int, default=10, help="views that two chunks share")
    parser.add_argument("--pool", action="store_true", help="store means of 2 x 2 tokens")
    parser.add_argument(
        "--pixels", type=int, default=14, help="depth pixels along the side of a patch"
    )
    parser.add_argument("--no-images", action="store_true", help="do not store the pictures")
    args = parser.parse_args(argv)
    unused = _OF_AN_EXPORT if args.export else ("max_residual",)
    given = [name for name in unused if getattr(args, name) != parser.get_default(name)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        rule = "is not for --export, which has scenes, pictures, splits, questions and a grid"
        raise job.InputError(f"{option}: {rule if args.export else 'is for --export alone'}")
    if not 0 < args.max_residual < np.inf:
        raise job.InputError(f"--max-residual: {args.max_residual} is no length above 0")
    if not 0 < args.overlap < args.chunk or min(args.views, args.pixels, args.size) < 1:
        raise job.InputError("needs 0 < --overlap < --chunk, and --views, --pixels, --size above 0")
    return args


def notes_of(args: argparse.Namespace) -> str:
    """Returns the manifest's notes: how the arrays were made."""
    pooled = "area means onto half the grid (--pool)" if args.pool else "as they are"
    return (
        f"preprocessing: {args.preprocess}, {args.size} pixels; at most {args.views} views, "
        f"evenly spaced. Tokens: last aggregator layer, patch part, {pooled}. World: the first "
        "camera, OpenCV axes, VGGT's unit (not metric). Depth, points and confidences: float16, "
        f"nearest pixel, {args.pixels} a side of a patch; padding has depth 0. Scenes of more than "
        f"{args.chunk} views: chunks with {args.overlap} views in common, brought into the first "
        "one's frame and scale by a similarity of their shared points; tokens of later chunks "
        "speak of their own first camera."
    )


class Loaded(NamedTuple):
    """VGGT, ready to run.

    Attributes:
        torch: the module.
        model: VGGT.
        commit: of its code.
        licence: of its weights.
    """

    torch: Any
    model: Any
    commit: str
    licence: str


def loaded(args: argparse.Namespace) -> Loaded:
    """Returns VGGT.

    Raises:
        InputError: this is not its environment, or an argument is missing or wrong.
    """
    try:
        import torch
        import vggt
    except ImportError as error:
        raise job.InputError(f"not in VGGT's environment: {error}") from None
    licence = args.licence or LICENCES.get(args.weights)
    if not licence:
        raise job.InputError(f"--licence: is needed for the weights {args.weights}")
    commit = job.commit_of(vggt, args.commit)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(torch, args.weights, device)
    patch = model.aggregator.patch_size
    if args.size % patch:
        raise job.InputError(f"--size: {args.size} is no multiple of the patches' {patch} pixels")
    return Loaded(torch, model, commit, licence)


def begin_onto(args: argparse.Namespace, base: Any):
    """Loads the model for the scenes of an export; see `job.run`."""
    contract, vggt = job.load_contract(args.contract), loaded(args)
    patch, grid = vggt.model.aggregator.patch_size, base.patch_grid
    metric = base.manifest["scale"] == "metric"

    def make(scene: job.Scene) -> job.Made:
        arrays = base.read_scene(scene.id)
        return make_onto(scene, arrays) if metric else make_alone(scene, arrays)

    def make_alone(scene: job.Scene, arrays: dict[str, np.ndarray]) -> job.Made:
        pictures = onto.squares_of(arrays, args.size)
        made, misfit = reconstruct_long(
            vggt.torch, vggt.model, contract, pictures, args.chunk, args.overlap
        )
        inside = np.ones(pictures.shape[:3], bool)
        new, _ = to_contract(made, pictures, inside, grid, onto.MAP_PIXELS, with_images=False)
        report = f"{len(pictures)} views in VGGT's own world, misfit of chunks at most {misfit:.3f}"
        return job.Made({**arrays, **new}, report=report)

    def make_onto(scene: job.Scene, arrays: dict[str, np.ndarray]) -> job.Made:
        size = onto.map_size(arrays, grid)
        pictures = onto.pictures_of(arrays, size, args.size, patch)
        made, _ = reconstruct_long(
            vggt.torch, vggt.model, contract, pictures, args.chunk, args.overlap
        )
        found = onto.aligned(contract, arrays, made, grid, size, args.max_residual)
        return job.Made(found.arrays, report=found.report, alignment=found.alignment)

    width = 2 * vggt.model.aggregator.camera_token.shape[-1]
    weights = job.name_of(args.weights)
    header = onto.header_of(base, weights, vggt.commit, vggt.licence, width, args.max_residual)
    return header, make


def begin(args: argparse.Namespace, scenes: list[job.Scene]):
    """Loads the model for pictures and videos; see `job.run`."""
    contract, vggt = job.load_contract(args.contract), loaded(args)
    model, patch = vggt.model, vggt.model.aggregator.patch_size

    def views_of(scene: job.Scene, most: int) -> tuple[np.ndarray, np.ndarray]:
        ready = [
            reading.prepare(picture, args.preprocess, args.size, patch)
            for picture in reading.read_pictures(scene.source, most, args.contract)
        ]
        if len({pixels.shape for pixels, _ in ready}) > 1:
            raise job.InputError(f"{scene.source}: pictures of several shapes: --preprocess pad")
        return np.stack([pixels for pixels, _ in ready]), np.stack([inside for _, inside in ready])

    def grid_of(pictures: np.ndarray) -> tuple[int, int]:
        h, w = (side // patch for side in pictures.shape[1:3])
        return (max(1, h // 2), max(1, w // 2)) if args.pool else (h, w)

    # The grid of the whole job's first scene, so that all shards write the same header.
    grid = grid_of(views_of(scenes[0], 1)[0])

    def make(scene: job.Scene) -> job.Made:
        pictures, inside = views_of(scene, args.views)
        if grid_of(pictures) != grid:
            raise job.InputError(
                f"{scene.source}: {grid_of(pictures)} patches, {grid} in the first scene: "
                "an export has one grid, which --preprocess pad gives"
            )
        made, misfit = reconstruct_long(
            vggt.torch, model, contract, pictures, args.chunk, args.overlap
        )
        arrays, clipped = to_contract(made, pictures, inside, grid, args.pixels, not args.no_images)
        report = [f"{len(pictures)} views"]
        if len(pictures) > args.chunk:
            report.append(f"misfit of chunks at most {misfit:.3f}")
        if clipped:
            report.append(f"{clipped} values clipped to float16")
        return job.Made(arrays, report=", ".join(report))

    producer = {
        "project": "facebookresearch/vggt",
        "commit": vggt.commit,
        "weights": job.name_of(args.weights),
        "licence": vggt.licence,
        "preprocessing": args.preprocess,
    }
    header = {
        "producer": producer,
        "dtype": "bfloat16",
        "scale": "scene",
        "token_width": 2 * model.aggregator.camera_token.shape[-1],
        "patch_grid": grid,
        "tokens_contain_depth": False,
        "categories": [],
        "notes": notes_of(args),
    }
    return header, make


def _main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    contract = job.load_contract(args.contract)
    if args.export:
        base = contract.Export(args.export)
        asked = base.manifest["questions"]
        scenes = [job.Scene(e["id"], e["split"], [e, asked]) for e in base.manifest["scenes"]]
        return job.run(args, contract, scenes, lambda: begin_onto(args, base), base.questions)
    scenes = scenes_of(args)
    questions = (lambda: job.read_records(contract, args.questions)) if args.questions else tuple
    return job.run(args, contract, scenes, lambda: begin(args, scenes), questions)


main = job.guarded("export_vggt", _main)

if __name__ == "__main__":
    sys.exit(main())
