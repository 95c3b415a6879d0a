"""Questions about a room with exact answers: VSI-Bench's tasks and the relations of the paper.

Wording, options and units of the VSI-Bench kinds follow VSI-Bench (Yang et al., 2024; centimetres
for sizes, metres for distances, square metres for rooms); proximity, contact, size comparison and
orientation are the four relations of the Hidden-CoT paper, Sec. IV. `object_box` asks for what
GEODE regresses, an object's box in the world frame.

Only visible objects are asked about, and every answer keeps a margin, so that nothing hinges on a
centimetre. Answers are balanced so that they cannot be guessed without looking: labels are drawn
before the objects where a kind has classes; numbers are spread in log scale; a size comparison is
kept with a probability inverse to how often its category pair has that answer; contact pairs are
laid out by a fair coin (`rooms`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from geode_jax.data import raycast

TOUCHING, APART = 0.02, 0.25
"""Gap of things in contact at most, of things not in contact at least, metres."""
SIZE_RATIO = 1.3
"""A size comparison needs volumes that differ by this factor."""
FAIR = 0.12
"""Category pairs whose larger one is known with probability above 1 - FAIR are not asked about."""
FIRST_SEEN, UNSEEN = 8, 5
"""Pixels of a view that make an object appear there, and fewer than which it does not."""
GLIMPSE = 8
"""Pixels of all views together that leave it open whether an object that is not visible counts."""

MIN_WAY = 0.7
"""Centres must be this far apart, metres, for a direction from one to the other."""
PAIR_SHARE = 0.75
"""Share of the pairs of a category that are asked to be counted; larger groups always are."""
USUAL = 0.35
"""Lengths are less likely asked about, the closer they are to their category's median: in
proportion to the log of the ratio, up to this log."""

LEFT_RIGHT_MARGIN, _MARGIN = 20.0, 10.0
"""Degrees between a direction and the line ahead or behind; other boundaries of its class."""
_VIEW_SOFTNESS = 0.02
"""Tangent of the angle at which pair relations become sure."""


@dataclasses.dataclass(frozen=True)
class SeenRoom:
    """What questions are made from.

    Attributes:
        scene_id: id of the scene.
        room: size x, y, z, metres.
        floor: square metres; less than x times y where a corner is missing.
        names: noun of each visible object.
        boxes: [N, 7] of the visible objects, the rows of `target/boxes`.
        rays: [V, N] pixels that show each visible object.
        vague: nouns of which some further object is only glimpsed: not counted, not asked about.
        pairs: rows of the pairs laid out for questions about contact.
        extrinsic: [V, 3, 4] camera-from-world.
        larger: P(a larger than b) by category noun; one half where they are not in it.
        typical: median of the longest edge by category noun, metres, where it is known.
    """

    scene_id: str
    room: np.ndarray
    floor: float
    names: tuple[str, ...]
    boxes: np.ndarray
    rays: np.ndarray
    vague: frozenset[str]
    pairs: tuple[tuple[int, int], ...]
    extrinsic: np.ndarray
    larger: dict[tuple[str, str], float]
    typical: dict[str, float]


def pair_relations(boxes: np.ndarray, extrinsic: np.ndarray) -> np.ndarray:
    """P(left), P(right), P(above), P(below) of box i relative to box j in a view, [N, N, 4].

    By the image positions of the centres of boxes [N, 7] in the camera [3, 4]: a logistic
    function of their distance in tangents, so sure beyond a few degrees. One half each where a
    centre is behind the camera, and for a box and itself.
    """
    centre = boxes[:, :3] @ extrinsic[:, :3].T + extrinsic[:, 3]
    front = centre[:, 2] > 0.1
    image = centre[:, :2] / np.where(front, centre[:, 2], 1.0)[:, None]
    # Image x grows to the right and y downwards, so smaller is left of and above.
    difference = image[None, :] - image[:, None]
    difference = np.where((front[:, None] & front[None, :])[..., None], difference, 0.0)
    sure = 1 / (1 + np.exp(-np.clip(difference / _VIEW_SOFTNESS, -30, 30)))
    return np.stack([sure[..., 0], 1 - sure[..., 0], sure[..., 1], 1 - sure[..., 1]], axis=-1)


def make_questions(
    seen: SeenRoom, rng: np.random.Generator, box_rng: np.random.Generator
) -> list[dict]:
    """Up to 27 question records of a room, about 22, in the export's format.

    Args:
        seen: the room.
        rng: what all kinds but `object_box` are drawn from.
        box_rng: whose boxes are asked for. They come last, so with or without them the other
            questions and their ids are the same.
    """
    asker = _Asker(seen, rng, box_rng)
    records = []
    for kind, times, make in _KINDS:
        for draft in itertools.islice(make(asker), times):
            number = f"{seen.scene_id}_{len(records):02d}"
            record = {"id": number, "scene_id": seen.scene_id, "kind": kind}
            records.append(record | asker.with_view_relations(draft))
    return records


class _Asker:
    """The facts of a room that several kinds share. `single` = rows that a noun alone names."""

    def __init__(self, seen: SeenRoom, rng: np.random.Generator, box_rng: np.random.Generator):
        self.seen, self.rng, self.box_rng = seen, rng, box_rng
        self.names, self.boxes = seen.names, seen.boxes
        self.gaps = raycast.box_gaps(self.boxes, self.boxes)
        self.level = raycast.footprint_gaps(self.boxes, self.boxes)
        clear = [n for n, name in enumerate(seen.names) if name not in seen.vague]
        self.single = [n for n in clear if seen.names.count(seen.names[n]) == 1]
        self.groups: dict[str, list[int]] = {}
        for n in clear:
            self.groups.setdefault(seen.names[n], []).append(n)
        self.view = pair_relations(self.boxes, seen.extrinsic[0])
        delta = self.boxes[None, :, :2] - self.boxes[:, None, :2]
        bearing = np.degrees(np.arctan2(delta[..., 1], delta[..., 0]))
        distance = np.hypot(delta[..., 0], delta[..., 1])
        # [stand, face, target]; lists, because single numbers are looked up thousands of times.
        self.turns = _wrapped(bearing[:, None, :] - bearing[:, :, None]).tolist()
        self.bearing, self.distance = bearing.tolist(), distance.tolist()
        # The angle to the third of three, standing by the first and facing the second.
        self.triples = {
            (s, f, t): self.turns[s][f][t]
            for s, f, t in itertools.permutations(self.single, 3)
            if min(self.distance[s][f], self.distance[s][t]) >= MIN_WAY
        }

    def shuffled(self, items) -> list:
        items = list(items)
        return [items[k] for k in self.rng.permutation(len(items))]

    def passable(self, a: int, b: int) -> bool:
        """Whether the straight way between the centres of two boxes crosses no third box."""
        # Things that a route's ends stand on, or carry, are no obstacles.
        others = self.boxes[(self.level[[a, b]] > 0).all(0)]
        start, end = raycast.centres(self.boxes[[a, b]])
        local = raycast.to_box_plane(start + np.linspace(0, 1, 33) * (end - start), others)
        return not (np.abs(local) < others[:, 3:5] / 2).all(-1).any()

    def draft(self, question: str, answer: str, rows, rationale: str, **extra) -> dict:
        """A record without its id.

        `rows` = the objects in the order the question names them, except that the one which
        distances are measured from comes first.
        """
        record = {"question": question, "answer": answer, "rationale": rationale, **extra}
        if len(rows):
            record["objects"] = [
                {"name": self.names[n], "box": self.box(n), "index": int(n)} for n in rows
            ]
        return record

    def box(self, n: int) -> list[float]:
        """Row n of the boxes as a record has it: metres and radians to four decimals."""
        return [round(float(x), 4) for x in self.boxes[n]]

    def choice(self, question: str, options: list[str], answer: str, rows, rationale: str, **extra):
        """A multiple-choice record; the options keep this order."""
        letters = "ABCD"
        listed = [f"{letter}. {text}" for letter, text in zip(letters, options, strict=False)]
        letter = letters[options.index(answer)]
        rationale = f"{rationale} The answer is {letter}."
        return self.draft(question, letter, rows, rationale, options=listed, **extra)

    def with_view_relations(self, record: dict) -> dict:
        """Adds left_right and above_below of the first two objects where view 1 shows both."""
        rows = [item["index"] for item in record.get("objects", [])][:2]
        if len(rows) == 2 and (self.seen.rays[0, rows] >= FIRST_SEEN).all():
            left, _, above, _ = self.view[rows[0], rows[1]]
            named = (("left_right", left), ("above_below", above))
            sure = {name: float(round(p)) for name, p in named if abs(p - 0.5) > 0.45}
            if sure:
                record["relation"] = record.get("relation", {}) | sure
        return record


def _wrapped(angle):
    """The same angle in [-180, 180) degrees."""
    return (angle + 180) % 360 - 180


# ------------------------------------------------------------------------------ four relations


def _proximity(ask: _Asker) -> Iterator[dict]:
    triples = itertools.permutations(ask.single, 3)
    for anchor, a, b in ask.shuffled(triples):
        near, far = sorted((ask.gaps[anchor, a], ask.gaps[anchor, b]))
        if far - near < 0.3 or far < 1.25 * near:
            continue
        first = ask.gaps[anchor, a] < ask.gaps[anchor, b]
        names = [ask.names[n] for n in (anchor, a, b)]
        winner = names[1] if first else names[2]
        rationale = (
            f"The {names[1]} is {_metres(ask.gaps[anchor, a])} from the {names[0]}. "
            f"The {names[2]} is {_metres(ask.gaps[anchor, b])} from the {names[0]}. "
            f"So the {winner} is closer."
        )
        question = f"Which is closer to the {names[0]}, the {names[1]} or the {names[2]}?"
        relation = {"proximity": float(first)}
        yield ask.draft(question, winner, (anchor, a, b), rationale, relation=relation)


def _contact(ask: _Asker) -> Iterator[dict]:
    for pair in ask.shuffled(ask.seen.pairs):
        if any(n not in ask.single for n in pair):
            continue
        a, b = ask.shuffled(pair)
        gap = ask.gaps[a, b]
        touching = gap <= TOUCHING
        if not touching and gap < APART:
            continue
        names = ask.names[a], ask.names[b]
        measured = "no gap" if touching else f"a gap of {_metres(gap)}"
        verdict = "touch" if touching else "do not touch"
        rationale = (
            f"Between the {names[0]} and the {names[1]} there is {measured}. They {verdict}."
        )
        question = f"Is the {names[0]} touching the {names[1]}?"
        answer = "yes" if touching else "no"
        relation = {"contact": float(touching)}
        yield ask.draft(question, answer, (a, b), rationale, relation=relation)


def _size_comparison(ask: _Asker) -> Iterator[dict]:
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


def _orientation(ask: _Asker) -> Iterator[dict]:
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
            question, side, (stand, face, target), _turning(names, angle), relation=relation
        )


# ------------------------------------------------------------------------------------- numbers


def _numeric(ask: _Asker, question: str, value: float, text: str, unit: str, rows, rationale: str):
    return ask.draft(question, text, rows, rationale, value=float(value), unit=unit)


def _object_counting(ask: _Asker) -> Iterator[dict]:
    """Groups of several, largest first; single objects are not counted [VSI-Bench, B.1]."""
    several = [
        name
        for name, rows in ask.groups.items()
        if len(rows) > 2 or (len(rows) == 2 and ask.rng.random() < PAIR_SHARE)
    ]
    several.sort(key=lambda name: -len(ask.groups[name]))
    for name in several:
        rows = ask.groups[name]
        first = (ask.seen.rays[:, rows] >= UNSEEN).argmax(0)
        steps = [
            f"View {view + 1} shows {(first == view).sum()} new {name}(s)."
            for view in np.unique(first)
        ]
        rationale = " ".join([*steps, f"In total there are {len(rows)}."])
        question = f"How many {name}(s) are in this room?"
        yield _numeric(ask, question, len(rows), str(len(rows)), "items", (), rationale)


def _abs_distance(ask: _Asker) -> Iterator[dict]:
    """Distances spread in log scale: the pair that is closest to a drawn distance."""
    pairs = [p for p in itertools.combinations(ask.single, 2) if ask.gaps[p] >= APART]
    while pairs:
        wish = np.exp(ask.rng.uniform(np.log(0.3), np.log(7.0)))
        pair = min(pairs, key=lambda p: abs(np.log(ask.gaps[p] / wish)))
        pairs.remove(pair)
        a, b = ask.shuffled(pair)
        text = f"{ask.gaps[a, b]:.1f}"
        names = ask.names[a], ask.names[b]
        rationale = (
            f"The {names[0]} is {_compass(ask.boxes[b], ask.boxes[a])} of the {names[1]}. "
            f"Between their closest points there are {text} meters."
        )
        question = (
            "Measuring from the closest point of each object, what is the direct distance between "
            f"the {names[0]} and the {names[1]} (in meters)?"
        )
        yield _numeric(ask, question, float(text), text, "m", (a, b), rationale)


def _object_size(ask: _Asker) -> Iterator[dict]:
    for n in ask.shuffled(ask.single):
        typical = ask.seen.typical.get(ask.names[n])
        if typical is not None:
            unusual = abs(np.log(ask.boxes[n, 3:6].max() / typical)) / USUAL
            if ask.rng.random() > unusual:
                continue
        edges = [round(100 * float(edge)) for edge in ask.boxes[n, 3:6]]
        name, longest = ask.names[n], max(edges)
        rationale = (
            f"The {name} is {edges[0]} centimeters long, {edges[1]} centimeters wide and "
            f"{edges[2]} centimeters high. The longest is {longest} centimeters."
        )
        question = (
            "What is the length of the longest dimension (length, width, or height) of the "
            f"{name}, measured in centimeters?"
        )
        yield _numeric(ask, question, longest, str(longest), "cm", (n,), rationale)


def _room_size(ask: _Asker) -> Iterator[dict]:
    x, y = ask.seen.room[:2]
    text = f"{ask.seen.floor:.1f}"
    covered = ask.seen.floor / (x * y)
    part = f" Its floor covers {covered:.0%} of that." if covered < 0.99 else ""
    rationale = f"The room is {_metres(x)} by {_metres(y)}.{part} That is {text} square meters."
    question = (
        "What is the size of this room (in square meters)? \n"
        "If multiple rooms are shown, estimate the size of the combined space."
    )
    yield _numeric(ask, question, float(text), text, "m2", (), rationale)


def _object_box(ask: _Asker) -> Iterator[dict]:
    """Boxes in the world frame: the middle of the floor is its origin, y is north, z is up."""
    for n in ask.box_rng.permutation(ask.single):
        name, box = ask.names[n], ask.box(n)
        x, y, z, *edges, yaw = box
        length, width, height = (round(100 * edge) for edge in edges)
        rationale = (
            f"From the middle of the room, the {name} stands {_metres(abs(x))} to the "
            f"{'east' if x > 0 else 'west'} and {_metres(abs(y))} to the "
            f"{'north' if y > 0 else 'south'}, its center {_metres(z)} above the floor. "
            f"It is {length} centimeters long, {width} centimeters wide and {height} centimeters "
            f"high, and turned by {round(np.degrees(yaw))} degrees."
        )
        # Rounded first: -0.004 is 0.00, not -0.00.
        answer = " ".join(f"{round(value, 2) + 0.0:.2f}" for value in box)
        question = f"What is the 3D bounding box of the {name}?"
        yield ask.draft(question, answer, (n,), rationale, box=box)


# ----------------------------------------------------------------------------- multiple choice


def _rel_distance(ask: _Asker) -> Iterator[dict]:
    """The closest of four categories (three or two in a poor room), by their nearest instances."""
    for anchor in ask.shuffled(ask.single):
        nearest = {
            name: min(rows, key=lambda n: ask.gaps[anchor, n])
            for name, rows in ask.groups.items()
            if name != ask.names[anchor]
        }
        names = ask.shuffled(nearest)[:4]
        distance = {name: ask.gaps[anchor, nearest[name]] for name in names}
        ranked = sorted(names, key=distance.__getitem__)
        if len(names) < 2 or distance[ranked[1]] - distance[ranked[0]] < 0.25:
            continue
        measured = (f"The {name} is {_metres(distance[name])} away." for name in names)
        question = (
            f"Measuring from the closest point of each object, which of these objects "
            f"({', '.join(names)}) is the closest to the {ask.names[anchor]}?\n"
            "If there are multiple instances of an object category, measure to the closest."
        )
        rows = [anchor, *(nearest[name] for name in names)]
        rationale = f"{' '.join(measured)} The {ranked[0]} is the closest."
        yield ask.choice(question, names, ranked[0], rows, rationale)


_CARTESIAN = (
    "The directions refer to the quadrants of a Cartesian plane "
    "(if I am standing at the origin and facing along the positive y-axis)."
)
_BACK = "An object is to my back if I would have to turn at least 135 degrees in order to face it."

_QUADRANTS = ("front-right", "front-left", "back-left", "back-right")


def _easy(angle: float) -> str | None:
    return ("left" if angle > 0 else "right") if _clear(abs(angle), (0, 180)) else None


def _medium(angle: float) -> str | None:
    if abs(angle) > 135 + _MARGIN:
        return "back"
    return _easy(angle) if abs(angle) < 135 - _MARGIN else None


def _hard(angle: float) -> str | None:
    if not _clear(abs(angle), (0, 90, 180), _MARGIN):
        return None
    return f"{'front' if abs(angle) < 90 else 'back'}-{'left' if angle > 0 else 'right'}"


def _direction(
    classify: Callable[[float], str | None], classes: tuple[str, ...], asked: str
) -> Callable[[_Asker], Iterator[dict]]:
    """Questions of the form "standing by, facing"; the class is drawn before the objects."""

    def make(ask: _Asker) -> Iterator[dict]:
        found: dict[str, list] = {}
        for rows, angle in ask.triples.items():
            label = classify(angle)
            if label:
                found.setdefault(label, []).append((rows, angle))
        while found:
            label = ask.shuffled(sorted(found))[0]
            rows, angle = found[label].pop(ask.rng.integers(len(found[label])))
            if not found[label]:
                del found[label]
            names = [ask.names[n] for n in rows]
            question = f"If I am standing by the {names[0]} and facing the {names[1]}, is the " + (
                asked.format(target=names[2], faced=names[1])
            )
            yield ask.choice(question, ask.shuffled(classes), label, rows, _turning(names, angle))

    return make


_TURNS = ("Turn Left", "Turn Right", "Turn Back")


def _turn_classes(angle: np.ndarray) -> list:
    """Index in _TURNS of the turn that brings a robot to face something at each angle.

    None where the turn is unclear or small. Nested lists like the array of angles in degrees.
    """
    side = (np.abs(angle) >= 45) & (np.abs(angle) <= 135 - _MARGIN)
    classes = np.where(side, (angle < 0).astype(object), None)
    classes[np.abs(angle) >= 135 + _MARGIN] = 2
    return classes.tolist()


def _route_planning(ask: _Asker) -> Iterator[dict]:
    """Routes with one blank (go to what you face, turn, go on) or two; the turns drawn first."""
    blanks = 1 if ask.rng.random() < 0.6 or len(ask.single) < 4 else 2
    bearing, near = np.array(ask.bearing), np.array(ask.distance) < MIN_WAY
    # Turn classes by three objects: on the spot (stand, face, target), or on the way a, b, c.
    spot = _turn_classes(np.where(near[:, :, None] | near[:, None], 0, ask.turns))
    way = _wrapped(bearing[None] - bearing[:, :, None])
    way = _turn_classes(np.where(near[:, :, None] | near[None], 0, way))
    found: dict[tuple[int, ...], list] = {}
    for rows in itertools.permutations(ask.single, 2 + blanks):
        if blanks == 1:
            start, faced, goal = rows
            turns = (way[start][faced][goal],)
        else:
            start, faced, stop, goal = rows
            turns = (spot[start][faced][stop], way[start][stop][goal])
        if None not in turns:
            found.setdefault(turns, []).append(rows)
    while found:
        turns = ask.shuffled(sorted(found))[0]
        rows = found[turns].pop(ask.rng.integers(len(found[turns])))
        if not found[turns]:
            del found[turns]
        stops = rows if blanks == 1 else (rows[0], *rows[2:])
        if all(ask.passable(a, b) for a, b in itertools.pairwise(stops)):
            yield _route(ask, rows, tuple(_TURNS[turn] for turn in turns))


def _route(ask: _Asker, rows: tuple[int, ...], turns: tuple[str, ...]) -> dict:
    start, faced, *way = (ask.names[n] for n in rows)
    steps = [] if len(turns) == 2 else [f"Go forward until the {faced}"]
    solved = list(steps)
    for turn, name in zip(turns, way, strict=True):
        steps += ["[please fill in]", f"Go forward until the {name}"]
        solved += [turn, f"Go forward until the {name}"]
    numbered = " ".join(f"{k}. {step}" for k, step in enumerate(steps, 1))
    question = (
        f"You are a robot beginning at the {start} and facing the {faced}. "
        f"You want to navigate to the {way[-1]}. You will perform the following actions "
        "(Note: for each [please fill in], choose either 'turn back,' 'turn left,' or "
        f"'turn right.'): {numbered}. You have reached the final destination."
    )
    every = ask.shuffled(itertools.product(_TURNS, repeat=len(turns)))
    others = [option for option in every if option != turns][:3]
    options = [", ".join(option) for option in ask.shuffled([turns, *others])]
    # In the order of the text: start, faced, destination, then a way point in between; which of
    # them the turns are between, `question_arrays` knows.
    named = [rows[0], rows[1], rows[-1], *rows[2:-1]]
    rationale = " ".join(f"{k}. {step}." for k, step in enumerate(solved, 1))
    return ask.choice(question, options, ", ".join(turns), named, rationale)


def _appearance_order(ask: _Asker) -> Iterator[dict]:
    """Four nouns (or three) whose first views differ; glimpsed before they appear: left out."""
    first: dict[int, list[str]] = {}
    for name, rows in ask.groups.items():
        pixels = ask.seen.rays[:, rows]
        shown = (pixels >= FIRST_SEEN).any(1)
        if not shown.any():
            continue
        view = int(shown.argmax())
        if (pixels[:view].sum(1) < UNSEEN).all():
            first.setdefault(view, []).append(name)
    views = sorted(first)
    if len(views) < 3:
        return
    order = [ask.shuffled(first[view])[0] for view in views]
    if len(order) == 4 and ask.rng.random() < 0.2:
        order.pop(ask.rng.integers(4))
    others = [p for p in itertools.permutations(order) if list(p) != order]
    options = [", ".join(p) for p in ask.shuffled([tuple(order), *ask.shuffled(others)[:3]])]
    listed = ask.shuffled(order)
    where = {name: view for view, names in first.items() for name in names}
    # Of several the one that decides: which is seen best where the category first appears.
    rows = [max(ask.groups[name], key=lambda n: ask.seen.rays[where[name], n]) for name in listed]
    seen = " ".join(f"The {name} first appears in view {where[name] + 1}." for name in order)
    question = (
        "What will be the first-time appearance order of the following categories in the video: "
        f"{', '.join(listed)}?"
    )
    yield ask.choice(question, options, ", ".join(order), rows, seen)


# ----------------------------------------------------------------------------------- sentences

_NUMBER_WORDS = ("no", "one", "two", "three", "four", "five")


def _description(ask: _Asker) -> Iterator[dict]:
    """Room size word and the four categories that fill most of the views, larger counts first."""
    area = ask.seen.floor
    size = "small" if area < 18 else "medium" if area < 32 else "large"
    groups: dict[str, list[int]] = {}
    for n, name in enumerate(ask.names):
        groups.setdefault(name, []).append(n)
    pixels = {name: ask.seen.rays[:, rows].sum() for name, rows in groups.items()}
    shown = sorted(groups, key=lambda name: -pixels[name])[:4]
    shown.sort(key=lambda name: (-len(groups[name]), name))
    words = [_some(name, len(groups[name])) for name in shown]
    listed = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
    rationale = (
        f"The room measures {area:.1f} square meters, so it is {size}. "
        f"The views show {listed} best."
    )
    answer = f"A {size} room with {listed}."
    yield ask.draft("Describe this room in one sentence.", answer, (), rationale)


def _some(name: str, count: int) -> str:
    if count > 1:
        plural = name[:-1] + "ves" if name.endswith("lf") else name + "s"
        return f"{_NUMBER_WORDS[count] if count < len(_NUMBER_WORDS) else count} {plural}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _metres(value: float) -> str:
    return f"{value:.1f} meters"


def _clear(angle: float, bounds: tuple[float, ...], margin: float = LEFT_RIGHT_MARGIN) -> bool:
    return all(abs(angle - bound) >= margin for bound in bounds)


def _turning(names: list[str], angle: float) -> str:
    side = "left" if angle > 0 else "right"
    return (
        f"I stand by the {names[0]} and face the {names[1]}. "
        f"To face the {names[2]} I turn {abs(angle):.0f} degrees to the {side}."
    )


def _compass(here: np.ndarray, there: np.ndarray) -> str:
    """Main world direction from one box to another, the world's y axis taken as north."""
    x, y = there[:2] - here[:2]
    if abs(x) > abs(y):
        return "east" if x > 0 else "west"
    return "north" if y > 0 else "south"


