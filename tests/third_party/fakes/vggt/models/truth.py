"""A VGGT whose geometry is that of an export, in a world of its own for every scene.

A process gets it by FAKE_VGGT_TRUTH='{"export": "FOLDER"}' in its environment, whatever the name of
the weights is. It finds the scene and the views by the pictures.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from scipy.spatial.transform import Rotation

from vggt.models.vggt import VGGT, Aggregator

NEEDED = ("camera/extrinsic", "camera/intrinsic", "target/depth", "images")


def small(pictures: np.ndarray) -> np.ndarray:
    """[V, H, W, 3] -> [V, 7 * 7 * 3] means of nearly equal parts, in [0, 1]."""
    rows = [pictures[:, part].mean(1) for part in np.array_split(np.arange(pictures.shape[1]), 7)]
    rows = np.stack(rows, 1)
    cells = [rows[:, :, part].mean(2) for part in np.array_split(np.arange(rows.shape[2]), 7)]
    return np.stack(cells, 2).reshape(len(pictures), -1)


def nearest(image: np.ndarray, size: tuple) -> np.ndarray:
    """[V, h, w, ...] at the nearest pixels of another size."""
    (h, w), (old_h, old_w) = size, image.shape[1:3]
    v = ((np.arange(h) + 0.5) * old_h / h).astype(int)
    u = ((np.arange(w) + 0.5) * old_w / w).astype(int)
    return image[:, v[:, None], u]


class WatchedAggregator(Aggregator):
    """Keeps the pictures that it was given last."""

    def forward(self, images):
        """As `Aggregator`."""
        self.pictures = images[0].permute(0, 2, 3, 1).numpy()
        return super().forward(images)


class TrueVGGT(VGGT):
    """True poses, depths and points in a random similar world."""

    def __init__(self, export: str, wrong: float = 0.0, random=(), embed_dim: int = 4):
        """Reads the export's scenes.

        Args:
            export: folder with pictures, cameras and true depth in every scene.
            wrong: share of views (at least one, if above 0) with wrong cameras and points, and of
                wrong pixels in the others.
            random: scenes whose poses and depths have nothing to do with the truth.
            embed_dim: half the width of a token.
        """
        super().__init__(embed_dim=embed_dim)
        torch.manual_seed(0)
        self.aggregator = WatchedAggregator(embed_dim)
        self.wrong, self.random, self.scenes = wrong, random, {}
        folder = Path(export)
        for entry in json.loads((folder / "manifest.json").read_text())["scenes"]:
            with safe_open(folder / "scenes" / f"{entry['id']}.safetensors", "numpy") as file:
                scene = {name: file.get_tensor(name).astype(np.float64) for name in NEEDED}
            scene["small"] = small(scene.pop("images") / 255)
            self.scenes[entry["id"]] = scene

    def seen(self) -> tuple[str, list[int]]:
        """The scene and its views that look most like the last pictures."""
        given = small(self.aggregator.pictures.astype(np.float64))
        apart = {
            name: np.linalg.norm(given[:, None] - scene["small"], axis=-1)
            for name, scene in self.scenes.items()
        }
        name = min(apart, key=lambda name: apart[name].min(1).sum())
        return name, apart[name].argmin(1).tolist()

    def world(self) -> dict[str, np.ndarray]:
        """Poses, depths, points and confidences of the last pictures, in the scene's own world."""
        name, views = self.seen()
        draw = np.random.default_rng(zlib.crc32(name.encode()))
        scene = {key: self.scenes[name][key][views] for key in NEEDED[:3]}
        pose, camera, depth = (scene[key] for key in NEEDED[:3])
        known = depth > 0
        depth = np.where(known, depth, np.median(depth[known]))
        h, w = depth.shape[1:]
        pixel = np.stack([*np.meshgrid(np.arange(w), np.arange(h)), np.ones((h, w))], -1)
        rays = np.einsum("vij,hwj->vhwi", np.linalg.inv(camera), pixel) * depth[..., None]
        points = np.einsum("vji,vhwj->vhwi", pose[:, :, :3], rays - pose[:, None, None, :, 3])
        turn = Rotation.random(random_state=draw).as_matrix()
        unit, shift = np.exp(draw.uniform(-1, 1)), draw.normal(size=3)
        # x -> unit * turn x + shift, and the cameras that see the same there.
        points = unit * points @ turn.T + shift
        rotation = pose[:, :, :3] @ turn.T
        translation = unit * pose[:, :, 3] - rotation @ shift
        depth = unit * depth
        sure = np.where(known, 3.0, 1.0)
        if self.wrong:
            count = max(1, round(self.wrong * len(views)))
            bad = draw.permutation(len(views))[:count]
            rotation[bad] = Rotation.random(count, random_state=draw).as_matrix()
            translation[bad] += draw.normal(size=(count, 3)) * 3 * unit
            points[bad] += draw.normal(size=3) * 3 * unit
            pixels = draw.random(depth.shape) < self.wrong
            depth = np.where(pixels, depth * draw.uniform(0.2, 5, depth.shape), depth)
        if name in self.random:
            rotation = Rotation.random(len(views), random_state=draw).as_matrix()
            translation = draw.normal(size=translation.shape)
            depth = draw.uniform(1, 9, depth.shape)
        return {
            "rotation": rotation,
            "translation": translation,
            "depth": depth,
            "points": points,
            "sure": sure,
        }

    def camera_head(self, layers):
        """Pose encodings [1, S, 9] of the world."""
        world = self.world()
        turn = Rotation.from_matrix(world["rotation"]).as_quat()
        angles = np.ones((len(turn), 2))
        rows = np.concatenate([world["translation"], turn, angles], -1)
        return [torch.tensor(rows, dtype=torch.float32)[None]]

    def _head(self, images, *names):
        world, size = self.world(), images.shape[3:]
        return [torch.tensor(nearest(world[n], size), dtype=torch.float32)[None] for n in names]

    def depth_head(self, layers, images, patch_start_idx):
        """Depth [1, S, H, W, 1] and confidence [1, S, H, W]."""
        depth, sure = self._head(images, "depth", "sure")
        return depth[..., None], sure

    def point_head(self, layers, images, patch_start_idx):
        """World points [1, S, H, W, 3] and confidence [1, S, H, W]."""
        return self._head(images, "points", "sure")
