"""Draws of splits: by places, in the shares asked for, whatever else is in the data set."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geode_jax.errors import UserError
from geode_jax.sources.splits import SHARES, parse_shares, split_places

ROOMS = [f"scene{n:04d}" for n in range(2000)]


@pytest.mark.parametrize("text", ["80/20", "70/15/15", "90/10"])
def test_every_split_has_its_share_up_to_chance(text):
    shares = parse_shares(text)
    for seed in range(3):
        counts = Counter(split_places(ROOMS, seed, shares).values())
        for split, share in shares.items():
            deviation = math.sqrt(len(ROOMS) * share * (1 - share))  # of a binomial count
            assert abs(counts[split] - share * len(ROOMS)) < 4 * deviation
        assert counts.keys() == shares.keys()
    assert split_places(ROOMS, 0, shares) != split_places(ROOMS, 1, shares)


def test_a_place_stays_in_its_split_when_others_are_added_or_reordered():
    few = split_places(ROOMS[:500], 3)
    assert few == split_places(reversed(ROOMS[:500]), 3)
    assert few.items() <= split_places(ROOMS, 3).items()
    # A third of val becomes test, and training does not change.
    three, two = (split_places(ROOMS, 3, parse_shares(text)) for text in ("70/15/15", "70/30"))
    trained = [{p for p, split in drawn.items() if split == "train"} for drawn in (three, two)]
    assert trained[0] == trained[1]


@given(st.integers(1, 9), st.integers(0, 50), st.sampled_from(["80/20", "70/15/15", "1/1/98"]))
def test_the_first_splits_have_a_place_where_there_are_enough(count, seed, text):
    shares = parse_shares(text)
    found = set(split_places(ROOMS[:count], seed, shares).values())
    assert found >= set(list(shares)[:count])


def test_shares_are_percentages():
    assert parse_shares("80/20") == {"train": 0.8, "val": 0.2}
    assert parse_shares("70/15/15") == pytest.approx(SHARES)
    for bad in ("80", "80/30", "100/0", "50/25/15/10", "0.8/0.2", "a/b", "-20/120", "80/20/", ""):
        with pytest.raises(UserError, match=r"--split: .* is not percentages of train/val"):
            parse_shares(bad)
