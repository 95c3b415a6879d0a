"""Answers of the rooms' questions cannot be guessed from the words alone."""

import collections
import itertools

import numpy as np
import pytest

from geode_jax.sources.rooms import layout
from tests.sources.questions.answered import COUNT, RELATIONS, chosen, of_kind


def blind_accuracy(kind):
    """Returns the accuracy of a logistic regression on the nouns of the questions.

    Inputs are the noun in each role and the pair of the last two. It is fitted on one half of the
    scenes and tested on the other, both ways, so it shows all that category priors reveal.
    """
    records = of_kind(kind)
    nouns = [[layout.NAMES.index(item["name"]) for item in r["objects"]] for _, r in records]
    label = np.array([r["relation"][kind] for _, r in records])
    half = np.array([int(room.scene_id[-6:]) % 2 for room, _ in records])
    size, roles = len(layout.NAMES), len(nouns[0])
    inputs = np.zeros((len(records), size * roles + size * size + 1))
    for row, named in enumerate(nouns):
        inputs[row, [size * role + noun for role, noun in enumerate(named)]] = 1
        inputs[row, size * roles + size * named[-2] + named[-1]] = 1
        inputs[row, -1] = 1
    right = 0
    for test in (0, 1):
        x, y = inputs[half != test], label[half != test]
        weights = np.zeros(inputs.shape[1])
        for _ in range(8):  # Newton steps with a ridge
            p = 1 / (1 + np.exp(-x @ weights))
            slope = x.T @ (p - y) + 2 * weights
            weights -= np.linalg.solve((x.T * (p * (1 - p))) @ x + 2 * np.eye(len(weights)), slope)
        right += ((inputs[half == test] @ weights > 0) == label[half == test]).sum()
    return right / len(records)


@pytest.mark.parametrize("kind", RELATIONS)
def test_relations_cannot_be_guessed(kind):
    labels = [record["relation"][kind] for _, record in of_kind(kind)]
    assert 0.42 < np.mean(labels) < 0.58
    assert blind_accuracy(kind) < 0.62


def test_the_blind_guesser_would_find_a_prior():
    """A guesser by category does predict volumes, so the low scores are due to balancing."""
    prior = layout.larger_prior()
    guess = [
        prior[tuple(item["name"] for item in record["objects"])] > 0.5
        for _, record in of_kind("size_comparison")
    ]
    pairs = itertools.permutations(layout.NAMES, 2)
    raw = [max(prior[pair], 1 - prior[pair]) for pair in pairs]
    assert np.mean(raw) > 0.7  # the score without balancing
    labels = [record["relation"]["size_comparison"] for _, record in of_kind("size_comparison")]
    assert np.mean(np.equal(guess, labels)) < 0.62


def relative_accuracy(guess, value):
    """Returns VSI-Bench's mean relative accuracy."""
    return np.mean(abs(guess - value) / value <= 1 - np.linspace(0.5, 0.95, 10))


def median(values):
    """Returns the lower median, which is one of the values."""
    return np.quantile(values, 0.5, method="lower")


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("object_counting", 0.621),  # the frequency baseline on VSI-Bench
        ("object_abs_distance", 0.36),
        ("object_size_estimation", 0.55),
        ("room_size_estimation", 0.42),
    ],
)
def test_numbers_cannot_be_guessed(kind, most):
    """The median answer to questions of the same wording, and so category, scores low."""
    fit, score = collections.defaultdict(list), []
    records = [(int(room.scene_id[-6:]) % 2, r) for room, r in of_kind(kind)]
    wording = {"object_abs_distance": kind}.get(kind)
    for half, record in records:
        if half == 0:
            fit[wording or record["question"]].append(record["value"])
    overall = median([value for values in fit.values() for value in values])
    for half, record in records:
        if half == 1:
            known = fit[wording or record["question"]]
            guess = median(known) if len(known) >= 5 else overall
            score.append(relative_accuracy(guess, record["value"]))
    assert np.mean(score) < most


@pytest.mark.parametrize("kind", [kind for kind in COUNT if "rel_d" in kind or kind[:5] == "route"])
def test_no_letter_and_no_class_is_favoured(kind):
    records = [record for _, record in of_kind(kind)]
    letters = collections.Counter(record["answer"] for record in records)
    classes = collections.Counter(chosen(record) for record in records)
    # The bound is twice the share of an option, with the usual number of options.
    most = max(len(record["options"]) for record in records)
    assert max(letters.values()) < min(2 / most, 0.6) * len(records)
    assert max(classes.values()) < 0.6 * len(records)
