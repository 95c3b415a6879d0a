"""RGB-D folders (`rgbd.folder`) as exports: depth, points, poses, pictures, questions.

- Frames that cannot be used are dropped and counted by reason (`Dropped`).
- The world frame is the folder's own. Gravity is unknown in general, so the upward direction, which
  some questions need, is estimated (`estimate_up`) and written into the manifest's notes.
- Colour is resampled to the depth camera's field of view, so that a view's picture and depth map
  show the same. Both cameras are taken to have the same position and axes.
- A scene is a group of views, drawn from a window of the sequence so that they overlap, in random
  order so that the views' numbers carry no information.
- Splits are by frames: the end of the sequence is held out, first `val`, then `test` (only if each
  gets a full group), so no frame of a training scene is in another split. The room is the same, so
  held-out scores measure new views, not new rooms.

No VGGT runs here. A fixed function of the measured depth and the colour stands in for `vggt/tokens`
(`stand_ins.patch_tokens`), as for synthetic rooms: the tokens contain depth.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from geode_jax.errors import UserError
from geode_jax.exports import ExportWriter, cameras
from geode_jax.runtime.bars import progress_bar
from geode_jax.sources.rgbd.folder import RgbdFolder, open_folder
from geode_jax.sources.rgbd.frame import Frame, frame_arrays, read_frame
from geode_jax.sources.rgbd.questions import Questioner
from geode_jax.sources.rgbd.sequence import Dropped
from geode_jax.sources.splits import split_frames
from geode_jax.sources.stand_ins import TOKEN_WIDTH

PROJECT = "geode_jax RGB-D folder"
"""Producer of the exports; the ids of their scenes, pieces of one recording, are NAME_NUMBER."""
VERSION = 1
"""Version of an export's content; goes up with every change of this converter."""
MAX_UP_ANGLE, UP_MODE_ANGLE = np.radians(40), np.radians(10)
"""Largest angle between up and the cameras' mean up; radius of the kernel that finds its mode."""


