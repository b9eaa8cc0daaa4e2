"""How close an answer is to the known one: scores of established libraries, and which of these are missing."""

import importlib.util
from collections.abc import Sequence

LIBRARIES = {"sacrebleu": "chrF", "rapidfuzz": "ROUGE-L"}


def missing() -> list[str]:
    """The libraries that are not installed; their scores are then None."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def scores(said: Sequence[str], known: Sequence[str]) -> dict[str, float | None]:
    """`exact`, `chrf` and `rouge_l` of answers, each from 0 to 1, or None if its library is missing.

    `exact` is the share of answers that equal the known ones, ignoring case, punctuation and spaces. chrF is
    sacrebleu's, over all answers together (Popovic 2015). ROUGE-L is the mean F measure of the longest common
    subsequence of words (Lin 2004), computed by rapidfuzz: rouge-score only recognises ASCII words and has more
    dependencies.
    """
    from specjax.generation.answers import words

    pairs = [(words(a), words(b)) for a, b in zip(said, known, strict=True)]
    found: dict[str, float | None] = {"exact": sum(a == b for a, b in pairs) / len(pairs), "chrf": None}
    found["rouge_l"] = None
    absent = missing()
    if "sacrebleu" not in absent:
        import sacrebleu

        found["chrf"] = sacrebleu.corpus_chrf(list(said), [list(known)]).score / 100
    if "rapidfuzz" not in absent:
        from rapidfuzz.distance import LCSseq

        each = [2 * LCSseq.similarity(a, b) / max(1, len(a) + len(b)) for a, b in pairs]
        found["rouge_l"] = sum(each) / len(each)
    return found
