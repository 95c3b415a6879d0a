"""The field's data sets as exports: what `geode-jax prepare` reads from disk, in their own layouts.

A source of scenes (ScanNet, 3D-FRONT) makes the arrays of scenes. A source of questions (ScanQA,
VSI-590K, ...) asks about scenes of an export that exists, `Request.scenes`, made by a source of
scenes or by an exporter of `third_party`: the new export has those scenes and, behind the questions
that the old one had, its own.
"""

import dataclasses
import importlib
from collections import Counter
from pathlib import Path

from geode_jax import ranges
from geode_jax.errors import UserError
from geode_jax.exports.files import Entry


@dataclasses.dataclass(frozen=True)
class Request:
    """What shall be prepared.

    Attributes:
        root: folder of the data set, in the layout that its own documentation describes.
        out: the new export.
        scenes: of a source of questions: the export that it asks about.
        parts: of the data set, such as "base" and "complex" of ViCA; empty: all.
        exclude: names of scenes that must not be trained on, those of an evaluation, as
            `files.read_list` reads them; what they mean: `exports.scene_names`.
        allow_missing: entries of lists that name no scene here are counted, not refused.
        views: of a scene, at most.
        patch_grid: (gh, gw) of a view.
        seed: of what is drawn.
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

    def __post_init__(self):
        ranges.check(self, {"views": ranges.whole(1), "seed": ranges.whole(0)})
        if len(self.patch_grid) != 2 or min(self.patch_grid) < 1:
            raise UserError(f"--grid: {self.patch_grid} are not two numbers above 0")


@dataclasses.dataclass
class Report:
    """What became of a data set.

    Attributes:
        kept: such as "scenes" and "questions" -> how many.
        dropped: reason, with what it is of, such as "frame: lost tracking" -> how many.
        corrected: what was read otherwise than it stands there -> how often.
        warnings: what the scenes that were made show of wrong cameras, see `cameras.Watch`.
    """

    kept: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    corrected: Counter[str] = dataclasses.field(default_factory=Counter)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """For a terminal: first what is there, then what is not and why."""
        kept = ", ".join(f"{count:,} {what}" for what, count in self.kept.items())
        return [
            kept,
            *(f"corrected {n:,}: {what}" for what, n in self.corrected.most_common()),
            *(f"dropped {n:,}: {why}" for why, n in self.dropped.most_common()),
            *(f"warning: {line}" for line in self.warnings),
        ]


SOURCES: dict[str, str] = {
    "scannet": "scannet:prepare",
    "3d-front": "front3d:prepare",
    "scanqa": "scannet_questions:scanqa",
    "sqa3d": "scannet_questions:sqa3d",
    "vsi590k": "conversations:vsi590k",
    "vica322k": "conversations:vica322k",
    "vlm3r": "conversations:vlm3r",
    "llava3d": "conversations:llava3d",
    "ssr-cot": "rationales:ssr_cot",
    "vica-thinking": "rationales:vica_thinking",
    "cambrian-alignment": "captions:cambrian_alignment",
    "s-mit": "captions:s_mit",
}
"""Name -> `module:function` of this package; the function makes a `Report` of a `Request`."""


def prepare(source: str, request: Request) -> Report:
    """Makes the export of a data set; where it was cut off, the same request goes on.

    Raises:
        UserError, ExportError: there is no such source, or the data set is not in its layout.
    """
    if source not in SOURCES:
        raise UserError(f"--source: {source!r} is none of {', '.join(SOURCES)}")
    module, function = SOURCES[source].split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)(request)
