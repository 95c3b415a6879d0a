"""Questions about RGB-D views, measured from their own depth and poses.

Places. A question names a place of a view in words: the centre of the view, or the middle of one
of its quarters or edges, see `PLACES`. A place exists only if the depth is known and uniform around
it; its point is the one at the median depth.

Kinds (`KINDS`), their answers, and why the wording alone does not give them away:

surface_distance  metres from the camera's centre to the point, along the ray. For each place, near
                  and far surfaces are drawn equally often.
nearer_view       which of two views has the smaller such distance at the same place. The nearer
                  one is named first as often as second.
camera_motion     metres between the centres of two cameras, in a straight line.
space_size        metres, the longest horizontal extent of the surface that one view or all views
                  show: the largest width over all horizontal directions, each between the 1st and
                  the 99th percentile of the points. Horizontal means orthogonal to `up`.
left_right        whether, in a camera's frame, the point at a place of one view is left or right of
                  the point at the same place of another view, by the angle about the camera's y
                  axis. Both are in front of the camera and 3 degrees apart.
above_below       whether the point at a place of one view is higher or lower (along `up`) than that
                  of another view, by 0.1 m or more.

Questions of the last two kinds and of nearer_view can be turned around. The direction is chosen
such that, for each wording (up to the numbers of the views), the counts of the two answers differ
by at most one. Views of a scene should be in random order, so that their numbers carry no
information. The range of a number cannot be hidden: spaces seen in one room have similar sizes.
"""

import dataclasses
import functools
import itertools
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import numpy as np

PLACES = {
    "centre": (0.5, 0.5),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "upper left": (0.25, 0.25),
    "upper right": (0.75, 0.25),
    "lower left": (0.25, 0.75),
    "lower right": (0.75, 0.75),
}
"""Name -> position in the image as fractions of its width and height, from the upper left."""

MIN_DISTANCE_RATIO = 1.1
"""Least ratio of the two distances of a nearer_view question."""
MIN_SIDE_ANGLE = np.radians(3)
"""Least angle between the two points of a left_right question."""
MIN_POINT_DEPTH = 0.2
"""Least z of these points in the camera's frame, metres."""
MIN_HEIGHT_DIFFERENCE = 0.1
"""Least difference of heights of an above_below question, metres."""
MIN_CAMERA_MOTION = 0.05
"""Smallest distance of a camera_motion question, metres."""
LOG_DISTANCE_BIN = 0.1
"""Width in log distance of the bins by which near and far surfaces become equally frequent."""
MAX_SPACE_SIZES = 2
"""Most space_size questions of a scene; their answers vary least."""
SPACE_DIRECTIONS = 18
"""Number of horizontal directions, over half a turn, in which a space is measured."""


@dataclasses.dataclass(frozen=True)
class SeenView:
    """Measurements of one view, world frame, metres.

    Attributes:
        world_from_camera: [4, 4], OpenCV axes.
        places: name of a place around which the depth is uniform -> its point [3].
        surface: [n, 3] points of the seen surface, spread evenly over the image.
    """

    world_from_camera: np.ndarray
    places: dict[str, np.ndarray]
    surface: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """The camera's centre [3]."""
        return self.world_from_camera[:3, 3]

    @functools.cached_property
    def distances(self) -> dict[str, float]:
        """Name of a place -> metres from the camera's centre to its point."""
        return {
            name: float(np.linalg.norm(point - self.centre)) for name, point in self.places.items()
        }

    def in_camera(self, point: np.ndarray) -> np.ndarray:
        """Returns a world point [3] in the camera's frame (x right, y down, z forward)."""
        return self.world_from_camera[:3, :3].T @ (point - self.centre)


def space_size(points: np.ndarray, up: np.ndarray) -> float:
    """Returns the longest horizontal extent of points [n, 3], metres; see the kind of this name.

    Args:
        points: world frame.
        up: unit vector [3] against gravity.
    """
    first = np.cross(up, np.eye(3)[np.argmin(np.abs(up))])
    first /= np.linalg.norm(first)
    angles = np.arange(SPACE_DIRECTIONS) * np.pi / SPACE_DIRECTIONS
    directions = np.outer(np.cos(angles), first) + np.outer(np.sin(angles), np.cross(up, first))
    low, high = np.percentile(directions @ points.T, (1, 99), axis=1)
    return float((high - low).max())


