"""Which scenes and frames are held out from training."""

from collections.abc import Iterable

import numpy as np

HELD_OUT = 0.15
"""Share of the frames that each of val and test gets."""


def split_frames(count: int, views: int) -> dict[str, range]:
    """Positions of the frames of each split: the end of the sequence is held out.

    Test exists where val and test can both have `views` frames and train three times as many;
    otherwise there is only val, with at most half of the frames.
    """
    held = max(views, round(HELD_OUT * count))
    if count >= 5 * views:
        train, val = count - 2 * held, count - held
        return {"train": range(train), "val": range(train, val), "test": range(val, count)}
    train = count - min(views, count // 2)
    return {"train": range(train), "val": range(train, count)}


def split_places(places: Iterable[str], seed: int) -> dict[str, str]:
    """Place -> split, by chance: HELD_OUT each for val and test, of few places one for val.

    Args:
        places: what must not be divided between splits, such as all scans of a room.
        seed: of the draw.
    """
    places = sorted(set(places))
    order = np.random.default_rng(seed).permutation(len(places))
    held = round(HELD_OUT * len(places))
    val, test = max(held, int(len(places) > 1)), held
    splits = ["val"] * val + ["test"] * test + ["train"] * len(places)
    return {places[n]: split for n, split in zip(order, splits, strict=False)}
