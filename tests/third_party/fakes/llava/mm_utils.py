"""Prompts to ids, videos to tensors."""

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN


def get_model_name_from_path(path):
    """Its last part."""
    return path.strip("/").split("/")[-1]


def tokenizer_image_token(prompt, tokenizer, index, return_tensors):
    """Ids with `index` where the picture is."""
    assert return_tensors == "pt"
    before, after = prompt.split(DEFAULT_IMAGE_TOKEN)
    ids = [*tokenizer(before).input_ids, index, *tokenizer(after).input_ids]
    return torch.tensor(ids)


def process_videos(videos, video_processor, mode="random", device=None, text=None):
    """Two frames of a scene; KeyError where it is not known."""
    seed = video_processor[videos.split("/")[-1]]
    draw = torch.Generator().manual_seed(seed)
    shapes = {"images": (3, 8, 8), "depths": (8, 8), "poses": (4, 4), "intrinsics": (4, 4)}
    return {name: torch.rand(1, 2, *shape, generator=draw) for name, shape in shapes.items()}
