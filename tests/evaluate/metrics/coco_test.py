"""The COCO metrics against hand-computed values and independent implementations."""

import math

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu as nltk_bleu
from rouge_score.rouge_scorer import RougeScorer

from geode_jax.evaluate.metrics.coco import (
    cider,
    clean,
    coco_scores,
    exact_match,
    refined_match,
    rouge_l,
    tokens,
)

PREDICTIONS = [
    "the brown wooden table near the window",
    "two chairs",
    "on the left side of the black tv stand",
    "a lamp",
]
TARGETS = [
    ["brown table near the big window", "the wooden table by the window"],
    ["2 chairs", "two chairs", "there are two chairs"],
    ["to the left of the tv stand", "left side of tv"],
    ["a red couch"],
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Brown, wooden table.", "brown wooden table"),
        ("It's 2.4 m wide", "it 's 2.4 m wide"),
        ("on the left-hand side!", "on the left-hand side"),
        ("It is red. It is (very) big.?", "it is red it is -lrb- very -rrb- big"),
        ("What’s this?", "what 's this"),
        ('the "big" one; yes: that', "the big one yes that"),
        ("I don't know...", "i do n't know"),
        ("  ", ""),
    ],
)
def test_tokens_are_those_of_the_penn_treebank(text, expected):
    assert list(tokens(text)) == expected.split()


def test_scores_are_those_of_the_coco_tools():
    # Of pycocoevalcap 1.2 with its PTBTokenizer, Bleu(4), Rouge and Cider, on Java 17.
    predictions = [
        "The brown, wooden table near the window.",
        "two chairs",
        "It's on the left side of the black TV stand; behind it.",
        "a lamp",
        "I don't know!",
    ]
    targets = [
        ["brown table near the big window", "the wooden table by the window"],
        ["2 chairs", "Two chairs.", "there are two chairs"],
        ["to the left of the TV stand", "It's on the left side of the stand"],
        ["a red couch"],
        ["the left-hand one (near the window)"],
    ]
    expected = {
        "coco_bleu1": 71.42857142346938,
        "coco_bleu2": 63.53949228737387,
        "coco_bleu3": 53.94746042970766,
        "coco_bleu4": 47.829731199042875,
        "coco_rouge_l": 60.240877906631326,
        "coco_cider": 205.81544636100065,
    }
    scores = coco_scores(predictions, targets)
    assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=1e-9)


# What answers may be: duplicates, empty, white space, punctuation alone, unicode, one word, long.
ODD_PREDICTIONS = [
    *("table", "table", "", "   ", "?!", "Größe 2,5 m²", "桌子 table", "It’s…", "a " * 60),
    *("the brown table", "the the the the the", "yes.", "two chairs\nand a lamp", "--"),
]
ODD_TARGETS = [
    *(["table", "table"], ["table", "desk", "desk", "desk"], ["nothing"], [" "], [".", "!"]),
    *(["größe 2,5 m²", "Größe"], ["桌子", "桌子"], ["it's..."], ["a a a", "b"]),
    *(["brown table"] * 3, ["the"], ["yes", "Yes!"], ["two chairs and a lamp"], ["-"]),
]


def _odd_corpus() -> tuple[list[str], list[list[str]]]:
    random = np.random.default_rng(0)
    words = [*["a", "b", "c", "the", "table", "chair", "2", "?", ".", ",", "’", "ß"], ""]
    predictions, targets = list(ODD_PREDICTIONS), list(ODD_TARGETS)
    for _ in range(60):
        texts = [" ".join(random.choice(words, random.integers(0, 8))) for _ in range(4)]
        predictions.append(texts[0])
        targets.append([texts[i] for i in random.integers(1, 4, random.integers(1, 5))])
    return predictions, targets


def test_scores_of_odd_texts_are_those_of_the_coco_tools():
    where = "pycocoevalcap has 100 MB of Java beside its Python; install it to compare with it"
    scorers = {
        name: pytest.importorskip(f"pycocoevalcap.{name.lower()}.{name.lower()}", reason=where)
        for name in ("Bleu", "Rouge", "Cider")
    }
    predictions, targets = _odd_corpus()
    said = {i: [" ".join(tokens(text))] for i, text in enumerate(predictions)}
    truths = {i: [" ".join(tokens(t)) for t in texts] for i, texts in enumerate(targets)}
    for some in (range(len(predictions)), range(14), range(1)):
        scores = coco_scores(*([texts[i] for i in some] for texts in (predictions, targets)))
        split = [{i: texts[i] for i in some} for texts in (truths, said)]
        expected, _ = scorers["Bleu"].Bleu(4).compute_score(*split, verbose=0)
        expected += [scorers[x].__dict__[x]().compute_score(*split)[0] for x in ("Rouge", "Cider")]
        keys = [*(f"coco_bleu{n}" for n in (1, 2, 3, 4)), "coco_rouge_l", "coco_cider"]
        assert [scores[key] for key in keys] == pytest.approx(
            [100 * value for value in expected], rel=1e-9, abs=1e-9
        )


