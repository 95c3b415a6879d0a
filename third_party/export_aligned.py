"""VGGT's outputs for the views of a metric export, in that export's world.

Needs only Python 3.9, numpy and Pillow. The export's poses, intrinsics, true depth and boxes stay.
VGGT's world is aligned to theirs (`alignment` of the package `exports`), and its depth and points
are moved by this similarity. Its tokens are averaged over the patches of the export, whose other
arrays keep their places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import export_job as job
import export_views as views
import numpy as np
from PIL import Image

MAX_RESIDUAL = 0.25
"""Metres by which a reconstruction may be displaced: half the edge of a small piece of furniture.
Points that are further off lie outside the boxes of the objects that they belong to."""
MAP_PIXELS = 4
"""Pixels of depth along the side of a patch, in scenes that have no world of their own."""
_PIXELS = ("target/depth", "vggt/depth", "vggt/points", "target/segmentation")
"""Tensors with the size of the depth maps."""


class Aligned(NamedTuple):
    """A scene with VGGT's outputs.

    Attributes:
        arrays: name -> tensor.
        alignment: the entry of the manifest.
        report: a few words for the terminal.
    """

    arrays: dict[str, np.ndarray]
    alignment: dict[str, Any]
    report: str


def map_size(arrays: dict[str, np.ndarray], grid: tuple[int, int]) -> tuple[int, int]:
    """Returns (h, w) of a scene's depth maps, to which its intrinsics belong.

    A scene without any such map has intrinsics at the size of its pictures.

    Raises:
        InputError: the scene lacks pictures or cameras, or its pictures do not fit its patches.
    """
    for name in ("images", "camera/extrinsic", "camera/intrinsic"):
        if name not in arrays:
            raise job.InputError(f"the scene has no {name}, which --export needs")
    for name in _PIXELS:
        if name in arrays:
            return arrays[name].shape[1], arrays[name].shape[2]
    h, w = arrays["images"].shape[1:3]
    if h % grid[0] or h * grid[1] != w * grid[0]:
        raise job.InputError(
            f"the scene has no depth map, and its pictures of {h} x {w} are no multiple of the "
            f"patches {grid[0]} x {grid[1]}"
        )
    return h, w


def pictures_of(
    arrays: dict[str, np.ndarray], size: tuple[int, int], side: int, patch: int
) -> np.ndarray:
    """Returns a scene's pictures as VGGT's input, uint8 [V, H, W, 3] of whole patches.

    The longer side gets `side` pixels, and pixels become square: exports may squeeze pictures into
    a square, which VGGT has not seen. Nothing is cut off, so a place keeps its share of the width
    and of the height.

    Args:
        arrays: tensors of the scene.
        size: (h, w) of the depth maps.
        side: pixels, a multiple of `patch`.
        patch: pixels.
    """
    intrinsic = arrays["camera/intrinsic"].astype(np.float64)
    high, wide = (size[axis] / np.median(intrinsic[:, 1 - axis, 1 - axis]) for axis in (0, 1))
    longest = max(high, wide)
    height, width = (
        max(1, round(side * angle / longest / patch)) * patch for angle in (high, wide)
    )
    resized = (
        Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        for picture in arrays["images"]
    )
    return np.stack([np.asarray(picture) for picture in resized])


def squares_of(arrays: dict[str, np.ndarray], side: int) -> np.ndarray:
    """Returns the pictures of a scene without cameras as squares, uint8 [V, side, side, 3].

    Raises:
        InputError: the scene has no picture, or cameras, whose world and scale are unknown.
    """
    if "images" not in arrays:
        raise job.InputError("the scene has no images, which --export needs")
    others = [name for name in ("camera/extrinsic", "target/boxes", *_PIXELS) if name in arrays]
    if others:
        raise job.InputError(f"the scene has {others[0]} in a world without scale: no alignment")
    bicubic = Image.Resampling.BICUBIC
    squares = (
        Image.fromarray(picture).resize((side, side), bicubic) for picture in arrays["images"]
    )
    return np.stack([np.asarray(square) for square in squares])


def aligned(
    contract: Any,
    arrays: dict[str, np.ndarray],
    made: dict[str, np.ndarray],
    grid: tuple[int, int],
    size: tuple[int, int],
    most: float,
) -> Aligned:
    """Returns a scene of a metric export with VGGT's outputs in its world.

    Args:
        contract: the loaded package `exports`.
        arrays: tensors of the scene.
        made: VGGT's outputs for `pictures_of` the scene.
        grid: (gh, gw) of the export.
        size: (h, w) of the scene's depth maps.
        most: metres, see `MAX_RESIDUAL`.

    Raises:
        InputError: the reconstruction does not fit the metric world.
    """
    maps = {
        name: views.nearest(made[name], size).astype(np.float64)
        for name in ("depth", "depth_conf", "points", "points_conf")
    }
    target = arrays.get("target/depth")
    measured = target is not None and bool((target > 0).any())
    try:
        found = contract.alignment.align(
            made["extrinsic"],
            arrays["camera/extrinsic"],
            depth=maps["depth"],
            confidence=maps["depth_conf"],
            metric_depth=target if measured else None,
        )
    except contract.alignment.AlignmentError as error:
        raise job.InputError(f"VGGT's world cannot be aligned: {error}") from None
    residuals = found.residuals()
    words = (
        f"{residuals['residual_m']:.3g} m (cameras {residuals['centres_m']:.3g} m and "
        f"{residuals['rotations_deg']:.3g} degrees"
    )
    if "depth_relative" in residuals:
        words += f", depth {100 * residuals['depth_relative']:.3g} %"
    words += ")"
    if not residuals["residual_m"] <= most:
        raise job.InputError(f"VGGT's world does not fit: {words}; --max-residual is {most:g} m")
    fits = found.fitted & (found.displacements <= most)
    depth = np.where(fits[:, None, None], found.similarity.scale * maps["depth"], 0)
    tokens = views.area_mean(made["tokens"], grid)
    new = {
        "vggt/tokens": tokens.reshape(len(tokens), -1, tokens.shape[-1]),
        "vggt/camera_tokens": made["camera_tokens"],
        "vggt/depth": depth,
        "vggt/depth_conf": maps["depth_conf"],
        "vggt/points": np.where(
            fits[:, None, None, None], found.similarity.points(maps["points"]), 0
        ),
        "vggt/points_conf": maps["points_conf"],
    }
    if not measured:
        # The confidence is 1 + exp(x) of what VGGT's head says, so this is the sigmoid of x.
        new["target/depth"] = depth
        new["target/depth_weight"] = np.clip(1 - 1 / np.maximum(maps["depth_conf"], 1), 0, 1)
    alignment = {
        "method": found.method,
        "views": len(fits),
        "kept": int(fits.sum()),
        "scale": float(found.similarity.scale),
        **residuals,
        "depth_target": "sensor" if measured else "vggt",
    }
    report = f"{len(fits)} views, aligned by {found.method} within {words}"
    if not fits.all():
        report += f", {int((~fits).sum())} views without VGGT's depth and points: they do not fit"
    out = {**arrays, **{name: array.astype(np.float32) for name, array in new.items()}}
    return Aligned(out, alignment, report)


def header_of(base: Any, weights: str, commit: str, licence: str, width: int, most: float) -> dict:
    """Returns the header of the new export.

    Args:
        base: the export.
        weights, commit, licence: of VGGT.
        width: numbers of a token.
        most: metres, see `MAX_RESIDUAL`.
    """
    old = base.header()
    producer = {**old["producer"], "weights": weights, "vggt_commit": commit}
    producer["licence"] += f"; VGGT: {licence}"
    notes = (
        "Tokens of VGGT (last aggregator layer, patch part), of the export's pictures at their "
        "stored resolution, resized to square pixels and averaged over the export's patches. "
        "VGGT's depth and points are in the metric world by a similarity, whose residuals each "
        f"scene's entry has; scenes displaced by more than {most:g} m are refused, such views have "
        "no depth and points of VGGT. Cameras, boxes and labels are the export's. Depth targets "
        "are the export's too; in scenes without any (depth_target: vggt) they are VGGT's own, "
        "weighted by the sigmoid of the logit of its confidence."
    )
    if old["scale"] != "metric":
        notes = (
            "Tokens of VGGT (last aggregator layer, patch part), of the export's pictures as "
            "squares, averaged over the export's patches. Cameras, depth and points are VGGT's, in "
            "the world of the first camera and VGGT's unit."
        )
    if old["notes"]:
        notes += f" Notes of the export before, without VGGT: {old['notes']}"
    return {
        **old,
        "producer": producer,
        "dtype": "bfloat16",
        "token_width": width,
        "tokens_contain_depth": False,
        "notes": notes,
    }
