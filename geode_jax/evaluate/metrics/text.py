"""Text metrics of the Hidden-CoT paper (Sec. IV-A, Table V): BLEU, ROUGE, METEOR, answer lengths.

Scores are in [0, 1], except for word counts and ratios. Conventions, one library per metric:

| metric | library | convention |
|---|---|---|
| BLEU-n | sacrebleu | corpus level, orders 1..n, `13a` tokens, lower case, no smoothing |
| ROUGE-1/2/L | rouge-score | mean over answers of precision, recall, F1; no stemming |
| METEOR | nltk | mean over answers; exact + stem matching only, see `meteor` |

These are not the COCO-caption variants (`pycocoevalcap`: Stanford tokens, another ROUGE-L, Java
METEOR) in which ScanQA is reported; the two families must not be compared.

A prediction is a question record with the generated text under "prediction". `reference` names the
texts that it is compared with: "truth" for `answer` and all of `answers`, "teacher" for
`teacher_answer`, as in the paper, where the teacher scores 1 by definition and a score x 100 is "%
of teacher".

None of these conventions gives the metrics that Table V prints for its texts: its success case has
ROUGE-1 F 0.39 (0.43 stemmed), BLEU-1 0.40 and METEOR 0.48 here (printed 0.32, 0.32, 0.38), its
failure case 0.125, 0.032 and 0.051 (printed 0.08, 0.0002, 0.04).
"""

import functools
from collections.abc import Sequence
from typing import Any

from geode_jax.errors import UserError

REFERENCES = ("truth", "teacher")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
BLEU_ORDERS = (1, 2, 3, 4)


def references(record: dict, reference: str = "truth") -> list[str]:
    """Returns the texts that a prediction is compared with; empty if the record has none.

    Args:
      record: a question record.
      reference: "truth" (`answer`, then the other `answers`; repeated answers stay, since they
        matter for CIDEr) or "teacher".

    Raises:
      ValueError: `reference` is neither.
    """
    if reference == "truth":
        others = list(record.get("answers") or [])
        if record["answer"] in others:
            others.remove(record["answer"])
        return [record["answer"], *others]
    if reference == "teacher":
        answer = record.get("teacher_answer")
        return [] if answer is None else [answer]
    raise ValueError(f"reference: {reference!r} is not one of {', '.join(REFERENCES)}")


def with_reference(predictions: Sequence[dict], reference: str) -> list[dict]:
    """Returns the predictions that have a reference of this sort.

    Raises:
      ValueError: there are no predictions.
      UserError: none of them has a reference of this sort.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    kept = [record for record in predictions if references(record, reference)]
    if not kept:
        raise UserError(f"reference={reference}: no question carries a {reference} answer")
    return kept


@functools.cache
def _rouge_scorer():
    # Imported on first use: rouge-score and nltk take seconds, and training does not need them.
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(list(ROUGE_TYPES), use_stemmer=False)


@functools.cache
def _bleu():
    from sacrebleu.metrics.bleu import BLEU

    # force: no warning in the log about references that seem to be tokenised.
    return BLEU(lowercase=True, tokenize="13a", smooth_method="none", force=True)


class _NoSynonyms:
    """Replaces WordNet, so that METEOR's synonym stage finds no synonym."""

    def synsets(self, word: str) -> list:
        return []


def tokens(text: str) -> list[str]:
    """Returns lower-case `13a` tokens of sacrebleu, for BLEU and METEOR; "2.4" stays one token."""
    return _bleu().tokenizer(text.lower()).split()


@functools.lru_cache(maxsize=65536)
def rouge(prediction: str, targets: tuple[str, ...]) -> dict[str, tuple[float, float, float]]:
    """Returns ROUGE-1, ROUGE-2 and ROUGE-L of one answer, each (precision, recall, F1).

    For each type the reference with the best F1 counts (rouge-score's `score_multi`). The words of
    rouge-score are runs of [a-z0-9], so "2.4" is the two words "2" and "4".
    """
    found = _rouge_scorer().score_multi(targets, prediction)
    return {
        name: (float(score.precision), float(score.recall), float(score.fmeasure))
        for name, score in found.items()
    }


@functools.lru_cache(maxsize=65536)
def meteor(prediction: str, targets: tuple[str, ...]) -> float:
    """Returns METEOR of one answer with exact + stem matching, the best over the references.

    This is nltk's METEOR (alpha 0.9, beta 3, gamma 0.5, Porter stems) without its third stage,
    WordNet synonyms, which need a download. So it is a lower bound of nltk's full METEOR, and not
    the METEOR 1.5 of the COCO tools. Because of the fragmentation penalty a correct one-word answer
    scores 0.5, not 1.
    """
    from nltk.translate.meteor_score import meteor_score

    # Any: nltk declares its own corpus reader, of which it calls `synsets` alone.
    wordnet: Any = _NoSynonyms()
    split = [tokens(target) for target in targets]
    return float(meteor_score(split, tokens(prediction), wordnet=wordnet))


