"""Published data sets as exports: what `geode-jax prepare` reads, in the data sets' own layouts.

A source of scenes (ScanNet, 3D-FRONT, ...) makes the arrays of scenes. A source of questions
(ScanQA, VSI-590K, ...) adds questions to the scenes of an existing export, `Request.scenes`, made
by a source of scenes or by an exporter in `third_party`. Its new export has the same scenes, the
questions of the old export, and then its own. The table of sources is in `prepare.py`.
"""

import dataclasses
from collections import Counter
from pathlib import Path

from geode_jax import ranges
from geode_jax.errors import UserError
from geode_jax.exports.files import Entry
from geode_jax.sources.splits import parse_shares


@dataclasses.dataclass(frozen=True)
class Request:
    """Arguments of a source.

    Attributes:
        root: folder of the data set, in the layout that its own documentation describes.
        out: folder of the new export.
        scenes: for sources of questions: the export whose scenes the questions are about.
        parts: parts of the data set, such as "base" and "complex" of ViCA; empty means all.
        exclude: names of scenes that must not be in training, such as those of an evaluation, read
            by `files.read_list` and matched by `exports.scene_names`.
        allow_missing: whether entries of lists that name no scene are counted instead of refused.
        split: shares of the splits that are drawn, such as "80/20", see `splits.parse_shares`;
            empty for the data set's own lists, and `splits.SHARES` where it has none.
        views: largest number of views of a scene.
        patch_grid: (gh, gw) of a view.
        seed: seed of all random draws.
        metric: whether the cameras of pictures are in metres with z up; for `images` alone.
    """

    root: Path
    out: Path
    scenes: Path | None = None
    parts: tuple[str, ...] = ()
    exclude: tuple[Entry, ...] = ()
    views: int = 8
    patch_grid: tuple[int, int] = (8, 8)
    seed: int = 0
    allow_missing: bool = False
    split: str = ""
    metric: bool = False

    def __post_init__(self):
        ranges.check(self, {"views": ranges.whole(1), "seed": ranges.whole(0)})
        if len(self.patch_grid) != 2 or min(self.patch_grid) < 1:
            raise UserError(f"--grid: {self.patch_grid} are not two numbers above 0")
        if self.split:
            parse_shares(self.split)

    def refuse_question_options(self, name: str) -> None:
        """Refuses, for a source of scenes, the options of sources of questions.

        Args:
            name: of the source, for the message.

        Raises:
            UserError: `parts` or `scenes` is given.
        """
        if self.parts:
            raise UserError(f"--part: {name} has none")
        if self.scenes:
            raise UserError(f"--scenes: {name} has scenes of its own")


@dataclasses.dataclass
class Report:
    """What was kept and dropped of a data set.

    Attributes:
        kept: "scenes", "questions" and so on -> count.
        dropped: what and why, such as "frame: lost tracking" -> count.
        corrected: correction on reading -> count.
        warnings: signs of wrong cameras in the new scenes, see `cameras.CameraCheck`.
    """

    kept: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    corrected: Counter[str] = dataclasses.field(default_factory=Counter)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns lines for a terminal: what was kept, corrected and dropped, and why."""
        kept = ", ".join(f"{count:,} {what}" for what, count in self.kept.items())
        return [
            kept,
            *(f"corrected {n:,}: {what}" for what, n in self.corrected.most_common()),
            *(f"dropped {n:,}: {why}" for why, n in self.dropped.most_common()),
            *(f"warning: {line}" for line in self.warnings),
        ]
