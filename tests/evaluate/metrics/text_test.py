"""Text metrics against the libraries called directly and against sums done by hand."""

import itertools
import math

import pytest

from geode_jax.errors import UserError
from geode_jax.evaluate.metrics import text as text_metrics
from geode_jax.evaluate.metrics.coco import coco_scores

TEACHER = (
    "The area appears to be a storage space, perhaps a closet or a utility room, with shelves and "
    "cabinets."
)
STUDENT = (
    "This appears to be a 3D scene where there is a cabinet with shelves, natural elements such as "
    "trees, and various objects arranged in a spatial layout."
)


def record(prediction, answer="the cat sat on the mat", **more):
    return {
        "id": "q0",
        "kind": "scene_description",
        "question": "What is there?",
        "answer": answer,
        "prediction": prediction,
        **more,
    }


def test_rouge_by_hand():
    # Words in common: the, cat, on, the, mat = 5 of 5 predicted, of 6 in the reference. Pairs in
    # common: "the cat", "on the", "the mat" = 3 of 4 and of 5.
    found = text_metrics.rouge("the cat on the mat", ("the cat sat on the mat",))
    assert found["rouge1"] == pytest.approx((1.0, 5 / 6, 10 / 11))
    assert found["rouge2"] == pytest.approx((3 / 4, 3 / 5, 2 / 3))
    assert found["rougeL"] == pytest.approx((1.0, 5 / 6, 10 / 11))


def test_rouge_takes_the_best_reference():
    found = text_metrics.rouge("a red chair", ("a table", "A red chair."))
    assert found["rouge1"] == (1.0, 1.0, 1.0)


def test_bleu_by_hand():
    # 5 of 5 words; pairs 3 of 4; triples: "on the mat" = 1 of 3; no four in common. Brevity
    # penalty exp(1 - 6/5).
    found = text_metrics.corpus_bleu(["the cat on the mat"], [["the cat sat on the mat"]])
    penalty = math.exp(1 - 6 / 5)
    assert found["bleu1"] == pytest.approx(penalty)
    assert found["bleu2"] == pytest.approx(penalty * (3 / 4) ** (1 / 2))
    assert found["bleu3"] == pytest.approx(penalty * (3 / 4 * 1 / 3) ** (1 / 3))
    assert found["bleu4"] == 0.0


def test_bleu_equals_nltk_on_a_corpus_with_several_references():
    from nltk.translate.bleu_score import corpus_bleu

    predictions = [STUDENT, "the chair is to the left of the big table", "there is a sofa here"]
    targets = [
        [TEACHER],
        ["the chair is on the left of the big table", "left of the big table is a chair"],
        ["a sofa is here", "there is a sofa in the room", "there is a bed"],
    ]
    found = text_metrics.corpus_bleu(predictions, targets)
    for order in (1, 2, 3, 4):
        expected = corpus_bleu(
            [[text_metrics.tokens(text) for text in texts] for texts in targets],
            [text_metrics.tokens(text) for text in predictions],
            weights=[1 / order] * order,
        )
        assert found[f"bleu{order}"] == pytest.approx(expected), order


def test_bleu_of_one_word_answers_is_zero_beyond_order_one():
    found = text_metrics.corpus_bleu(["yes", "no"], [["yes"], ["no"]])
    assert (found["bleu1"], found["bleu2"]) == (pytest.approx(1.0), 0.0)


def test_meteor_by_hand():
    # "cats" matches "cat" by its stem: 3 matches in one chunk, P = R = 1, so the harmonic mean is
    # 1 and the penalty 0.5 * (1/3)^3.
    found = text_metrics.meteor("the cats sat", ("the cat sat",))
    assert found == pytest.approx(1 - 0.5 / 27)
    assert text_metrics.meteor("yes", ("no", "yes")) == pytest.approx(0.5)


def test_meteor_has_no_synonyms():
    # WordNet would match these two.
    assert text_metrics.meteor("sofa", ("couch",)) == 0.0


def test_numbers_stay_whole_for_bleu_and_meteor():
    assert text_metrics.tokens("About 2.4 m.") == ["about", "2.4", "m", "."]
    assert text_metrics.meteor("2.4", ("2.5",)) == 0.0


def test_table_v_rows():
    # The figures the module docstring quotes for the paper's success case.
    (row,) = text_metrics.answer_rows([record(STUDENT, TEACHER)])
    assert row["rouge1"] == pytest.approx(2 * 9 / (27 + 19))
    assert row["bleu1"] == pytest.approx(12 / 30)
    assert row["meteor"] == pytest.approx(0.4756, abs=1e-4)
    assert (row["reference"], row["prediction"]) == (TEACHER, STUDENT)


def test_empty_prediction_scores_zero_without_an_exception():
    found = text_metrics.text_scores([record("")])
    assert found["rouge1"] == found["bleu1"] == found["meteor"] == found["answer_words"] == 0.0
    assert "rouge1_per_word" not in found


def test_lengths_and_length_normalised_rouge():
    found = text_metrics.text_scores([record("the cat"), record("the cat sat on")])
    assert found["answer_words"] == 3.0
    assert found["reference_words"] == 6.0
    assert found["length_ratio"] == pytest.approx(0.5)
    rouge1 = (2 * 2 / (2 + 6) + 2 * 4 / (4 + 6)) / 2
    assert found["rouge1"] == pytest.approx(rouge1)
    assert found["rouge1_per_word"] == pytest.approx(rouge1 / 3)


def test_the_teachers_0_016_is_reproduced():
    # Sec. IV-E: a teacher of ROUGE-1 1.0 and 63.5 words per answer has 0.016 per word.
    texts = ["word " * 63, "word " * 64]
    found = text_metrics.text_scores([record(text, text) for text in texts])
    assert found["rouge1_per_word"] == pytest.approx(0.016, abs=5e-4)


def test_references():
    both = record("x", "a", answers=["a", "b"], teacher_answer="c")
    assert text_metrics.references(both, "truth") == ["a", "b"]
    assert text_metrics.references(both, "teacher") == ["c"]
    assert text_metrics.references(record("x"), "teacher") == []
    with pytest.raises(ValueError, match="'oracle' is not one of truth, teacher"):
        text_metrics.references(both, "oracle")


def test_only_answers_of_the_teacher_are_scored():
    kept = record("a chair", "a table", teacher_answer="a chair")
    found = text_metrics.text_scores([kept, record("nothing of the sort")], "teacher")
    assert found["rouge1"] == 1.0


def test_nothing_to_score_is_said_in_one_line():
    with pytest.raises(ValueError, match="no predictions to score"):
        text_metrics.text_scores([])
    with pytest.raises(UserError, match="reference=teacher: no question carries"):
        text_metrics.text_scores([record("x")], "teacher")


ODD = [
    *("", " ", "\x00", "...", "-" * 3000, "a" * 50_000, "( ( (", "$^*(){}[]|\\", "<s></s>"),
    *("\ud800", "İstanbul ßß", "مرحبا ١٢٣", "。、！", "🙂🙂", "½ ²", "\u2028\u200b", "``'' 's"),
]


def test_odd_texts_neither_warn_nor_raise_and_score_within_bounds():
    for said, truth in itertools.product(ODD, ODD):
        found = text_metrics.text_scores([record(said, truth)])
        found |= coco_scores([said], [[truth]])
        for key, value in found.items():
            if not key.endswith(("words", "ratio", "per_word", "cider")):
                most = 100.001 if key.startswith(("coco", "em1", "meteor_")) else 1
                assert 0 <= value <= most, (key, said[:9], truth[:9])
