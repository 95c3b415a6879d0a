"""The answers of a blind run, which was trained without vision, beside those of a run that sees."""

from pathlib import Path

from geode_jax.runs.settings import Settings
from geode_jax.runs.summary import PREDICTIONS, read_predictions
from geode_jax.runtime.distributed import is_main


def blind_column(settings: Settings, questions: list[dict]) -> dict[str, list[dict]]:
    """Returns {"blind": answers of the run `eval.blind`}.

    Args:
        settings: of a run.
        questions: records of the questions that the run has answered.

    Returns:
        Empty if the run is blind itself, if there is no blind run, or, with a printed note, if that
        one has not answered all of these questions.

    Raises:
        UserError: the blind run's predictions are damaged.
    """
    path = Path(settings.eval.blind) / PREDICTIONS
    if not settings.loss.vision or not path.exists():
        return {}
    answers = _answers_of(path, questions)
    return {} if answers is None else {"blind": answers}


def _answers_of(path: Path, questions: list[dict]) -> list[dict] | None:
    """Returns a blind run's answers to these questions.

    Args:
        path: predictions of the blind run, which may be one on another export.
        questions: records of the questions.

    Returns:
        Its records in the order of the questions; None, and a printed note, unless it has answered
        every one of them.

    Raises:
        UserError: the file is damaged.
    """
    answered = {record["id"]: record for record in read_predictions(path)}

    def identity(record: dict) -> list:
        return [record.get(name) for name in ("kind", "question", "options", "answer")]

    found = [
        answered[q["id"]] for q in questions if identity(answered.get(q["id"], {})) == identity(q)
    ]
    if len(found) == len(questions):
        return found
    if is_main():
        print(
            f"note: eval.blind: {path} has answers to {len(found)} of these {len(questions)} "
            "questions (is it a run on another export?): it is left out",
            flush=True,
        )
    return None
