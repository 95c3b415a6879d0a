"""Questions about a relation of two objects: proximity, contact, size, orientation."""

import itertools
from collections.abc import Iterator

from geode_jax.sources.questions.asker import APART, FAIR, SIZE_RATIO, TOUCHING, Asker
from geode_jax.sources.questions.words import _clear, metres, turning


def proximity(ask: Asker) -> Iterator[dict]:
    triples = itertools.permutations(ask.single, 3)
    for anchor, a, b in ask.shuffled(triples):
        near, far = sorted((ask.gaps[anchor, a], ask.gaps[anchor, b]))
        if far - near < 0.3 or far < 1.25 * near:
            continue
        first = ask.gaps[anchor, a] < ask.gaps[anchor, b]
        names = [ask.names[n] for n in (anchor, a, b)]
        winner = names[1] if first else names[2]
        rationale = (
            f"The {names[1]} is {metres(ask.gaps[anchor, a])} from the {names[0]}. "
            f"The {names[2]} is {metres(ask.gaps[anchor, b])} from the {names[0]}. "
            f"So the {winner} is closer."
        )
        question = f"Which is closer to the {names[0]}, the {names[1]} or the {names[2]}?"
        relation = {"proximity": float(first)}
        yield ask.draft(question, winner, (anchor, a, b), rationale, relation=relation)


def contact(ask: Asker) -> Iterator[dict]:
    for pair in ask.shuffled(ask.seen.pairs):
        if any(n not in ask.single for n in pair):
            continue
        a, b = ask.shuffled(pair)
        gap = ask.gaps[a, b]
        touching = gap <= TOUCHING
        if not touching and gap < APART:
            continue
        names = ask.names[a], ask.names[b]
        measured = "no gap" if touching else f"a gap of {metres(gap)}"
        verdict = "touch" if touching else "do not touch"
        rationale = (
            f"Between the {names[0]} and the {names[1]} there is {measured}. They {verdict}."
        )
        question = f"Is the {names[0]} touching the {names[1]}?"
        answer = "yes" if touching else "no"
        relation = {"contact": float(touching)}
        yield ask.draft(question, answer, (a, b), rationale, relation=relation)


def size_comparison(ask: Asker) -> Iterator[dict]:
    volumes = ask.boxes[:, 3:6].prod(-1)
    for a, b in ask.shuffled(itertools.combinations(ask.single, 2)):
        a, b = ask.shuffled((a, b))
        names = ask.names[a], ask.names[b]
        ratio = volumes[a] / volumes[b]
        if max(ratio, 1 / ratio) < SIZE_RATIO:
            continue
        likely = ask.seen.larger.get(names, 0.5)
        likely = likely if ratio > 1 else 1 - likely
        rare = min(likely, 1 - likely)
        if rare < FAIR or ask.rng.random() > rare / likely:
            continue
        winner = names[0] if ratio > 1 else names[1]
        rationale = (
            f"The {names[0]} has a volume of {volumes[a]:.2f} cubic meters. "
            f"The {names[1]} has a volume of {volumes[b]:.2f} cubic meters. "
            f"So the {winner} is larger."
        )
        question = f"Which is larger, the {names[0]} or the {names[1]}?"
        relation = {"size_comparison": float(ratio > 1)}
        yield ask.draft(question, winner, (a, b), rationale, relation=relation)


def orientation(ask: Asker) -> Iterator[dict]:
    for (stand, face, target), angle in ask.shuffled(ask.triples.items()):
        if not _clear(abs(angle), (0, 180)):
            continue
        side = "left" if angle > 0 else "right"
        names = [ask.names[n] for n in (stand, face, target)]
        question = (
            f"If I stand by the {names[0]} facing the {names[1]}, "
            f"is the {names[2]} on my left or on my right?"
        )
        relation = {"orientation": float(side == "left")}
        yield ask.draft(
            question, side, (stand, face, target), turning(names, angle), relation=relation
        )
