"""A hundred questions about one scene: what of the scene is computed once, and what it costs.

    python -m benchmarks.scene_questions [--rounds 7]

The laptop student (untrained: it says as many words), asked through `Predictor.answer` one question
after the other, as `geode-jax ask` does. Against it, in turn: the same, but looking at the scene
anew for each question; and the compiled answering alone, a hundred times, with the scene's state
given and the questions' arrays made beforehand, which nothing that asks one by one can beat.
"""

import argparse
import tempfile
from pathlib import Path

import jax

from benchmarks import ledger
from benchmarks.cold_start import start
from geode_jax.results.predict import Predictor

QUESTIONS = 100


def main() -> None:
    """Measures, prints a table and writes `scene_questions.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start(root, root / "cache", "run")
        predictor = Predictor(root / "run")
        rows = measure(predictor, arguments.rounds)
    ledger.write("scene_questions", rows)


def measure(predictor: Predictor, rounds: int) -> list[dict]:
    """The two rows."""
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

    def anew():
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
        for name, other in (("looking anew", anew), ("the scene's state given", given)):
            times = ledger.alternate(ours, other, rounds)
            what = f"questions about one scene, against {name}"
            rows.append(ledger.row(what, *times, unit="s", dtype="float32", shape=shape))
    return rows


if __name__ == "__main__":
    main()
