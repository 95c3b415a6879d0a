"""GEODE stage 0: the projector learns to show the frozen decoder what the frozen ViT sees.

COMMAND   python -m geode_jax.main --config=configs/geode_align.py [--config.init_from=RUN]

ARG       laptop | full   full: Qwen2.5-1.5B and InternViT-300M; needs your export with images
                          (--config.data.export=DIR) and a tokenizer (--config.tokenizer=DIR)

PAYS      the rationales, read behind the visual tokens.

OURS      learning rate, steps and what is learned from: the paper aligns on 650k captions.
"""

import ml_collections

from configs.geode import stage_config

LAPTOP = {"train.steps": 30}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("align", arg, LAPTOP)