def estimate_up(poses: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Returns the direction against gravity, a unit vector [3].

    Cameras are held roughly upright, so it is close to their mean up. Floors, tables and ceilings
    make it precise: it is the densest direction of the normals (of either sign) within MAX_UP_ANGLE
    of that mean, found by mean shift. Without such surfaces it is the mean.

    Args:
        poses: world-from-camera [n, 4, 4], OpenCV axes.
        normals: [m, 3] unit normals of seen surfaces, world frame; zeros are ignored.
    """
    up = -poses[:, :3, 1].sum(0)
    up /= max(np.linalg.norm(up), 1e-9)
    normals = normals[normals.any(-1)].astype(np.float64)
    normals = normals * np.where(normals @ up < 0, -1, 1)[:, None]
    level = normals[normals @ up > np.cos(MAX_UP_ANGLE)]
    if len(level) == 0:
        return up
    starts = level[:: max(1, len(level) // 200)]
    crowd = (starts @ level.T > np.cos(UP_MODE_ANGLE)).sum(1)
    up = starts[np.argmax(crowd)]
    for _ in range(10):
        up = level[level @ up > np.cos(UP_MODE_ANGLE)].mean(0)
        up /= np.linalg.norm(up)
    return up


def group_views(
    frames: range, views: int, scenes: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Returns up to `scenes` different groups of `views` frames in random order.

    The groups start evenly over the frames. Each is drawn from a window of three times its size.
    """
    views = min(views, len(frames))
    groups: dict[tuple[int, ...], None] = {}
    for start in np.linspace(0, len(frames) - views, scenes).round().astype(int):
        window = frames[start : start + 3 * views]
        for _ in range(20):  # a short sequence may not have as many different groups
            others = rng.choice(window[1:], views - 1, replace=False)
            group = tuple(int(n) for n in rng.permutation([window[0], *others]))
            if group not in groups:
                groups[group] = None
                break
    return list(groups)


def make_rgbd_export(
    folder_in: str | Path,
    folder_out: str | Path,
    *,
    views_per_scene: int = 4,
    patch_grid: tuple[int, int] = (8, 8),
    questions_per_scene: int = 24,
    scenes_per_frame: int = 2,
    max_frames: int = 300,
    image_side: int = 448,
    intrinsic: tuple[float, float, float, float] | None = None,
    depth_scale: float = 1000.0,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Writes an export of an RGB-D folder, see the module.

    Writes `vggt/tokens`, `vggt/depth`, `vggt/points`, `camera/*`, `images`, `target/depth` and no
    boxes; depth maps are [V, 2 gh, 2 gw].

    Args:
        folder_in: see `open_folder`.
        folder_out: absent, empty, or an unfinished export of the same folder.
        views_per_scene: V; splits with fewer frames have fewer.
        patch_grid: (gh, gw).
        questions_per_scene: largest number of questions.
        scenes_per_frame: number of scenes per frame of a split.
        max_frames: longer sequences are thinned out evenly to this many frames.
        image_side: approximate longer side of `images`.
        intrinsic, depth_scale: see `open_folder`.
        seed: seed of all random draws. The content depends on the folder and the arguments only.
        progress: whether to show a progress bar and the summary on stderr.

    Returns:
        {"frames": {"found", "thinned_out", "used", "dropped": {reason: count}}, "scenes": {split:
        count}, "questions": {split: {kind: count}}, "up": [x, y, z], "notes": [what was corrected
        on reading, a line each], "warnings": [signs of wrong cameras, see `cameras.CameraCheck`]}.

    Raises:
        UserError: the folder is no RGB-D folder or has fewer than two usable frames.
        ExportError: the export cannot be written.
    """
    sizes = (views_per_scene, *patch_grid, questions_per_scene, scenes_per_frame, image_side)
    if min(sizes) < 1 or max_frames < 2 or seed < 0:
        raise UserError("rgbd: sizes must be at least 1, max_frames at least 2, seed at least 0")
    source = open_folder(folder_in, intrinsic, depth_scale)
    frames, account = _read_frames(source, patch_grid, image_side, max_frames, progress)
    poses = np.array([frame.view.world_from_camera for frame in frames])
    up = estimate_up(poses, np.concatenate([frame.normals.reshape(-1, 3) for frame in frames]))
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(folder_in).resolve().name)[:64]
    summary = {"frames": account, "scenes": {}, "questions": {}, "up": up.round(4).tolist()}
    summary["notes"] = list(source.notes)
    with ExportWriter(
        folder_out,
        producer={
            "project": PROJECT,
            "commit": f"sources version {VERSION}",
            "weights": "none: tokens are a fixed function of the measured depth and the colour",
            "licence": f"that of the data in {name}",
        },
        dtype="float16",
        scale="metric",
        token_width=TOKEN_WIDTH,
        patch_grid=patch_grid,
        tokens_contain_depth=True,
        categories=[],
        notes=_notes(name, summary),
    ) as writer:
        check = cameras.CameraCheck(metric=True)
        rng = np.random.default_rng(seed)
        plan = [
            (split, group_views(places, views_per_scene, scenes_per_frame * len(places), rng))
            for split, places in split_frames(len(frames), views_per_scene).items()
        ]
        total, made = sum(len(groups) for _, groups in plan), 0
        with progress_bar(total=total, desc="scenes", unit="scene", disable=not progress) as bar:
            for split, groups in plan:
                used = sorted({n for group in groups for n in group})
                questioner = Questioner([frames[n].view for n in used], up, rng)
                counts: Counter = Counter()
                for group in groups:
                    scene_id = f"{name}_{made:04d}"
                    chosen = [frames[n] for n in group]
                    arrays = frame_arrays(chosen)
                    check.add(arrays)
                    writer.add_scene(scene_id, arrays, split=split)
                    records = questioner.ask(
                        scene_id, [frame.view for frame in chosen], questions_per_scene
                    )
                    writer.add_questions(records)
                    counts.update(record["kind"] for record in records)
                    made += 1
                    bar.update()
                summary["scenes"][split] = len(groups)
                summary["questions"][split] = dict(sorted(counts.items()))
    summary["warnings"] = check.lines()
    if progress:
        warnings = (f"warning: {line}" for line in summary["warnings"])
        print(_account(summary), *warnings, sep="\n", file=sys.stderr)
    return summary


def _read_frames(
    source: RgbdFolder, patch_grid: tuple[int, int], image_side: int, most: int, progress: bool
) -> tuple[list[Frame], dict]:
    """Returns all usable frames of the (thinned out) sequence, and the summary's "frames"."""
    names = source.names
    if len(names) > most:
        names = [names[n] for n in np.linspace(0, len(names) - 1, most).round().astype(int)]
    frames, dropped = [], Counter()
    for name in progress_bar(names, desc="frames", unit="frame", disable=not progress):
        try:
            frames.append(read_frame(source, name, patch_grid, image_side))
        except Dropped as reason:
            dropped[str(reason)] += 1
    if len(frames) < 2:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        rule = f"{len(frames)} of {len(names)} frames usable, at least 2 are needed"
        raise UserError(f"{source.folder}: {rule}" + (f" ({why})" if why else ""))
    return frames, {
        "found": len(source.names),
        "thinned_out": len(source.names) - len(names),
        "used": len(frames),
        "dropped": dict(sorted(dropped.items())),
    }


def _account(summary: dict) -> str:
    """Returns the numbers of frames by their fate, and what was corrected, in one line."""
    frames = summary["frames"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in frames["dropped"].items())
    found = (
        f"{frames['found']} frames: {frames['used']} used, {frames['thinned_out']} thinned out, "
        f"{sum(frames['dropped'].values())} dropped" + (f" ({dropped})" if dropped else "")
    )
    return "; ".join([found, *summary["notes"]])


def _notes(name: str, summary: dict) -> str:
    x, y, z = summary["up"]
    return (
        f"RGB-D folder {name}. {_account(summary)}. No VGGT: the tokens are a fixed function of "
        "the measured depth and the colour, so they CONTAIN THE DEPTH that depth metrics score. "
        f"World frame: the folder's own; up is estimated as ({x}, {y}, {z}). Splits are by "
        "frames, the end of the sequence held out: new views of the same place."
    )