_KINDS = (
    ("proximity", 2, _proximity),
    ("contact", 2, _contact),
    ("size_comparison", 2, _size_comparison),
    ("orientation", 2, _orientation),
    ("object_counting", 2, _object_counting),
    ("object_abs_distance", 3, _abs_distance),
    ("object_size_estimation", 3, _object_size),
    ("room_size_estimation", 1, _room_size),
    ("object_rel_distance", 2, _rel_distance),
    (
        "object_rel_direction_easy",
        1,
        _direction(_easy, ("left", "right"), "{target} to the left or the right of the {faced}?"),
    ),
    (
        "object_rel_direction_medium",
        1,
        _direction(
            _medium, ("left", "right", "back"), f"{{target}} to my left, right, or back?\n{_BACK}"
        ),
    ),
    (
        "object_rel_direction_hard",
        1,
        _direction(
            _hard,
            _QUADRANTS,
            "{target} to my front-left, front-right, back-left, or back-right?\n" + _CARTESIAN,
        ),
    ),
    ("route_planning", 1, _route_planning),
    ("obj_appearance_order", 1, _appearance_order),
    ("scene_description", 1, _description),
    ("object_box", 6, _object_box),
)
KINDS = tuple(kind for kind, _, _ in _KINDS)
"""Of all questions about rooms, in the order in which they are made."""
