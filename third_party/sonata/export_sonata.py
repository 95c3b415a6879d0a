"""Adds Sonata's coarse point tokens to the scenes of an export, as a new export.

Runs in the environment of https://github.com/facebookresearch/sonata (README.md beside this file):

    python export_sonata.py --export vggt_export --out with_points
    python export_sonata.py --export prepared --scans meshes --out with_points

A metric export keeps its world frame, which `sonata/coord` uses too, beside cameras and boxes. An
export without scale
(VGGT's) is transformed, with cameras and points, to the frame that Sonata was trained in: metres
(estimated), z up, centred, the floor at 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export_job as job
import export_views as views
from export_scans import Cloud, read_scan

VOXEL_EDGE = 0.02
"""Edge of the input's voxels in metres, as in Sonata's training."""
LICENCE = "CC-BY-NC-4.0 (weights)"


# --- Points of an export --------------------------------------------------------------------------


def image_normals(points: np.ndarray, known: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Returns normals [V, h, w, 3] of the surface through neighbouring pixels, facing the camera.

    They are zero where a neighbour is missing.

    Args:
        points: [V, h, w, 3].
        known: [V, h, w] whether a pixel has a point.
        centres: [V, 3] camera centres.
    """
    right, down = np.zeros_like(points), np.zeros_like(points)
    right[:, :, :-1] = points[:, :, 1:] - points[:, :, :-1]
    down[:, :-1] = points[:, 1:] - points[:, :-1]
    right[:, :, -1], down[:, -1] = right[:, :, -2], down[:, -2]
    whole = known.copy()
    whole[:, :, :-1] &= known[:, :, 1:]
    whole[:, :-1] &= known[:, 1:]
    normal = np.cross(right, down)
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    normal = np.divide(normal, length, out=np.zeros_like(normal), where=length > 0)
    away = ((centres[:, None, None] - points) * normal).sum(-1, keepdims=True) < 0
    return np.where(whole[..., None], np.where(away, -normal, normal), 0)


def cloud_of(arrays: dict[str, np.ndarray], source: str, unsure: float) -> Cloud:
    """Returns the points that a scene's views see.

    Args:
        arrays: tensors of the scene.
        source: "depth" (VGGT's, unprojected), "points" (VGGT's) or "target" (the true depth).
        unsure: share of points, those of least confidence, that is left out.

    Raises:
        InputError: the scene lacks what the source needs.
    """
    name = {"depth": "vggt/depth", "points": "vggt/points", "target": "target/depth"}[source]
    cameras = ("camera/extrinsic", "camera/intrinsic")
    for needed in (name, *cameras):
        if needed not in arrays:
            raise job.InputError(f"the scene has no {needed}, which --points {source} needs")
    if source == "points":
        points = arrays[name].astype(np.float64)
        depth = arrays.get("vggt/depth", np.ones(points.shape[:3]))
        known = depth > 0
    else:
        depth = arrays[name].astype(np.float64)
        points = views.unprojected(depth, *(arrays[name] for name in reversed(cameras)))
        known = depth > 0
    confidence = arrays.get(f"{name}_conf")
    if confidence is not None and known.any():
        confidence = confidence.astype(np.float32)
        known &= confidence >= np.quantile(confidence[known], unsure)
    pose = arrays["camera/extrinsic"].astype(np.float64)
    centres = -np.einsum("vji,vj->vi", pose[:, :, :3], pose[:, :, 3])
    normal = image_normals(points, known, centres)
    colour = None
    if "images" in arrays:
        colour = views.nearest(arrays["images"], points.shape[1:3])[known].astype(np.float64)
    view = np.broadcast_to(np.arange(len(points))[:, None, None], known.shape)
    if not known.any():
        raise job.InputError("the scene has no known point")
    return Cloud(points[known], colour, normal[known], view[known])


