"""Text metrics as ScanQA and its successors report them, in the COCO-caption convention.

Scores are in [0, 100]; CIDEr can be larger.

| key | metric |
|---|---|
| `em1` | answer equal to a reference up to case (EM@1 of ScanQA and SQA3D) |
| `em1_refined` | after `clean`, one contains the other (LEO's refined EM, LLaVA-3D's) |
| `coco_bleu1` ... `4` | corpus level, closest reference length, see `bleu` |
| `coco_rouge_l` | F with beta 1.2 of the best precision and the best recall, mean over answers |
| `coco_cider` | CIDEr-D: n = 1..4, sigma 6, document frequencies of the references scored |
| `meteor_exact_stem` | `metrics.text.meteor`, which is not the METEOR 1.5 of the COCO tools |

BLEU, ROUGE-L and CIDEr are those of `pycocoevalcap`, except for the tokenizer: pycocoevalcap runs
Stanford's, which needs Java; this module uses nltk's Penn Treebank rules. The two differ on 4 of
the 13,362 questions, answers and situations of ScanQA's val and SQA3D's test files. METEOR 1.5
needs Java and paraphrase tables; `meteor_exact_stem` has exact and stem matches alone, and its
values are far from those of METEOR 1.5. All metrics but `em1_refined` take the texts unchanged, as
ScanQA's own code does; LEO and LLaVA-3D `clean` both sides before every metric. None of these
metrics is comparable with those of `metrics.text`, which follow the Hidden-CoT paper.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence

from geode_jax.evaluate.metrics import text as text_metrics

ORDERS, CIDER_SIGMA, ROUGE_BETA = 4, 6.0, 1.2
_PUNCTUATION = frozenset(["''", "'", "``", "`", *".?!,:;-", "--", "..."])
_BRACKETS = dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"), strict=True))
"""The COCO tools drop "-LRB-" after lower-casing, so they keep these lower-case names."""
_BREAKS = re.compile(r"([.?!])(?=[\s.?!])")


@functools.cache
def _treebank():
    from nltk.tokenize import TreebankWordTokenizer

    return TreebankWordTokenizer()


@functools.lru_cache(maxsize=65536)
def tokens(text: str) -> tuple[str, ...]:
    """Returns lower-case Penn Treebank tokens without punctuation; brackets stay, as words.

    "It's 2.4 m." becomes it, 's, 2.4, m.
    """
    text = " ".join(text.lower().replace("’", "'").split())
    split = _treebank().tokenize(_BREAKS.sub(r" \1 ", text))
    return tuple(_BRACKETS.get(token, token) for token in split if token not in _PUNCTUATION)


# --- Exact match ----------------------------------------------------------------------------------

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_WORDS = {
    # Misspellings that occur in the answers.
    **{"letf": "left", "let": "left", "tehre": "there", "rigth": "right", "rght": "right"},
    **{"behine": "behind", "chai": "chair", "wasing": "washing", "waslked": "walked"},
    **{"tv": "TV", "oclock": "o'clock"},
    **{str(i): word for i, word in enumerate(_NUMBERS)},
    **{"23": "twenty-three", "none": "zero"},
}
_WORD = re.compile(r"\b(?:" + "|".join(_WORDS) + r")\b")


def clean(text: str) -> str:
    """Returns an answer as LEO compares it: lower case, numbers in words, no articles or typos.

    LEO's oddities are kept: "tv" becomes "TV", which does not occur in "tvs"; of two articles in a
    row one stays; an article before a removed sign stays ("a ! chair").
    """
    text = re.sub(r"[^a-z0-9,'\s:-]+", "", re.sub(" {2,}", " ", text.lower().strip(" ")))
    text = _WORD.sub(lambda found: _WORDS[found[0]], re.sub(r"\bo' +clock\b", "o'clock", text))
    text = re.sub(r"\b([a-zA-Z]+)[0-9]\b", r"\1", text)
    for article in ("a", "an", "the"):
        text = re.sub(rf"\b{article} ([a-zA-Z]+)", r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def exact_match(prediction: str, targets: Sequence[str]) -> float:
    """Returns 1.0 if the answer equals a reference up to case and surrounding spaces.

    ScanQA's own `score.py` compares the unchanged texts; every answer that it accepts is accepted
    here too, except an empty one, which is wrong even if a reference is empty.
    """
    answer = prediction.strip().lower()
    return float(bool(answer) and answer in {target.strip().lower() for target in targets})


def refined_match(prediction: str, targets: Sequence[str]) -> float:
    """Returns 1.0 if the cleaned answer contains a cleaned reference or is contained in one.

    Spaces are ignored. An answer or a reference that is empty after cleaning matches nothing; in
    the upstream code an empty text matches everything.
    """
    answer = "".join(clean(prediction).split())
    truths = ["".join(clean(target).split()) for target in targets]
    found = any(truth and (answer in truth or truth in answer) for truth in truths)
    return float(bool(answer) and found)


# --- BLEU, ROUGE-L and CIDEr ----------------------------------------------------------------------


def bleu(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> list[float]:
    """Returns COCO's BLEU-1 to BLEU-4 of all answers together, in [0, 1].

    The reference length is the closest one, the shorter of two equally close. There is no smoothing
    except for the COCO tools' guard against a division by 0, which matters where an order has no
    n-gram at all: correct answers of one word each have a BLEU-2 of 0.001.
    """
    matches, totals = [0] * ORDERS, [0] * ORDERS
    answer_words = truth_words = 0
    for prediction, texts in zip(predictions, targets, strict=True):
        answer, truths = tokens(prediction), [tokens(text) for text in texts]
        answer_words += len(answer)
        truth_words += min((abs(len(truth) - len(answer)), len(truth)) for truth in truths)[1]
        references = [_ngrams(truth) for truth in truths]
        for n, counts in enumerate(_ngrams(answer)):
            most: Counter = Counter()
            for reference in references:
                most |= reference[n]
            matches[n] += (counts & most).total()
            totals[n] += counts.total()
    least, tiny = 1e-9, 1e-15
    share = (answer_words + tiny) / (truth_words + least)
    brevity = math.exp(1 - 1 / share) if share < 1 else 1.0
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= (matches[n] + tiny) / (totals[n] + least)
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(prediction: str, targets: Sequence[str]) -> float:
    """Returns COCO's ROUGE-L of one answer in [0, 1].

    Precision and recall are each the best over the references, not always of the same reference.
    """
    # Upstream a text without tokens is one empty word.
    answer = tokens(prediction) or ("",)
    truths = [tokens(target) or ("",) for target in targets]
    common = [_common(answer, truth) for truth in truths]
    precision = max(c / len(answer) for c in common)
    recall = max(c / len(truth) for c, truth in zip(common, truths, strict=True))
    if not precision or not recall:
        return 0.0
    beta = ROUGE_BETA**2
    return (1 + beta) * precision * recall / (recall + beta * precision)


def _ngrams(words: Sequence[str]) -> list[Counter]:
    """Returns the counts of the n-grams of each order."""
    return [
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for n in range(1, ORDERS + 1)
    ]


def cider(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> list[float]:
    """Returns CIDEr-D of every answer; COCO's score is the mean.

    The weight of an n-gram is log(N / number of questions with the n-gram in a reference), with N
    questions in all. With one question all weights are 0; with few the scores are not meaningful.

    Args:
      predictions: one text per question.
      targets: the references of each question, one or more; a repeated one counts repeatedly.
    """
    references = [[_ngrams(tokens(text)) for text in texts] for texts in targets]
    seen: Counter = Counter()
    for texts in references:
        seen.update({gram for text in texts for order in text for gram in order})

    def vector(counts: Counter) -> dict[tuple, float]:
        total = len(references)
        return {gram: n * math.log(total / max(1, seen[gram])) for gram, n in counts.items()}

    scores = []
    for prediction, texts in zip(predictions, references, strict=True):
        answer = _ngrams(tokens(prediction))
        total = sum(_similarity(answer, text, vector) for text in texts)
        scores.append(10.0 * total / len(texts))
    return scores


def _similarity(answer: list[Counter], truth: list[Counter], vector) -> float:
    """Returns the mean clipped cosine over the orders, times the penalty for the length."""
    # The reference code measures length in bigrams.
    gap = answer[1].total() - truth[1].total()
    penalty = math.exp(-(gap**2) / (2 * CIDER_SIGMA**2))
    total = 0.0
    for a, b in zip(map(vector, answer), map(vector, truth), strict=True):
        norm = math.hypot(*a.values()) * math.hypot(*b.values())
        if norm:
            total += sum(min(x, b[gram]) * b[gram] for gram, x in a.items() if gram in b) / norm
    return penalty * total / ORDERS


# --- All ------------------------------------------------------------------------------------------


def coco_scores(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns all metrics of the module docstring, in percent.

    Args:
      predictions: one text per question, "" for a missing answer.
      targets: the references of each question, one or more.

    Raises:
      ValueError: there are no questions.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    pairs = list(zip(predictions, targets, strict=True))

    def mean(values) -> float:
        return 100.0 * sum(values) / len(pairs)

    return {
        "em1": mean(exact_match(*pair) for pair in pairs),
        "em1_refined": mean(refined_match(*pair) for pair in pairs),
        **{f"coco_bleu{n}": 100.0 * x for n, x in enumerate(bleu(predictions, targets), 1)},
        "coco_rouge_l": mean(rouge_l(*pair) for pair in pairs),
        "coco_cider": mean(cider(predictions, targets)),
        "meteor_exact_stem": mean(text_metrics.meteor(text, tuple(texts)) for text, texts in pairs),
    }
