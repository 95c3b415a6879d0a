"""GEODE stage 1: the rationale module learns to describe the layout (Sec. 2.1, eq. 4).

COMMAND   python -m geode_jax.main --config=configs/geode_drm.py [--config.init_from=RUN]

ARG (they compose)
    laptop | full       sizes
    spatio=4|8|16       number of rationale tokens (M in the paper)
    drm_frames=8|16     Table 2: cameras and points of so many frames; the ViT's frames stay
    question=on|off     whether its question precedes a rationale. Eq. 4 has none: off in `full`, on
                        in laptop, where a room has many rationales

LOSS      eq. 4: the rationales that the frozen decoder reads behind E_spatio alone. Two alignments
          besides, 0 in `full` (Sec. 2.1.2 names one, eq. 4 has none): `loss.rationale_weight`, of
          E_spatio to the frozen decoder's embedding of the rationales; `loss.layout_weight`, on
          the laptop, to the layout's columns (`objectives/geode.py`).

RESULT    (of 2026-11-22, rooms version 5; not measured again since)
          loss of held-out rationales, seeds 0 and 1: 0.564, 0.581; behind another room's E_spatio
          0.764, 0.815; behind nothing 1.385, 1.218.
TRIED     drafts of the module by `layout` at step 600: with a correspondence loss that teaches
          which points are near, instead of places on the 2D tokens, 0.037; with places 0.035; with
          a second attention to F_ST besides 0.032, but at 1,000 steps 0.026, as with correspondence
          (0.027).

OURS      sizes of the module, learning rate, the alignments and their weights, and that a 2D token
          knows the place it shows (`models/drm.py`).
"""

import ml_collections

from geode_jax.configs.geode import stage_config

LAPTOP = {
    "train.steps": 1050,
    "data.rows_per_scene": 1,
    "loss.layout_weight": 40.0,
    "optimizer.learning_rate": 6e-3,
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("drm", arg, LAPTOP)
