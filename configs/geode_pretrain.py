"""GEODE, laptop only: what stands in for pretrained weights before the stages.

COMMAND   python -m geode_jax.main --config=configs/geode_pretrain.py     (make geode: all stages)

PAYS      the rationales of rooms' questions, read behind the room's layout (`models/layout.py`),
          and the category of every patch: a decoder that can read what stands before its text, and
          a ViT that tells furniture apart. InternVL's weights are these for `full`.

OURS      everything: the paper starts from pretrained models.
"""

import ml_collections

from configs.geode import stage_config

LAPTOP = {"train.steps": 400}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("pretrain", arg, LAPTOP)