class Questioner:
    """Makes questions about the scenes of one split, with answers balanced over all of them."""

    def __init__(self, views: Sequence[SeenView], up: np.ndarray, rng: np.random.Generator):
        """Counts the distances of a split.

        Args:
            views: all views of the split's scenes.
            up: unit vector [3] against gravity, world frame.
            rng: source of all random draws.
        """
        self._up, self._rng = up, rng
        self._answers: Counter = Counter()  # (kind, place, answer) -> questions
        self._bins = Counter(
            (name, _bin(distance)) for view in views for name, distance in view.distances.items()
        )

    def ask(self, scene_id: str, views: Sequence[SeenView], count: int) -> list[dict]:
        """Returns question records of a scene, the kinds in turn.

        Args:
            scene_id: the scene's id; the records' ids begin with it.
            views: the scene's views in order; view 1 is the first.
            count: number of records; fewer if the views do not give as many.
        """
        turns = deque((kind, make(self, views)) for kind, make in KINDS.items())
        records = []
        while turns and len(records) < count:
            kind, drafts = turns.popleft()
            draft = next(drafts, None)
            if draft is not None:
                name = f"{scene_id}_{len(records):02d}"
                records.append({"id": name, "scene_id": scene_id, "kind": kind} | draft)
                turns.append((kind, drafts))
        return records

    def _shuffled(self, items) -> list:
        items = list(items)
        return [items[k] for k in self._rng.permutation(len(items))]

    def _same_place(self, views: Sequence[SeenView]) -> list[tuple[int, int, str]]:
        """Returns (view, other view, place) of places that both views have, in random order."""
        return [
            (*self._shuffled(pair), place)
            for pair, place in self._shuffled(
                itertools.product(itertools.combinations(range(len(views)), 2), PLACES)
            )
            if all(place in views[n].places for n in pair)
        ]

    def _next_answer(self, kind: str, place: str, answers: tuple[str, str]) -> str:
        """Returns and counts the answer that this wording had less often, a random one on a tie."""
        one, other = self._shuffled(answers)
        counts = self._answers
        answer = one if counts[kind, place, one] <= counts[kind, place, other] else other
        counts[kind, place, answer] += 1
        return answer

    def _surface_distance(self, views: Sequence[SeenView]) -> Iterator[dict]:
        candidates = [(n, place) for n, view in enumerate(views) for place in view.places]
        rarity = np.array([1 / self._bins[p, _bin(views[n].distances[p])] for n, p in candidates])
        # Sorting by these keys draws without replacement, with weights of rarity.
        for k in np.argsort(self._rng.exponential(size=len(candidates)) / rarity):
            n, place = candidates[k]
            point, distance = views[n].in_camera(views[n].places[place]), views[n].distances[place]
            text = f"{distance:.1f}"
            if float(text) == 0:
                continue
            question = (
                f"How far is the surface at the {place} of view {n + 1} from the camera, in meters?"
            )
            rationale = (
                f"The depth at the {place} of view {n + 1} is {point[2]:.1f} meters. "
                f"Along the ray that is {text} meters."
            )
            yield _number(question, text, rationale)

    def _nearer_view(self, views: Sequence[SeenView]) -> Iterator[dict]:
        for a, b, place in self._same_place(views):
            near, far = (views[n].distances[place] for n in (a, b))
            if near > far:
                a, b, near, far = b, a, far, near
            if far < MIN_DISTANCE_RATIO * near:
                continue
            named_first = self._next_answer("nearer_view", place, ("nearer", "farther"))
            one, two = (a, b) if named_first == "nearer" else (b, a)
            yield {
                "question": f"Which view sees the nearer surface at its {place}, "
                f"view {one + 1} or view {two + 1}?",
                "answer": f"view {a + 1}",
                "rationale": f"At the {place}, the surface is {near:.1f} meters away in "
                f"view {a + 1} and {far:.1f} meters in view {b + 1}.",
            }

    def _camera_motion(self, views: Sequence[SeenView]) -> Iterator[dict]:
        for a, b in self._shuffled(itertools.combinations(range(len(views)), 2)):
            motion = views[b].in_camera(views[a].centre)
            distance = float(np.linalg.norm(motion))
            if distance < MIN_CAMERA_MOTION:
                continue
            text = f"{distance:.2f}" if distance < 1 else f"{distance:.1f}"
            question = (
                f"How far did the camera move between view {a + 1} and view {b + 1}, in meters?"
            )
            x, y, z = np.abs(motion)
            rationale = (
                f"Seen from view {b + 1}, the camera of view {a + 1} is {x:.2f} meters to the "
                f"side, {y:.2f} meters up or down and {z:.2f} meters ahead or behind. "
                f"Together that is {text} meters."
            )
            yield _number(question, text, rationale)

    def _space_size(self, views: Sequence[SeenView]) -> Iterator[dict]:
        for n in self._shuffled(range(len(views) + (len(views) > 1)))[:MAX_SPACE_SIZES]:
            alone = n < len(views)
            where = f"in view {n + 1}" if alone else "in all views together"
            shown = [views[n]] if alone else views
            text = f"{space_size(np.concatenate([v.surface for v in shown]), self._up):.1f}"
            if float(text) == 0:
                continue
            question = (
                f"What is the longest horizontal extent of the space seen {where}, in meters?"
            )
            rationale = f"Measured level, the surfaces seen {where} span {text} meters at most."
            yield _number(question, text, rationale)

    def _left_right(self, views: Sequence[SeenView]) -> Iterator[dict]:
        candidates = itertools.product(self._same_place(views), range(len(views)))
        for (a, b, place), seer in self._shuffled(candidates):
            points = [views[seer].in_camera(views[n].places[place]) for n in (a, b)]
            if min(point[2] for point in points) < MIN_POINT_DEPTH:
                continue
            one, two = (np.arctan2(x, z) for x, _, z in points)
            if abs(one - two) < MIN_SIDE_ANGLE:
                continue
            side = self._next_answer("left_right", place, ("left", "right"))
            if (side == "left") != (one < two):
                a, b, one, two = b, a, two, one
            yield {
                "question": f"Seen from the camera of view {seer + 1}, is the surface at the "
                f"{place} of view {a + 1} to the left or to the right of the surface at the "
                f"{place} of view {b + 1}?",
                "answer": side,
                "rationale": f"From the axis of the camera of view {seer + 1}, the surface in view "
                f"{a + 1} is at {_sideways(one)} and the one in view {b + 1} at {_sideways(two)}.",
                "relation": {"left_right": float(side == "left")},
            }

    def _above_below(self, views: Sequence[SeenView]) -> Iterator[dict]:
        for a, b, place in self._same_place(views):
            rise = float((views[a].places[place] - views[b].places[place]) @ self._up)
            if abs(rise) < MIN_HEIGHT_DIFFERENCE:
                continue
            answer = self._next_answer("above_below", place, ("higher", "lower"))
            if (answer == "higher") != (rise > 0):
                a, b = b, a
            yield {
                "question": f"Is the surface at the {place} of view {a + 1} higher or lower than "
                f"the surface at the {place} of view {b + 1}?",
                "answer": answer,
                "rationale": f"The two points differ in height by {abs(rise):.1f} meters. "
                f"The one in view {a + 1} is {answer}.",
                "relation": {"above_below": float(answer == "higher")},
            }


def _sideways(angle: float) -> str:
    """Returns an angle from a camera's axis in words; to the right is positive."""
    return f"{abs(np.degrees(angle)):.0f} degrees {'left' if angle < 0 else 'right'}"


def _bin(distance: float) -> int:
    return int(np.floor(np.log(distance) / LOG_DISTANCE_BIN))


def _number(question: str, text: str, rationale: str) -> dict:
    return {
        "question": question,
        "answer": text,
        "value": float(text),
        "unit": "m",
        "rationale": rationale,
    }


KINDS = {
    "surface_distance": Questioner._surface_distance,
    "nearer_view": Questioner._nearer_view,
    "camera_motion": Questioner._camera_motion,
    "space_size": Questioner._space_size,
    "left_right": Questioner._left_right,
    "above_below": Questioner._above_below,
}
"""Kind -> method that drafts its questions."""
