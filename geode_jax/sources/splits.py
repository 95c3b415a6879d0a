"""Which scenes and frames are held out from training."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from geode_jax.errors import UserError
from geode_jax.exports import SPLITS

HELD_OUT = 0.15
"""Share of the frames or places in each of val and test."""
SHARES = {"train": 1 - 2 * HELD_OUT, "val": HELD_OUT, "test": HELD_OUT}
"""Shares of the places where neither the data set nor `--split` says others."""


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


def parse_shares(text: str) -> dict[str, float]:
    """Parses "80/20" to {"train": 0.8, "val": 0.2}, and "70/15/15" with "test" as the third.

    Raises:
        UserError: the text has another form, or the percentages have not the sum 100.
    """
    parts = text.split("/")
    good = len(parts) in (2, 3) and all(re.fullmatch(r"\d{1,3}(\.\d{1,3})?", p) for p in parts)
    shares = [float(part) / 100 for part in parts] if good else [0.0]
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        rule = "percentages of train/val or train/val/test above 0 with the sum 100, as 80/20"
        raise UserError(f"--split: {text!r} is not {rule}")
    return dict(zip(SPLITS, shares, strict=False))


def split_places(
    places: Iterable[str], seed: int, shares: Mapping[str, float] = SHARES
) -> dict[str, str]:
    """Returns place -> split, drawn at random.

    A place has a number in [0, 1), the hash of the seed and its name, and the shares divide this
    range in the order train, val, test. So a place's split does not depend on the other places:
    it stays when scenes are added, and is the same in every export that has the place. The number
    of places in a split follows its share up to chance. Where a split would be empty, it gets the
    place whose number is nearest, train first and test last.

    Args:
        places: units that must not be divided between splits, such as rooms with several scans.
        seed: seed of the draw.
        shares: split -> share of the places, in the order train, val, test; the sum is 1.
    """
    numbers = {place: _number(seed, place) for place in sorted(set(places))}
    names, edges = list(shares), []
    for share in shares.values():
        edges.append(share + (edges[-1] if edges else 0.0))
    edges[-1] = 1.0  # a sum of floats may be a little less
    found = {
        place: next(n for n, edge in enumerate(edges) if number < edge)
        for place, number in numbers.items()
    }
    for n, edge in enumerate(edges):
        counts = Counter(found.values())
        givers = [place for place, own in found.items() if own > n or counts[own] > 1]
        if n not in counts and givers:
            middle = edge - shares[names[n]] / 2
            found[min(givers, key=lambda place: abs(numbers[place] - middle))] = n
    return {place: names[n] for place, n in found.items()}


def _number(seed: int, place: str) -> float:
    """Returns a number in [0, 1) that is uniform over places and seeds."""
    digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