def test_a_reference_that_is_there_twice_counts_twice():
    scores = coco_scores(ODD_PREDICTIONS, ODD_TARGETS)
    # Of pycocoevalcap 1.2, on these tokens.
    assert scores["coco_cider"] == pytest.approx(187.11937949702929)
    assert scores["coco_bleu2"] == pytest.approx(16.564728911010945)
    once = [list(dict.fromkeys(texts)) for texts in ODD_TARGETS]
    assert coco_scores(ODD_PREDICTIONS, once)["coco_cider"] != pytest.approx(scores["coco_cider"])


def test_bleu_is_nltks():
    # nltk counts one n-gram too many in answers that have none, so these have four words and more.
    predictions = ["a brown wooden table near the window", "there are two chairs", PREDICTIONS[2]]
    targets = [["a brown wooden table by it"], ["there are two chairs in it"], TARGETS[2]]
    scores = coco_scores(predictions, targets)
    assert scores["coco_bleu4"] > 30
    references = [[text.split() for text in texts] for texts in targets]
    said = [text.split() for text in predictions]
    for n in (1, 2, 3, 4):
        expected = nltk_bleu(references, said, weights=[1 / n] * n)
        assert scores[f"coco_bleu{n}"] == pytest.approx(100 * expected, abs=1e-6)


def test_bleu_by_hand():
    # "two big chairs" of "two chairs": 2 of 3 words; no pair; nothing to be brief about.
    scores = coco_scores(["two big chairs"], [["two chairs"]])
    assert scores["coco_bleu1"] == pytest.approx(200 / 3)
    assert scores["coco_bleu2"] == pytest.approx(0, abs=1e-4)
    # One word of two, all right: brevity exp(1 - 2 / 1).
    scores = coco_scores(["chairs"], [["two chairs"]])
    assert scores["coco_bleu1"] == pytest.approx(100 * math.exp(-1))


def test_rouge_l_by_hand():
    # Nine words. "the left of the tv stand" is in common with the first reference of 7 words,
    # "left side of tv" with the second of 4: precision 6 / 9 and 4 / 9, recall 6 / 7 and 4 / 4.
    precision, recall = 6 / 9, 4 / 4
    beta = 1.2**2
    expected = (1 + beta) * precision * recall / (recall + beta * precision)
    assert rouge_l(PREDICTIONS[2], TARGETS[2]) == pytest.approx(expected)
    assert rouge_l("a lamp", ["red couch"]) == rouge_l("", ["a"]) == rouge_l("a", ["."]) == 0
    assert rouge_l("!", ["."]) == 1  # as the COCO tools, for which both are the empty word
    assert rouge_l("Two chairs.", ["two chairs"]) == 1


def test_precision_and_recall_of_rouge_l_are_rouge_scores():
    random, scorer, beta = np.random.default_rng(0), RougeScorer(["rougeL"]), 1.2**2
    words = ["red", "couch", "lamp", "table"]
    for _ in range(200):
        a, b = (" ".join(random.choice(words, random.integers(1, 9))) for _ in range(2))
        precision, recall, _ = scorer.score(b, a)["rougeL"]
        both = recall + beta * precision
        expected = (1 + beta) * precision * recall / both if both else 0
        assert rouge_l(a, [b]) == pytest.approx(expected)


def test_cider_by_hand():
    # Two questions; every n-gram of one is new to the other, so each weighs log 2, and cosines
    # are those of counts. "red big couch" and "red couch": n = 1: 2 / sqrt(3 * 2); n = 2: none
    # in common. The penalty is of one bigram.
    found = cider(["red big couch", "lamp"], [["red couch"], ["green table"]])
    penalty = math.exp(-1 / (2 * 36))
    assert found == pytest.approx([10 * penalty * (2 / math.sqrt(6)) / 4, 0.0])
    # A perfect answer of two words has two of the four orders.
    assert cider(["red couch", "x"], [["red couch"], ["lamp"]])[0] == pytest.approx(5.0)
    # Of what both questions have, nothing counts.
    assert cider(["the", "the"], [["the"], ["the"]]) == [0.0, 0.0]


