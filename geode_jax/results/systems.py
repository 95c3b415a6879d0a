"""What the systems make of a finished run: its scores, how they are shown, what is published."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from flax import nnx

from geode_jax.results import geode, student
from geode_jax.runs.build import Run
from geode_jax.runs.geode import GeodeSettings
from geode_jax.runs.settings import Settings
from geode_jax.runs.student import StudentSettings
from geode_jax.runs.trained import Trained
from geode_jax.training.step import TrainState
from geode_jax.weights.convert import Model


class Finish(Protocol):
    """Scores a finished training."""

    def __call__(
        self,
        run: Run,
        state: TrainState,
        workdir: Path,
        train: dict,
        losses: dict[str, float],
        check: Callable[[], None] = ...,
    ) -> dict[str, Any]:
        """Writes the files of a finished run, and returns its summary."""
        ...


@dataclasses.dataclass(frozen=True)
class Results:
    """What becomes of a finished run.

    Attributes:
        finish: scores it.
        show: prints its summary.
        published: returns the model that is published, of a run's model and None or a part.
        entries: returns what `config.json` of the published whole has beside the model's sizes.
        refuse: raises a UserError if a run, or a part of it, cannot be published.
    """

    finish: Finish
    show: Callable[[dict[str, Any], Path], None]
    published: Callable[[nnx.Module, str | None], Model]
    entries: Callable[[Trained], dict[str, Any]]
    refuse: Callable[[Settings, Path, str | None], None]


_RESULTS: Mapping[type[Settings], Results] = {
    StudentSettings: Results(
        student.evaluate_and_report,
        student.show,
        student.published,
        student.entries,
        student.refuse_to_publish,
    ),
    GeodeSettings: Results(
        geode.evaluate_stage,
        geode.show,
        geode.published,
        geode.entries,
        geode.refuse_to_publish,
    ),
}
"""The class of a system's settings -> what becomes of its runs."""


def results_of(settings: Settings) -> Results:
    """Returns what becomes of a finished run with these settings."""
    return _RESULTS[type(settings)]
