"""What the configs share: the argument after the colon, defaults of fields, the laptop's rooms."""

from typing import Any

import ml_collections

from geode_jax.errors import UserError


def parse_arg(arg: str | None, switches: dict[str, tuple]) -> dict[str, Any]:
    """`"full,thinking=0"` -> {"size": "full", "thinking": 0, ...} with defaults filled in.

    Args:
        arg: what stands after `--config=FILE:`; comma-separated `name=value`, or a bare word that
            is one of the first switch's choices.
        switches: name -> (default, choices or type). A tuple of choices admits just those; a type
            converts.

    Raises:
        UserError: an unknown name or value.
    """
    values = {name: default for name, (default, _) in switches.items()}
    first = next(iter(switches))
    for part in filter(None, (arg or "").split(",")):
        name, _, text = part.partition("=") if "=" in part else (first, "", part)
        if name not in switches:
            raise UserError(f"config: {name}: no such switch; there are {', '.join(switches)}")
        if not text:  # an unset variable of a shell, perhaps
            raise UserError(f"config: {name}=: has no value")
        _, allowed = switches[name]
        if isinstance(allowed, tuple):
            kind = type(allowed[0])
            choices = ", ".join(str(choice) for choice in allowed)
            try:
                value = kind(text)
            except ValueError:
                value = None
            if value not in allowed:
                raise UserError(f"config: {name}={text}: not one of {choices}")
        else:
            try:
                value = allowed(text)
            except ValueError:
                raise UserError(f"config: {name}={text}: not a {allowed.__name__}") from None
        values[name] = value
    return values


RUN = {
    "mesh": (1, -1, 1),  # data, fsdp, model; -1 = the remaining devices
    "tokenizer": "",  # a Hugging Face tokenizer folder; "" trains one on the questions
}

DATA = {
    "root": "data",  # where rooms and converted RGB-D folders are kept
    "export": "",
    "rooms_scenes": 8000,
    "rooms_seed": 0,
    "rooms_images": 0,  # side in pixels of the rooms' pictures; 0 = none
    "rgbd": "",
    "rgbd_intrinsic": (),  # fx, fy, cx, cy where the folder has no intrinsic/
    "rgbd_depth_scale": 1000.0,  # depth values a metre
    "vision": "",
    "scenes_per_batch": 1,
    "questions_per_scene": 1,
    "question_length": 0,  # 0 = the longest of the training split
    "answer_length": 0,
    "max_boxes": 64,
    "rows_per_scene": 1,  # packed text rows of a scene and their length
    "row_length": 1024,
    "workers": 1,
    "on_bad_scene": "stop",
    "on_missing_targets": "stop",  # "skip": terms of the loss that no scene has arrays for
    "stand_in_tokens": False,  # True: train on real scenes' tokens that contain their depth
    "kind_weights": {},
    "mixture": "",  # weights of data sets, as scanqa=2,vsi590k=0.5
    "fraction": 1.0,  # of the training questions of every data set and kind; see `data`
    "min_learned": 0.5,  # a data set of which a smaller share can be learned is refused
    "asks_rationales": True,  # False: nothing but the prefix precedes a rationale
}


def data(**changes: Any) -> dict[str, Any]:
    """The fields of `data`; `fraction` may be changed to a number or to s-mit=0.25,own=0.5.

    Args:
        changes: values of fields that differ from `DATA`.
    """
    # A field of the type object takes both. It is a new one each time, because configurations that
    # share a reference share its value.
    fraction = ml_collections.FieldReference(DATA["fraction"], field_type=object)
    return DATA | {"fraction": fraction} | changes


OPTIMIZER = {
    "name": "adamw",
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "warmup_steps": 100,
    "final_fraction": 0.0,
    "clip_norm": 1.0,
}

TRAIN = {
    "steps": 0,  # 0 = epochs
    "epochs": 1,
    "microbatches": 1,
    "eval_every": 1000,
    "checkpoint_every": 500,
    "checkpoint_minutes": 15,  # and as often as that; 0 = by steps alone
    "patience": 0,  # evaluations without a better validation loss; 0 = never stop early
    "max_skipped": 20,  # non-finite steps in a row
}

EVAL = {
    "reference": "truth",
    "val_scenes": 100,
    "test_scenes": 100,
    "examples": 10,
}


def on_rooms(config: ml_collections.ConfigDict) -> None:
    """Changes a configuration to train on embedded rooms, on two CPU cores."""
    config.update(
        {
            "data": {
                "export": "rooms",
                "scenes_per_batch": 8,
                "max_boxes": 12,
                "rows_per_scene": 3,
                "row_length": 64,
            },
            "optimizer": {"name": "muon", "learning_rate": 5e-3, "warmup_steps": 50},
            "eval": {"val_scenes": 32},
        }
    )