def _dense_cider(predictions: list[str], targets: list[list[str]]) -> list[float]:
    """CIDEr-D as the paper has it, on dense vectors."""

    def grams(text: str, n: int) -> list[str]:
        words = text.split()
        return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    scores = np.zeros(len(predictions))
    for n in (1, 2, 3, 4):
        texts = [*predictions, *(text for own in targets for text in own)]
        vocabulary = sorted({gram for text in texts for gram in grams(text, n)})
        if not vocabulary:
            continue

        def counts(text: str, n=n, vocabulary=vocabulary) -> np.ndarray:
            return np.array([grams(text, n).count(gram) for gram in vocabulary], float)

        df = sum(np.max([counts(text) for text in own], axis=0) > 0 for own in targets)
        idf = np.log(len(targets)) - np.log(np.maximum(df, 1))
        for i, (text, own) in enumerate(zip(predictions, targets, strict=True)):
            for reference in own:
                a, b = counts(text) * idf, counts(reference) * idf
                norm = np.linalg.norm(a) * np.linalg.norm(b)
                gap = len(grams(text, 2)) - len(grams(reference, 2))
                cosine = np.minimum(a, b) @ b / norm if norm else 0.0
                scores[i] += cosine * np.exp(-(gap**2) / 72) / len(own) / 4 * 10
    return scores.tolist()


def test_cider_is_that_of_dense_vectors():
    assert cider(PREDICTIONS, TARGETS) == pytest.approx(_dense_cider(PREDICTIONS, TARGETS))
    random, words = np.random.default_rng(1), ["red", "chair", "on", "left"]
    for _ in range(10):

        def text(random=random) -> str:
            return " ".join(random.choice(words, random.integers(1, 9)))

        predictions = [text() for _ in range(5)]
        targets = [[text() for _ in range(1 + i % 3)] for i in range(5)]
        expected = _dense_cider(predictions, targets)
        assert cider(predictions, targets) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "target", "exact", "refined"),
    [
        ("Brown", "brown", 1, 1),
        (" brown ", "brown", 1, 1),
        ("brown.", "brown", 0, 1),
        ("2", "two", 0, 1),
        ("There are 2 chairs", "two", 0, 1),
        ("a chair", "the chair", 0, 1),
        ("book shelf", "bookshelf", 0, 1),
        ("none", "zero", 0, 1),
        ("left", "right", 0, 0),
        ("", "brown", 0, 0),
        ("!", "brown", 0, 0),
    ],
)
def test_exact_match(prediction, target, exact, refined):
    assert exact_match(prediction, ["other", target]) == exact
    assert refined_match(prediction, ["other", target]) == refined


def test_exact_match_is_scanqas_but_for_case_and_spaces():
    """ScanQA's rule: the answer is in the list of references. SQA3D: it is the one reference."""
    texts = ["a chair", "chair", "chairs", "2", "two", "2.0", "tv.", "tv", "on the  left", "no"]
    for said in texts:
        for truths in ([text] for text in texts):
            assert exact_match(said, truths) == (said in truths)
        assert exact_match(said, texts) == 1 and exact_match(said, ["x", said]) == 1
        assert exact_match(f" {said.upper()}\n", texts) == 1
        assert exact_match(said, []) == 0
    for nothing in ("", " ", "\n"):
        assert exact_match(nothing, ["", " ", "x"]) == 0


def test_clean_answers():
    # As LEO's own function, run on these.
    for text, cleaned in (
        ("TV", "TV"),
        ("two TVs", "two tvs"),
        ("the a the chair", "the chair"),
        ("a ! chair", "a  chair"),
        ("backwards1 Größe", "backward gre"),
    ):
        assert clean(text) == cleaned
    assert clean("  The  Chair is to the RIGTH of mat2, at 3 oclock. ") == (
        "chair is to right of mat, at three o'clock"
    )


def test_scores_of_perfect_and_of_no_answers():
    perfect = coco_scores([texts[0] for texts in TARGETS], TARGETS)
    assert perfect["em1"] == perfect["coco_rouge_l"] == 100
    assert perfect["coco_bleu1"] == pytest.approx(100)
    nothing = coco_scores([""] * 4, TARGETS)
    assert set(nothing.values()) == {0.0}
    with pytest.raises(ValueError):
        coco_scores([], [])
