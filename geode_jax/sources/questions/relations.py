"""Askers of the Hidden-CoT paper's four relations (Sec. IV): proximity, contact, size, orientation.

A question's `relation` is the probability of the first alternative, 0 or 1 here.
"""

import itertools
from collections.abc import Iterator

from geode_jax.sources.questions.asker import Asker
from geode_jax.sources.questions.margins import (
    MAX_CONTACT_GAP,
    MIN_SEPARATION,
    MIN_VOLUME_RATIO,
    is_clear,
)
from geode_jax.sources.questions.words import metres, turn_sentences

MIN_ANSWER_PROBABILITY = 0.12
"""A size comparison is not asked where, by the two categories alone, one of the answers is less
likely than this."""


def proximity(asker: Asker) -> Iterator[dict]:
    """Yields questions about which of two objects is closer to a third."""
    triples = itertools.permutations(asker.unique, 3)
    for anchor, a, b in asker.shuffled(triples):
        near, far = sorted((asker.gaps[anchor, a], asker.gaps[anchor, b]))
        if far - near < 0.3 or far < 1.25 * near:
            continue
        first = asker.gaps[anchor, a] < asker.gaps[anchor, b]
        names = [asker.names[n] for n in (anchor, a, b)]
        closer = names[1] if first else names[2]
        rationale = (
            f"The {names[1]} is {metres(asker.gaps[anchor, a])} from the {names[0]}. "
            f"The {names[2]} is {metres(asker.gaps[anchor, b])} from the {names[0]}. "
            f"So the {closer} is closer."
        )
        question = f"Which is closer to the {names[0]}, the {names[1]} or the {names[2]}?"
        relation = {"proximity": float(first)}
        yield asker.draft(question, closer, (anchor, a, b), rationale, relation=relation)


def contact(asker: Asker) -> Iterator[dict]:
    """Yields questions about whether two objects touch, of the pairs chosen for that."""
    for pair in asker.shuffled(asker.seen.contacts):
        if any(n not in asker.unique for n in pair):
            continue
        a, b = asker.shuffled(pair)
        gap = asker.seen.contacts[pair]
        touching = gap <= MAX_CONTACT_GAP
        if not touching and gap < MIN_SEPARATION:
            continue
        names = asker.names[a], asker.names[b]
        measured = "no gap" if touching else f"a gap of {metres(gap)}"
        verdict = "touch" if touching else "do not touch"
        rationale = (
            f"Between the {names[0]} and the {names[1]} there is {measured}. They {verdict}."
        )
        question = f"Is the {names[0]} touching the {names[1]}?"
        answer = "yes" if touching else "no"
        relation = {"contact": float(touching)}
        yield asker.draft(question, answer, (a, b), rationale, relation=relation)


def size_comparison(asker: Asker) -> Iterator[dict]:
    """Yields questions about which of two objects has the larger volume.

    A question is kept with a probability inversely proportional to how often its two categories
    have that answer, so that the categories alone do not predict it.
    """
    volumes = asker.boxes[:, 3:6].prod(-1)
    for a, b in asker.shuffled(itertools.combinations(asker.unique, 2)):
        a, b = asker.shuffled((a, b))
        names = asker.names[a], asker.names[b]
        ratio = volumes[a] / volumes[b]
        if max(ratio, 1 / ratio) < MIN_VOLUME_RATIO:
            continue
        likely = asker.seen.larger.get(names, 0.5)
        likely = likely if ratio > 1 else 1 - likely
        rare = min(likely, 1 - likely)
        if rare < MIN_ANSWER_PROBABILITY or asker.rng.random() > rare / likely:
            continue
        larger = names[0] if ratio > 1 else names[1]
        rationale = (
            f"The {names[0]} has a volume of {volumes[a]:.2f} cubic meters. "
            f"The {names[1]} has a volume of {volumes[b]:.2f} cubic meters. "
            f"So the {larger} is larger."
        )
        question = f"Which is larger, the {names[0]} or the {names[1]}?"
        relation = {"size_comparison": float(ratio > 1)}
        yield asker.draft(question, larger, (a, b), rationale, relation=relation)


def orientation(asker: Asker) -> Iterator[dict]:
    """Yields questions about the side on which one sees an object when facing another."""
    for rows, angle in asker.shuffled(asker.triples.items()):
        if not is_clear(abs(angle), (0, 180)):
            continue
        side = "left" if angle > 0 else "right"
        names = [asker.names[n] for n in rows]
        question = (
            f"If I stand by the {names[0]} facing the {names[1]}, "
            f"is the {names[2]} on my left or on my right?"
        )
        relation = {"orientation": float(side == "left")}
        rationale = turn_sentences(names, angle)
        yield asker.draft(question, side, rows, rationale, relation=relation)
