"""Text metrics as ScanQA and its successors report them, in the COCO-caption convention.

Every number is in [0, 100]; CIDEr may be larger.

| key | what it is |
|---|---|
| `em1` | answer equal to a reference (EM@1 of ScanQA and SQA3D), whatever the case |
| `em1_refined` | after `clean`, one contains the other (LEO's refined EM, LLaVA-3D's) |
| `coco_bleu1` ... `4` | corpus level, closest reference length, see `bleu` |
| `coco_rouge_l` | F with beta 1.2 of the best precision and the best recall, mean over answers |
| `coco_cider` | CIDEr-D: n = 1..4, sigma 6, document frequencies of the references scored |
| `meteor_exact_stem` | `text_metrics.meteor`, which is not the METEOR 1.5 of the COCO tools |

BLEU, ROUGE-L and CIDEr are those of `pycocoevalcap` on tokens like its own: it runs Stanford's
tokenizer, which needs Java; here nltk's Penn Treebank rules split. Of 13,362 questions, answers and
situations of ScanQA's val and SQA3D's test files 4 are split differently. METEOR 1.5 needs Java and
its paraphrase tables, so what stands here is another metric under another name: exact and stem
matches alone, far from METEOR 1.5 in its values. All but `em1_refined` are of the texts as they
are, as ScanQA's own; LEO and LLaVA-3D `clean` both sides before every metric. None of these is
comparable with the metrics of `text_metrics`, which follow the Hidden-CoT paper.
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
"""As the COCO tools leave them: they drop "-LRB-", after everything became lower case."""
_BREAKS = re.compile(r"([.?!])(?=[\s.?!])")


@functools.cache
def _treebank():
    from nltk.tokenize import TreebankWordTokenizer

    return TreebankWordTokenizer()


@functools.lru_cache(maxsize=65536)
def tokens(text: str) -> tuple[str, ...]:
    """Lower-case Penn Treebank tokens; of punctuation brackets alone stay, as words.

    "It's 2.4 m." is it, 's, 2.4, m.
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
    # Misspellings that the answers have.
    **{"letf": "left", "let": "left", "tehre": "there", "rigth": "right", "rght": "right"},
    **{"behine": "behind", "chai": "chair", "wasing": "washing", "waslked": "walked"},
    **{"tv": "TV", "oclock": "o'clock"},
    **{str(i): word for i, word in enumerate(_NUMBERS)},
    **{"23": "twenty-three", "none": "zero"},
}
_WORD = re.compile(r"\b(?:" + "|".join(_WORDS) + r")\b")