def choose_voxels(points: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the point of every voxel that is nearest to its centre, the first on a tie.

    Upstream's own transform draws one at random.

    Args:
        points: [N, 3].
        size: edge of a voxel.

    Returns:
        indices [n] in the lexicographic order of the voxels, and grid coordinates [n, 3] from 0.
    """
    grid = np.floor(points / size).astype(np.int64)
    off = ((points / size - grid - 0.5) ** 2).sum(-1)
    grid -= grid.min(0)
    order = np.lexsort((np.arange(len(points)), off, grid[:, 2], grid[:, 1], grid[:, 0]))
    ordered = grid[order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(-1)
    return order[first], ordered[first]


# --- The model ------------------------------------------------------------------------------------


def load_model(torch: Any, weights: str, device: str) -> Any:
    """Returns Sonata's encoder, with serialization orders that are not shuffled.

    Args:
        torch: the module.
        weights: a file of {"config", "state_dict"}, or a name in facebook/sonata, as `sonata`.
        device: name of the torch device.

    Raises:
        InputError: the file is no such checkpoint.
    """
    from sonata.model import PointTransformerV3

    path = Path(weights)
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download("facebook/sonata", f"{weights}.pth"))
    checkpoint = job.load_weights(torch, path)
    if not isinstance(checkpoint, dict) or not {"config", "state_dict"} <= checkpoint.keys():
        raise job.InputError(f"{path}: not a checkpoint with config and state_dict")
    config = {**checkpoint["config"], "shuffle_orders": False, "traceable": True}
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        config["enable_flash"] = False
    model = PointTransformerV3(**config)
    model.load_state_dict(checkpoint["state_dict"])
    for module in model.modules():
        # Pooling layers do not get the option from the configuration.
        if hasattr(module, "shuffle_orders"):
            module.shuffle_orders = False
        if hasattr(module, "traceable"):
            module.traceable = True
    return model.eval().to(device)


def encode(torch: Any, model: Any, features: np.ndarray, grid: np.ndarray) -> tuple:
    """Returns the coarsest stage of Sonata.

    Args:
        torch: the module.
        model: Sonata.
        features: [n, 6 or 9]; the first three are the position.
        grid: int [n, 3] voxel coordinates.

    Returns:
        Features [J, C], coordinates [J, 3] (means of the stage before), and [n] the index of the
        coarse point that each input point was pooled into.
    """
    device = next(model.parameters()).device
    feat = torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(device)
    given = {
        "coord": feat[:, :3],
        "grid_coord": torch.from_numpy(grid).to(device),
        "feat": feat,
        "offset": torch.tensor([len(feat)], device=device),
    }
    with torch.inference_mode():
        point = model(given)
        out = point["feat"].float().cpu().numpy(), point["coord"].float().cpu().numpy()
        steps = []
        while "pooling_parent" in point:
            steps.append(point["pooling_inverse"].cpu().numpy())
            point = point["pooling_parent"]
    cell = np.arange(len(features))
    for step in reversed(steps):
        cell = step[cell]
    return (*out, cell)


def majority(cell: np.ndarray, view: np.ndarray, cells: int) -> np.ndarray:
    """Returns int32 [cells], the view that most points of a cell come from, the first on a tie."""
    count = int(view.max()) + 1
    votes = np.bincount(cell * count + view, minlength=cells * count)
    return votes.reshape(cells, count).argmax(-1).astype(np.int32)


# --- The command ----------------------------------------------------------------------------------


def moved(arrays: dict[str, np.ndarray], similarity: Any) -> dict[str, np.ndarray]:
    """Returns a scene with cameras, depths and points transformed by a similarity.

    Raises:
        InputError: the scene has boxes, which cannot be rotated about other axes than z.
    """
    if "target/boxes" in arrays:
        raise job.InputError(
            "the scene has target/boxes but no metric world: they cannot be turned (VGGT's "
            "exporter with --export keeps the metric world of an export that has boxes)"
        )
    out = dict(arrays)
    for name in ("vggt/depth", "target/depth", "vggt/points", "camera/extrinsic"):
        if name not in arrays:
            continue
        values = arrays[name].astype(np.float64)
        if name == "camera/extrinsic":
            out[name] = similarity.extrinsic(values).astype(np.float32)
        else:
            values = similarity.points(values) if "points" in name else similarity.scale * values
            kept = np.float32 if arrays[name].dtype == np.float32 else np.float16
            limit = np.finfo(kept).max
            out[name] = np.clip(values, -limit, limit).astype(kept)
    return out


def add_points(
    arrays: dict[str, np.ndarray],
    cloud: Cloud,
    args: argparse.Namespace,
    metric: bool,
    frames: Any,
    run_model: Any,
    channels: int,
) -> tuple[dict[str, np.ndarray], str]:
    """Returns the scene with `sonata/` tensors, and a few words about it for the terminal."""
    missing = [
        name
        for name, field, wanted in (
            ("colour", cloud.colour, args.colour),
            ("normal", cloud.normal, args.normal),
        )
        if field is None and wanted == "given" and (name == "colour" or channels == 9)
    ]
    if missing:
        raise job.InputError(
            f"the points have no {' and no '.join(missing)}: --{missing[0]} zeros feeds zeros"
        )
    similarity = frames.to_sonata_frame(
        cloud.points,
        up=tuple(args.up or ((0.0, 0.0, 1.0) if metric else frames.Y_DOWN)),
        metres_per_unit=1.0 if metric else args.metres_per_unit,
        height=args.height or frames.ROOM_HEIGHT,
    )
    points = similarity.points(cloud.points)
    index, grid = choose_voxels(points, VOXEL_EDGE)
    chosen = cloud.taken(index)
    fed = [points[index]]
    for field, wanted, scale in (
        (chosen.colour, args.colour, 255),
        (chosen.normal, args.normal, 1),
    ):
        if wanted == "zeros" or field is None:
            field = np.zeros_like(fed[0])
        fed.append(field / scale)
    fed[2] = fed[2] @ similarity.rotation.T
    features, coord, cell = run_model(np.concatenate(fed, -1)[:, :channels], grid)
    out = arrays if metric else moved(arrays, similarity)
    if metric:  # from Sonata's centred frame to the export's world
        coord = (coord - similarity.translation) @ similarity.rotation
    out = {**out, "sonata/features": features, "sonata/coord": coord.astype(np.float32)}
    if chosen.view is not None:
        out["sonata/frame"] = majority(cell, chosen.view, len(features))
    words = f"{len(points)} points, {len(index)} voxels, {len(features)} tokens"
    return out, words if metric else f"{words}, {similarity.scale:.3f} m a unit"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the command's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    job.add_arguments(parser)
    parser.add_argument("--export", required=True, type=Path, help="export with the scenes")
    parser.add_argument(
        "--scans", type=Path, help="folder of SCENE.ply or SCENE.npz, read instead of views"
    )
    parser.add_argument(
        "--points",
        default="depth",
        choices=("depth", "points", "target"),
        help="source of the points in the export: vggt/depth, vggt/points or target/depth",
    )
    parser.add_argument(
        "--unsure", type=float, default=0.2, help="share of least confident points left out"
    )
    parser.add_argument(
        "--colour", default="given", choices=("given", "zeros"), help="colours of the points"
    )
    parser.add_argument(
        "--normal", default="given", choices=("given", "zeros"), help="normals of the points"
    )
    parser.add_argument(
        "--up", type=float, nargs=3, help="up direction in the export's world frame"
    )
    parser.add_argument("--metres-per-unit", type=float, help="scale of the export, if known")
    parser.add_argument(
        "--height",
        type=float,
        help="metres from floor to ceiling, if the scale is unknown (default: 3)",
    )
    parser.add_argument("--weights", default="sonata", help="name in facebook/sonata, or a file")
    parser.add_argument("--licence", default=LICENCE, help="licence of the weights")
    parser.add_argument(
        "--commit", default="", help="commit of the sonata checkout, if git does not know it"
    )
    parser.add_argument("--device", default="", help="default: cuda if present, else cpu")
    args = parser.parse_args(argv)
    if not 0 <= args.unsure < 1:
        raise job.InputError(f"--unsure: {args.unsure} is no share below 1")
    for name, value in (("height", args.height), ("metres-per-unit", args.metres_per_unit)):
        if value is not None and not 0 < value < np.inf:
            raise job.InputError(f"--{name}: {value} is no length above 0")
    if args.up and not 0 < np.linalg.norm(args.up) < np.inf:
        raise job.InputError(f"--up: {args.up} is no direction")
    return args


def header_of(args: argparse.Namespace, base: Any, commit: str) -> dict:
    """Returns the header of the new export.

    Raises:
        InputError: scans have no known position in an export without scale.
    """
    metric = base.manifest["scale"] == "metric"
    if args.scans and not metric:
        raise job.InputError("--scans: the export has no metric world that a scan could be in")
    scaled = [name for name in ("height", "metres_per_unit") if getattr(args, name) is not None]
    if metric and scaled:
        raise job.InputError(f"--{scaled[0].replace('_', '-')}: {args.export} is metric already")
    if metric:
        rule = "world kept (metric, z up); centred and put on the floor for the network alone"
    elif args.metres_per_unit:
        rule = f"scenes moved to z up, floor 0, {args.metres_per_unit} metres a unit (given)"
    else:
        height = args.height or job.load_contract(args.contract).frames.ROOM_HEIGHT
        rule = f"scenes moved to z up, floor 0, scaled to {height} m from floor to ceiling"
    up = args.up or ("z" if metric else "-y of the first camera")
    notes = (
        f"Sonata: {'scans' if args.scans else args.points + ' of the views'}, the least confident "
        f"{args.unsure} left out; {rule}; up is {up}; voxels of {VOXEL_EDGE} m, the point nearest "
        f"to the centre; orders fixed; colour {args.colour}, normals {args.normal}."
    )
    producer = dict(base.manifest["producer"])
    producer["licence"] += f"; Sonata: {args.licence}"
    producer.update({"sonata_commit": commit, "sonata_weights": job.name_of(args.weights)})
    kept = ("dtype", "token_width", "patch_grid", "tokens_contain_depth", "categories")
    header = {name: base.manifest[name] for name in kept}
    if "teacher_tokenizer" in base.manifest:
        header["teacher_tokenizer"] = base.manifest["teacher_tokenizer"]
    return {
        **header,
        "producer": producer,
        "scale": "metric" if metric or args.metres_per_unit else "scene",
        "notes": f"{base.manifest['notes']} {notes}".strip(),
    }


def begin(args: argparse.Namespace, base: Any):
    """Loads the model; see `job.run`."""
    try:
        import sonata
        import torch
    except ImportError as error:
        raise job.InputError(f"not in Sonata's environment: {error}") from None
    header = header_of(args, base, job.commit_of(sonata, args.commit))
    frames = job.load_contract(args.contract).frames
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(torch, args.weights, device)
    channels = model.embedding.in_channels
    if channels not in (6, 9):
        raise job.InputError(f"{args.weights}: takes {channels} channels, not 6 or 9")
    metric = base.manifest["scale"] == "metric"

    def make(scene: job.Scene) -> job.Made:
        arrays = base.read_scene(scene.id)
        if args.scans:
            files = [args.scans / f"{scene.id}{suffix}" for suffix in (".ply", ".npz")]
            found = [path for path in files if path.is_file()]
            if not found:
                raise job.InputError(f"{files[0]}: no such file, nor .npz")
            cloud = read_scan(found[0])
        else:
            cloud = cloud_of(arrays, args.points, args.unsure)
        out, words = add_points(
            arrays,
            cloud,
            args,
            metric,
            frames,
            lambda features, grid: encode(torch, model, features, grid),
            channels,
        )
        return job.Made(out, report=words, alignment=scene.source[0].get("alignment"))

    return header, make


def _main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    contract = job.load_contract(args.contract)
    base = contract.Export(args.export)
    asked = base.manifest["questions"]
    scenes = [job.Scene(e["id"], e["split"], [e, asked]) for e in base.manifest["scenes"]]
    metric = base.manifest["scale"] == "metric"
    if not metric and any("box" in r or "objects" in r for r in base.questions()):
        raise job.InputError(
            f"{args.export}: questions have boxes but no metric world to turn them (VGGT's "
            "exporter with --export keeps that of an export with boxes)"
        )
    return job.run(args, contract, scenes, lambda: begin(args, base), base.questions)


main = job.guarded("export_sonata", _main)

if __name__ == "__main__":
    sys.exit(main())