def corpus_bleu(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns BLEU-1..4 over all answers together, under the keys `bleu1` ... `bleu4`.

    BLEU-n is cumulative: the geometric mean of the precisions of orders 1..n, times the brevity
    penalty, without smoothing. Answers shorter than n words have no n-gram: a set of correct
    one-word answers has BLEU-2..4 of 0.

    Args:
      predictions: one text per answer.
      targets: the references of each answer, one or more.
    """
    width = max(len(texts) for texts in targets)
    # sacrebleu takes the i-th references of all answers together, None for a missing one (which its
    # annotations do not know).
    streams: list[list[Any]] = [
        [texts[i] if i < len(texts) else None for texts in targets] for i in range(width)
    ]
    bleu = _bleu()
    counts = bleu.corpus_score(list(predictions), streams)
    scores = {}
    for order in BLEU_ORDERS:
        found = bleu.compute_bleu(
            counts.counts[:order],
            counts.totals[:order],
            counts.sys_len,
            counts.ref_len,
            smooth_method="none",
            max_ngram_order=order,
        )
        # exp(log(100)) is a little above 100.
        scores[f"bleu{order}"] = min(found.score / 100.0, 1.0)
    return scores


@functools.lru_cache(maxsize=65536)
def sentence_bleu1(prediction: str, targets: tuple[str, ...]) -> float:
    """Returns BLEU-1 of one answer, by the conventions of `corpus_bleu`."""
    return corpus_bleu([prediction], [targets])["bleu1"]


def answer_rows(predictions: Sequence[dict], reference: str = "truth") -> list[dict]:
    """Returns the rows of Table V: ROUGE-1 F1, BLEU-1 and METEOR of every answer.

    Returns:
      One dict per prediction that has a reference, in order: id, kind, question, reference (the
      first), prediction, rouge1, bleu1, meteor.
    """
    rows = []
    for record in with_reference(predictions, reference):
        targets = tuple(references(record, reference))
        text = record["prediction"]
        rows.append(
            {
                "id": record.get("id"),
                "kind": record["kind"],
                "question": record["question"],
                "reference": targets[0],
                "prediction": text,
                "rouge1": rouge(text, targets)["rouge1"][2],
                "bleu1": sentence_bleu1(text, targets),
                "meteor": meteor(text, targets),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def text_scores(predictions: Sequence[dict], reference: str = "truth") -> dict[str, float]:
    """Returns all text metrics over the predictions that have a reference.

    Keys: `rouge1`, `rouge2`, `rougeL` (F1) with `_precision` and `_recall`; `bleu1` ... `bleu4`;
    `meteor` (exact + stem); `answer_words` and `reference_words` (mean number of words between
    white space; of the first reference), `length_ratio` (the former divided by the latter, the
    paper's 12.9 %); `rouge1_per_word`, the length-normalised ROUGE-1: mean F1 divided by the mean
    words of the answers.

    The paper prints 0.016 ROUGE-1 per word for its teacher, which follows this formula (1.0 / 63.5
    words), and 0.31 for its student, which does not: 0.119 / 8.2 words is 0.0145, and no other pair
    of numbers in the paper gives 0.31.

    Raises:
      ValueError: no predictions.
      UserError: no prediction has such a reference.
    """
    kept = with_reference(predictions, reference)
    texts = [record["prediction"] for record in kept]
    targets = [tuple(references(record, reference)) for record in kept]

    scores = {}
    found = [rouge(text, target) for text, target in zip(texts, targets, strict=True)]
    for name in ROUGE_TYPES:
        precision, recall, f1 = (_mean([row[name][i] for row in found]) for i in range(3))
        scores[name] = f1
        scores[f"{name}_precision"] = precision
        scores[f"{name}_recall"] = recall
    scores |= corpus_bleu(texts, targets)
    scores["meteor"] = _mean([meteor(*pair) for pair in zip(texts, targets, strict=True)])

    words = _mean([len(text.split()) for text in texts])
    reference_words = _mean([len(target[0].split()) for target in targets])
    scores["answer_words"] = words
    scores["reference_words"] = reference_words
    if reference_words:
        scores["length_ratio"] = words / reference_words
    if words:
        scores["rouge1_per_word"] = scores["rouge1"] / words
    return scores
