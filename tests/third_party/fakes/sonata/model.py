"""Point in, point out; what shuffles its orders answers differently every time."""

import torch
from torch import nn


class Embedding(nn.Module):
    """A linear stem."""

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        self.in_channels = in_channels
        self.linear = nn.Linear(in_channels, width)


class GridPooling(nn.Module):
    """Halves the grid: maximum of features, mean of places, cells in lexicographic order."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, width)
        self.shuffle_orders = True  # as upstream builds it, whatever the model was given
        self.traceable = False

    def forward(self, point: dict) -> dict:
        """The next stage's point."""
        grid, cell, count = torch.unique(
            point["grid_coord"] // 2, dim=0, return_inverse=True, return_counts=True
        )
        feat = self.proj(point["feat"])
        if self.shuffle_orders:
            feat = feat + torch.rand(())
        index = cell[:, None].expand_as(feat)
        low = torch.full((len(grid), feat.shape[1]), -torch.inf)
        place = torch.zeros(len(grid), 3).index_add_(0, cell, point["coord"])
        pooled = {
            "feat": low.scatter_reduce(0, index, feat, "amax"),
            "coord": place / count[:, None],
            "grid_coord": grid,
        }
        if self.traceable:
            pooled.update(pooling_inverse=cell, pooling_parent=point)
        return pooled


class PointTransformerV3(nn.Module):
    """The encoder."""

    def __init__(self, in_channels=6, width=8, shuffle_orders=True, enable_flash=True, **others):
        super().__init__()
        assert not enable_flash, "Make sure flash_attn is installed."
        torch.manual_seed(1)
        self.embedding = Embedding(in_channels, width)
        self.shuffle_orders = shuffle_orders
        self.enc = nn.Sequential(GridPooling(width), GridPooling(width))

    def forward(self, data: dict) -> dict:
        """{coord, grid_coord, feat, offset} -> the coarsest stage."""
        assert int(data["offset"][-1]) == len(data["coord"]) == len(data["grid_coord"])
        feat = torch.nn.functional.gelu(self.embedding.linear(data["feat"]))
        if self.shuffle_orders:
            feat = feat + torch.rand(())
        return self.enc({**data, "feat": feat})
