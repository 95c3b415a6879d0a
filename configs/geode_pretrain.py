"""GEODE, laptop only: replaces pretrained weights before the stages.

COMMAND   python -m geode_jax.main --config=configs/geode_pretrain.py     (make geode: all stages)

LOSS      the rationales of rooms' questions, read behind the room's layout (`models/layout.py`);
          what a question is about, by a linear head on its tokens (boxes of the objects at their
          nouns, gaps, turn, relations and the numeric answer at its end); and the category of every
          patch. So the decoder learns to find the objects of a question in the columns before its
          text, and the ViT to distinguish furniture. For `full`, InternVL's weights do both.

TRIED     no linear head, in an earlier design: 43.1 overall on 60 rooms (seed 0; 1,000 steps of
          the rationale module, 600 joint), since the decoder learned late or never to find the
          objects of a question. With the head 50.1, of 800 and 500 steps.

OURS      everything: the paper starts from pretrained models.
"""

import ml_collections

from geode_jax.configs.geode import stage_config

LAPTOP = {"train.steps": 550}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("pretrain", arg, LAPTOP)
