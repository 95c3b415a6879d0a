"""Which scenes and frames are held out from training."""

from collections.abc import Iterable

import numpy as np

HELD_OUT = 0.15
"""Share of the frames or places in each of val and test."""


def split_frames(count: int, views: int) -> dict[str, range]:
    """Returns the positions of each split's frames; the end of the sequence is held out.

    There is a test split if val and test can have `views` frames each and train three times as
    many. Otherwise there is only val, with at most half of the frames.
    """
    held = max(views, round(HELD_OUT * count))
    if count >= 5 * views:
        train, val = count - 2 * held, count - held
        return {"train": range(train), "val": range(train, val), "test": range(val, count)}
    train = count - min(views, count // 2)
    return {"train": range(train), "val": range(train, count)}


def split_places(places: Iterable[str], seed: int) -> dict[str, str]:
    """Returns place -> split, drawn at random.

    A share of HELD_OUT each goes to val and to test; if there are few places, one goes to val.

    Args:
        places: units that must not be divided between splits, such as rooms with several scans.
        seed: seed of the draw.
    """
    places = sorted(set(places))
    order = np.random.default_rng(seed).permutation(len(places))
    held = round(HELD_OUT * len(places))
    val, test = max(held, int(len(places) > 1)), held
    splits = ["val"] * val + ["test"] * test + ["train"] * len(places)
    return {places[n]: split for n, split in zip(order, splits, strict=False)}
