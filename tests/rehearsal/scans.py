"""ScanNet's layout made of real RGB-D frames, with invented labels."""

import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.sources.datasets.scannet_test import moved, ply_bytes
from tests.sources.rgbd.sens_test import encoded, sens_bytes

NAMES = ("table", "chair", "cabinet", "lamp", "sofa", "shelf", "tv", "plant")
STEP = 12
"""Pixels between the points of the mesh."""
CELL, LOW, HIGH = 0.8, 0.15, 2.0
"""Edge of the cells whose points become an object, and their heights above the floor, metres."""
LEAST = 150
"""Points of a cell that becomes an object."""


def write_real_scans(scans: Path, recording: Path, names: list[str]) -> None:
    """Divides a recording, which has y down, between scans; each gets every n-th frame.

    Args:
        scans: folder of the scans.
        recording: folder with color/, depth/ in millimetres, pose/ (camera to world), intrinsic/.
        names: of the scans.
    """
    frames = sorted(int(path.stem) for path in (recording / "color").glob("*.jpg"))
    matrix = np.eye(4)
    matrix[:3, :3] = np.loadtxt(recording / "intrinsic" / "intrinsic_depth.txt")[:3, :3]
    for n, name in enumerate(names):
        _write_scan(scans / name, recording, frames[n :: len(names)], matrix)


def _write_scan(folder: Path, recording: Path, frames: list[int], matrix: np.ndarray) -> None:
    folder.mkdir(parents=True)
    packed, points = [], []
    for frame in frames:
        pose = np.loadtxt(recording / "pose" / f"{frame}.txt")
        colour = np.asarray(Image.open(recording / "color" / f"{frame}.jpg").convert("RGB"))
        depth = np.asarray(Image.open(recording / "depth" / f"{frame}.png")).astype("<u2")
        packed.append((pose, encoded(colour, "JPEG"), zlib.compress(depth.tobytes())))
        points.append(moved(_seen(depth / 1000, matrix), pose))
    h, w = depth.shape
    data = sens_bytes(packed, color_k=matrix, depth_k=matrix, sizes=(w, h, w, h))
    (folder / f"{folder.name}.sens").write_bytes(data)

    vertices = np.concatenate(points)
    alignment = np.eye(4)
    alignment[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    alignment[:3, 3] = -moved(vertices, alignment).min(0)  # the floor at 0
    numbers = " ".join(f"{x:.6f}" for x in alignment.reshape(-1))
    (folder / f"{folder.name}.txt").write_text(
        f"numDepthFrames = {len(frames)}\naxisAlignment = {numbers}\n"
    )
    (folder / f"{folder.name}_vh_clean_2.ply").write_bytes(ply_bytes(vertices))
    segments, labels = _labelled(moved(vertices, alignment))
    groups = [
        {"id": k, "objectId": k, "segments": [k + 1], "label": label}
        for k, label in enumerate(labels)
    ]
    name = folder.name
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(
        json.dumps({"sceneId": name, "segIndices": segments.tolist()})
    )
    (folder / f"{name}.aggregation.json").write_text(
        json.dumps({"sceneId": name, "segGroups": groups})
    )


def _seen(depth: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Returns points [n, 3] of a depth map in metres, camera frame."""
    v, u = np.mgrid[: depth.shape[0] : STEP, : depth.shape[1] : STEP]
    z = depth[v, u]
    pixels = np.stack([u, v, np.ones_like(u)], -1)[z > 0]
    return (pixels @ np.linalg.inv(matrix[:3, :3]).T) * z[z > 0][:, None]


def _labelled(points: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Returns the segment of each point, 0 for none, and the labels of the segments from 1 on."""
    cell = np.floor(points[:, :2] / CELL).astype(int)
    inside = (points[:, 2] > LOW) & (points[:, 2] < HIGH)
    cells, count = np.unique(cell[inside], axis=0, return_counts=True)
    chosen = cells[count >= LEAST][:: max(1, (count >= LEAST).sum() // len(NAMES))][: len(NAMES)]
    segments = np.zeros(len(points), int)
    for k, corner in enumerate(chosen):
        segments[inside & (cell == corner).all(-1)] = k + 1
    return segments, list(NAMES[: len(chosen)])
