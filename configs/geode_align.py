"""GEODE stage 0: the projector learns to show the frozen decoder what the frozen ViT sees.

COMMAND   python -m geode_jax.main --config=configs/geode_align.py [--config.init_from=RUN]

ARG       laptop | full   full: Qwen2.5-1.5B and InternViT-300M with a fresh projector; needs your
                          export with images and points, and pretrained weights (folders of Hugging
                          Face, or imported ones; an InternVL folder alone brings its projector):
                              --config=configs/geode_align.py:full --config.data.export=DIR
                              --config.init_from=Qwen2.5-1.5B-Instruct,InternViT-300M-448px-V2_5
                              --config.tokenizer=Qwen2.5-1.5B-Instruct --workdir=runs/align
                          the stages after it: --config.init_from=runs/align and so on

LOSS      cross-entropy of the rationales, read behind the visual tokens.

OURS      learning rate, steps and the data: the paper aligns on 650k captions and answers.
"""

import ml_collections

from geode_jax.configs.geode import stage_config

LAPTOP = {"train.steps": 30}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration for an argument string; see the module's docstring."""
    return stage_config("align", arg, LAPTOP)
