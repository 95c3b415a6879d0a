"""Measures a hundred questions about one scene, whose state is computed once.

    python -m benchmarks.scene_questions [--rounds 7]

`Predictor.answer` answers one question after the other with the laptop student, as `geode-jax ask`
does (untrained, which changes no times). It is compared with encoding the scene again for each
question, and with the compiled answering alone on given scene state and question arrays, a lower
bound for single questions.
"""

import tempfile
from pathlib import Path

import jax

from benchmarks import ledger
from benchmarks.cold_start import start
from geode_jax.results.predict import Predictor

QUESTIONS = 100


def main() -> None:
    """Measures, prints a table and writes `scene_questions.json`."""
    arguments = ledger.parser(__doc__, rounds=7).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start(root, root / "cache", "run")
        predictor = Predictor(root / "run")
        rows = measure(predictor, arguments.rounds)
    ledger.write("scene_questions", rows)


def measure(predictor: Predictor, rounds: int) -> list[dict]:
    """Returns the two rows."""
    scene_id = predictor.export.scene_ids("test")[0]
    own = [record["question"] for record in predictor.questions(scene_id)]
    asked = [own[i % len(own)] for i in range(QUESTIONS)]
    encode_scene, answer, parameters = predictor._compiled
    pipeline = predictor._pipeline
    scene = pipeline.one_scene(scene_id)
    records = [predictor.record(scene_id, question) for question in asked]
    batches = [pipeline.one_question(record, scene) for record in records]

    def forget():
        predictor._last = None

    def ours():
        forget()
        for question in asked:
            predictor.answer(scene_id, question)

    def again():
        for question in asked:
            forget()
            predictor.answer(scene_id, question)

    with jax.set_mesh(predictor._trained.mesh):
        encoded = encode_scene(parameters, batches[0])

        def given():
            for batch in batches:
                jax.device_get(answer(parameters, encoded, batch, None))

        shape = [QUESTIONS]
        rows = []
        for name, other in (
            ("encoding the scene again", again),
            ("the scene's state given", given),
        ):
            times = ledger.alternate(ours, other, rounds)
            what = f"questions about one scene, against {name}"
            rows.append(ledger.row(what, *times, unit="s", dtype="float32", shape=shape))
    return rows


if __name__ == "__main__":
    main()