def clean(text: str) -> str:
    """An answer as LEO compares it: lower case, small numbers in words, no articles, no typos.

    As there, "tv" becomes "TV", which is in no "tvs", of two articles in a row one stays, and so
    does one before a sign that is taken out ("a ! chair").
    """
    text = re.sub(r"[^a-z0-9,'\s:-]+", "", re.sub(" {2,}", " ", text.lower().strip(" ")))
    text = _WORD.sub(lambda found: _WORDS[found[0]], re.sub(r"\bo' +clock\b", "o'clock", text))
    text = re.sub(r"\b([a-zA-Z]+)[0-9]\b", r"\1", text)
    for article in ("a", "an", "the"):
        text = re.sub(rf"\b{article} ([a-zA-Z]+)", r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def exact_match(prediction: str, targets: Sequence[str]) -> float:
    """1.0 if the answer is one of the references, whatever its case and the spaces around it.

    ScanQA's own `score.py` compares the texts as they stand; its answers, and the classes of
    SQA3D's models, are such references already, so nothing that is right there is wrong here. No
    answer counts as wrong, even where a reference is empty.
    """
    said = prediction.strip().lower()
    return float(bool(said) and said in {target.strip().lower() for target in targets})


def refined_match(prediction: str, targets: Sequence[str]) -> float:
    """1.0 if the cleaned answer is in a cleaned reference or the other way round, spaces apart.

    An answer of which nothing is left counts as wrong, and a reference of which nothing is left
    makes none right; the upstream code finds the one and the other everywhere.
    """
    said = "".join(clean(prediction).split())
    truths = ["".join(clean(target).split()) for target in targets]
    return float(bool(said) and any(truth and (said in truth or truth in said) for truth in truths))


# --- BLEU, ROUGE-L and CIDEr ----------------------------------------------------------------------


def bleu(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> list[float]:
    """COCO's BLEU-1 to BLEU-4 of all answers together, in [0, 1].

    Of references of equally close length the shorter counts. There is no smoothing but the COCO
    tools' own guard against a division by 0, which is seen where an order has no n-gram at all:
    right answers of one word each have a BLEU-2 of 0.001.
    """
    right, said_grams = [0] * ORDERS, [0] * ORDERS
    said_words = truth_words = 0
    for prediction, texts in zip(predictions, targets, strict=True):
        said, truths = tokens(prediction), [tokens(text) for text in texts]
        said_words += len(said)
        truth_words += min((abs(len(truth) - len(said)), len(truth)) for truth in truths)[1]
        references = [_ngrams(truth) for truth in truths]
        for n, counts in enumerate(_ngrams(said)):
            most: Counter = Counter()
            for reference in references:
                most |= reference[n]
            right[n] += (counts & most).total()
            said_grams[n] += counts.total()
    least, tiny = 1e-9, 1e-15
    share = (said_words + tiny) / (truth_words + least)
    brevity = math.exp(1 - 1 / share) if share < 1 else 1.0
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= (right[n] + tiny) / (said_grams[n] + least)
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(prediction: str, targets: Sequence[str]) -> float:
    """COCO's ROUGE-L of one answer in [0, 1].

    Precision and recall are each the best over the references, so not always of the same one.
    """
    # Upstream a text without a token is one empty word.
    said = tokens(prediction) or ("",)
    truths = [tokens(target) or ("",) for target in targets]
    common = [_common(said, truth) for truth in truths]
    precision = max(c / len(said) for c in common)
    recall = max(c / len(truth) for c, truth in zip(common, truths, strict=True))
    if not precision or not recall:
        return 0.0
    beta = ROUGE_BETA**2
    return (1 + beta) * precision * recall / (recall + beta * precision)


def _ngrams(words: Sequence[str]) -> list[Counter]:
    """Counts of the n-grams of each order."""
    return [
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for n in range(1, ORDERS + 1)
    ]


def cider(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of every answer; COCO's score is the mean.

    Rare n-grams count more: an n-gram weighs log(N / questions whose references have it), of the N
    questions given. With one question everything weighs 0, and few questions give odd values.

    Args:
      predictions: one text per question.
      targets: its references, one or more; one that is there twice counts twice.
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
        said = _ngrams(tokens(prediction))
        total = sum(_similarity(said, text, vector) for text in texts)
        scores.append(10.0 * total / len(texts))
    return scores


def _similarity(said: list[Counter], truth: list[Counter], vector) -> float:
    """Mean over the orders of the clipped cosine, times the penalty for another length."""
    # The reference code measures length in bigrams.
    gap = said[1].total() - truth[1].total()
    penalty = math.exp(-(gap**2) / (2 * CIDER_SIGMA**2))
    total = 0.0
    for a, b in zip(map(vector, said), map(vector, truth), strict=True):
        norm = math.hypot(*a.values()) * math.hypot(*b.values())
        if norm:
            total += sum(min(x, b[gram]) * b[gram] for gram, x in a.items() if gram in b) / norm
    return penalty * total / ORDERS


# --- All ------------------------------------------------------------------------------------------


def coco_scores(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> dict[str, float]:
    """All metrics of the module docstring, in percent.

    Args:
      predictions: one text per question, "" where there is no answer.
      targets: its references, one or more.

    Raises:
      ValueError: there is no question.
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
