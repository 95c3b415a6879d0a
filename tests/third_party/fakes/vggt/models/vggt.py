"""A model whose answers are known: the red of a picture's corner is the number of its view."""

import json
import math
import os

import torch
from torch import nn

TRUTH = "FAKE_VGGT_TRUTH"
"""Environment variable with the arguments of `truth.TrueVGGT` as JSON."""
FOV = 1.0
"""Radians, of both sides."""


def true_pose(view: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Camera-from-world rotation (about y) and translation."""
    c, s = math.cos(0.07 * view), math.sin(0.07 * view)
    rotation = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64)
    return rotation, torch.tensor([0.1 * view, 0.02 * view, 0.05], dtype=torch.float64)


def true_depth(view: int, h: int, w: int) -> torch.Tensor:
    """[h, w], a bumpy surface."""
    v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return (2 + 0.3 * torch.sin(0.3 * u + view) + 0.2 * torch.cos(0.2 * v * (1 + view))).double()


def unit(views: list[int]) -> float:
    """Of a pass, as arbitrary as VGGT's."""
    return 1 + 0.25 * views[0]


def views_of(layers: list) -> list[int]:
    """The numbers that the aggregator has put into the camera tokens."""
    return [round(float(number)) for number in layers[-1][0, :, 0, 0]]


class Aggregator(nn.Module):
    """Tokens of a convolution; camera, four registers, patches, as upstream orders them."""

    patch_size = 14

    def __init__(self, embed_dim: int):
        super().__init__()
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, embed_dim))
        self.special = nn.Parameter(torch.randn(5, 2 * embed_dim))
        self.embed = nn.Conv2d(3, 2 * embed_dim, 14, 14)

    def forward(self, images):
        """[1, S, 3, H, W] -> (layers, of which the first is not kept, 5)."""
        patches = self.embed(images[0]).flatten(2).transpose(1, 2)
        special = self.special + patches.mean(1, keepdim=True)
        special[:, 0, 0] = images[0, :, 0, 0, 0] * 255
        tokens = torch.cat([special, patches], dim=1)[None]
        return [None, tokens / 2, tokens], 5


class VGGT(nn.Module):
    """World: the first view's camera."""

    def __init__(self, img_size=518, patch_size=14, embed_dim=4):
        super().__init__()
        torch.manual_seed(0)
        self.aggregator = Aggregator(embed_dim)

    @classmethod
    def from_pretrained(cls, name):
        """Any name has the same weights; `truth` says when the geometry is an export's."""
        if TRUTH in os.environ:
            from vggt.models.truth import TrueVGGT

            return TrueVGGT(**json.loads(os.environ[TRUTH]))
        return cls()

    def camera_head(self, layers):
        """Pose encodings [1, S, 9] of two iterations."""
        views = views_of(layers)
        first, start = true_pose(views[0])
        rows = []
        for view in views:
            rotation, translation = true_pose(view)
            turn = rotation @ first.T
            half = 0.5 * math.atan2(turn[0, 2], turn[0, 0])
            shift = (translation - turn @ start) * unit(views)
            # Twice a unit quaternion, xyzw: upstream divides by its square.
            rows.append([*shift, 0, 2 * math.sin(half), 0, 2 * math.cos(half), FOV, FOV])
        encoding = torch.tensor(rows)[None]
        return [torch.zeros_like(encoding), encoding]

    def depth_head(self, layers, images, patch_start_idx):
        """Depth [1, S, H, W, 1] and confidence [1, S, H, W]."""
        views, (h, w) = views_of(layers), images.shape[3:]
        assert layers[-1].shape[2] == patch_start_idx + (h // 14) * (w // 14)
        depth = torch.stack([true_depth(view, h, w) for view in views])[None].float()
        return (depth * unit(views))[..., None], 1 + depth

    def point_head(self, layers, images, patch_start_idx):
        """World points [1, S, H, W, 3] and confidence [1, S, H, W]."""
        views, (h, w) = views_of(layers), images.shape[3:]
        v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        first, start = true_pose(views[0])
        points = []
        for view in views:
            z, tangent = true_depth(view, h, w), math.tan(FOV / 2)
            x, y = (2 * u / w - 1) * tangent * z, (2 * v / h - 1) * tangent * z
            rotation, translation = true_pose(view)
            world = (torch.stack([x, y, z], -1) - translation) @ rotation
            points.append((world @ first.T + start) * unit(views))
        points = torch.stack(points)[None].float()
        return points, 3 - points[..., 2].tanh()
