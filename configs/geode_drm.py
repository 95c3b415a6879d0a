"""GEODE stage 1: the rationale module learns to say what stands where (Sec. 2.1, eq. 4).

COMMAND   python -m geode_jax.main --config=configs/geode_drm.py [--config.init_from=RUN]

ARG (they compose)
    laptop | full       sizes
    spatio=4|8|16       M, the rationale tokens
    drm_frames=8|16     Table 2: cameras and points of so many frames; the ViT's frames stay

PAYS      eq. 4: the rationales that the frozen decoder reads behind E_spatio alone. On the laptop
          two more (`objectives/geode.py`): alignment, of E_spatio to the layout's columns, and
          correspondence, of a patch to the points near the place it shows. Without correspondence
          a prototype that regressed the layout's facts never found a place in 1,200 steps of 8
          rooms: squared error of the centres 3.9 of a variance of 3.5, and 0.4 with it.

OURS      sizes of the module, learning rate, the two further losses and their weights.
"""

import ml_collections

from configs.geode import stage_config

LAPTOP = {
    "train.steps": 800,
    "data.rows_per_scene": 1,
    "loss.layout_weight": 40.0,
    "optimizer.learning_rate": 6e-3,
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("drm", arg, LAPTOP)
