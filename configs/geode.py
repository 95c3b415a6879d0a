"""What the configs of GEODE's stages share; each stage has a file of its own."""

import ml_collections

from geode_jax.configs.common import EVAL, OPTIMIZER, RUN, TRAIN, data, on_rooms, parse_arg
from geode_jax.errors import UserError

SWITCHES = {
    "size": ("laptop", ("laptop", "full")),
    "drm": ("on", ("on", "off")),
    "drh": ("on", ("on", "off")),
    "spatio": (16, (4, 8, 16)),
    "drm_frames": (0, int),
    "vision": ("on", ("on", "off")),
    "regression": ("codes", ("codes", "raw")),
    "question": (None, ("on", "off")),
}


START = {
    "pretrain": "",
    "align": "runs/geode_pretrain",
    "drm": "runs/geode_align",
    "joint": "runs/geode_drm",
}
"""The run a stage starts from: the work directory that the stage before has by default. `full` has
no default; its first stage starts from pretrained folders."""


def stage_config(stage: str, arg: str, laptop: dict) -> ml_collections.ConfigDict:
    """The configuration of a stage.

    Args:
        stage: "pretrain", "align", "drm" or "joint".
        arg: the command line's argument string.
        laptop: dotted field -> value, what this stage's laptop run changes.

    Raises:
        UserError: an unknown argument.
    """
    switch = parse_arg(arg, SWITCHES)
    config = base(stage)
    if switch["size"] == "laptop":
        small(config)
        config.update_from_flattened_dict({"init_from": START[stage], **laptop})
    elif stage == "pretrain":
        raise UserError(
            "config: geode_pretrain: full starts from pretrained weights, not from this"
        )
    drm = {
        "on": switch["drm"] == "on",
        "slots": switch["spatio"],
        "frames": switch["drm_frames"],
    }
    loss = {"vision": switch["vision"] == "on", "regression": switch["regression"]}
    # Eq. 4 has no question. A room has many rationales, which only their questions tell apart.
    literal = stage == "drm" and switch["size"] == "full"
    asks = {"on": True, "off": False, None: not literal}[switch["question"]]
    data = {"asks_rationales": asks}
    config.update({"model": {"drm": drm}, "loss": loss, "data": data})
    if switch["drh"] == "off":
        config.update({"model": {"drh_width": 0}})
    return config.lock()


def base(stage: str) -> ml_collections.ConfigDict:
    """The paper's sizes: Qwen2.5-1.5B, InternViT-300M; what it leaves open is ours."""
    return ml_collections.ConfigDict(
        {
            "system": f"geode_{stage}",
            "seed": 0,
            "init_from": "",  # a run, or pretrained folders with commas between, see start.py
            **RUN,
            "data": data(vision="images", questions_per_scene=4, row_length=2048),
            "model": {
                "decoder": {
                    "vocab_size": 151_936,  # 0 = the tokenizer's
                    "width": 1536,
                    "layers": 28,
                    "heads": 12,
                    "kv_heads": 2,
                    "mlp_width": 8960,
                    "mlp": "swiglu",
                    "norm": "rms",
                    "linear_bias": False,
                    "tied_head": True,
                    "rope_theta": 1e6,
                    "norm_eps": 1e-6,
                    "remat": "full",
                    "dtype": "bfloat16",
                },
                "vision": {
                    "image_size": 448,  # pictures are squeezed to it; 0 = as the export has them
                    "patch_size": 14,
                    "width": 1024,
                    "layers": 24,
                    "heads": 16,
                    "mlp_width": 4096,
                    "dtype": "bfloat16",
                },
                "drm": {
                    "on": True,
                    "width": 1024,
                    "heads": 16,
                    "layers": 2,
                    "slots": 16,
                    "bands": 8,
                    "condition_on_question": False,
                    "frames": 0,
                },
                "drh_width": 1536,
                "stand_ins": False,  # layout encoder and patch classifier, see models/layout.py
            },
            "loss": {
                "regression_weight": 1.0,
                "regression": "codes",
                "layout_weight": 0.0,
                "rationale_weight": 0.0,
                "patch_weight": 1.0,
                "spatial_weight": 1.0,
                "vision": True,
            },
            "optimizer": OPTIMIZER,
            "train": TRAIN,
            # A run without vision, shown beside this one if it exists.
            "eval": EVAL | {"blind": "runs/geode_joint-vision=off"},
        }
    )


KINDS = {
    "room_size_estimation": 0.5,
    "object_rel_distance": 0.7,
    "object_rel_direction_easy": 0.7,
    "object_rel_direction_medium": 0.7,
    "object_rel_direction_hard": 0.7,
    "route_planning": 0.4,
    "obj_appearance_order": 0.5,
    "proximity": 0.3,
    "contact": 0.3,
    "size_comparison": 0.3,
    "orientation": 0.3,
    "scene_description": 0.1,
}
"""Questions of VSI-Bench above others; a multiple choice with its options is as long as three short
questions."""


def small(config: ml_collections.ConfigDict) -> None:
    """Embedded rooms on two CPU cores."""
    on_rooms(config)
    config.update(
        {
            "data": {
                "rooms_scenes": 5000,
                "rooms_images": 32,
                "questions_per_scene": 24,
                "kind_weights": KINDS,
            },
            "model": {
                "decoder": {
                    "vocab_size": 0,
                    "width": 128,
                    "layers": 4,
                    "heads": 4,
                    "kv_heads": 2,
                    "mlp_width": 256,
                    "rope_theta": 1e4,
                    "remat": "none",
                    "dtype": "float32",
                },
                "vision": {
                    "image_size": 0,
                    "patch_size": 4,
                    "width": 64,
                    "layers": 2,
                    "heads": 4,
                    "mlp_width": 128,
                    "dtype": "float32",
                },
                "drm": {"width": 96, "heads": 4, "layers": 1, "bands": 6},
                "drh_width": 128,
                "stand_ins": True,
            },
            "train": {"eval_every": 600, "checkpoint_every": 200},
        }
    )
