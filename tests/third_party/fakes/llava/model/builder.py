"""A Llama of two layers that sees a random choice of voxels before the words."""

import zlib
from pathlib import Path
from types import SimpleNamespace

import tokenizers
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SEED = 0
"""Some of its answers end, some do not."""
WORDS = ["<unk>", "</s>", "yes", "no", "near", "chair", "Is", "the", "?", "USER", "ASSISTANT", ":"]


def make_tokenizer():
    """Words; `</s>` ends."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )


class VisionTower(nn.Module):
    """Patches of 2 x 2 pixels, 4 a side."""

    num_patches_per_side = 4

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, 2)

    def forward(self, images):
        """[V, 3, 8, 8] -> [V, 16, 6]."""
        return self.embed(images).flatten(2).transpose(1, 2)


class VideoTower(nn.Module):
    """The learned code of a place."""

    def __init__(self):
        super().__init__()
        self.place = nn.Linear(3, 6)

    @property
    def video_tower(self):
        """Upstream has one in the other."""
        return self

    def encode_pe(self, xyz):
        """[B, V, H, W, 3] -> [B, V, H, W, 6]."""
        assert xyz.ndim == 5
        return self.place(xyz)


class Llava(LlamaForCausalLM):
    """`generate` takes the scene, as upstream's does."""

    def __init__(self, config):
        super().__init__(config)
        # Two more rows than there are words, as embeddings that were padded have: never said.
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size + 2)
        with torch.no_grad():
            self.lm_head.bias[config.vocab_size :] = -5
            self.lm_head.bias[config.eos_token_id] = 0.5
        self.towers = nn.ModuleDict({"vision": VisionTower(), "video": VideoTower()})
        self.project = nn.Linear(6, config.hidden_size)

    def get_vision_tower(self):
        """CLIP's place."""
        return self.towers["vision"]

    def get_model(self):
        """What has the towers."""
        return SimpleNamespace(get_video_tower=lambda: self.towers["video"])

    def generate(self, inputs, images, depths, poses, intrinsics, image_sizes=None, **options):
        """Greedy or not, by transformers."""
        voxels = self.project(self.get_vision_tower()(images[0]).flatten(0, 1))
        voxels = voxels + depths.mean() + poses.mean() + intrinsics.mean()
        kept = voxels[torch.randperm(len(voxels))[:10]]
        embed = self.get_input_embeddings()
        (place,) = torch.where(inputs[0] < 0)[0].tolist()
        words = torch.cat([embed(inputs[0, :place]), kept, embed(inputs[0, place + 1 :])])
        mask = torch.ones(1, len(words), dtype=torch.long)
        return super().generate(inputs_embeds=words[None], attention_mask=mask, **options)


class Scenes:
    """Seeds of all scenes, by their names."""

    def __getitem__(self, scene):
        return zlib.crc32(scene.encode())


def load_pretrained_model(path, base, name, device="cuda"):
    """(tokenizer, model, processor, length of the context).

    A folder brings its tokenizer, and knows every scene; a name has words and scenes of its own.
    """
    assert "llava" in name.lower() and base is None
    torch.manual_seed(SEED)
    words, known = make_tokenizer(), {"a": 1, "b": 2}
    if Path(path).is_dir():
        words, known = AutoTokenizer.from_pretrained(path), Scenes()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.eos_token_id,
        bos_token_id=None,
        initializer_range=0.8,
    )
    image = SimpleNamespace(
        crop_size={"height": 8, "width": 8}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    )
    return words, Llava(config).eval(), {"image": image, "video": known}, 2048
