"""Scores of answers: overlap with the gold answer, and checks that a program can do."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

# A minus sign directly after a digit is not part of the number: 10-5 is 10 and 5.
NUMBER = re.compile(r"(?:(?<!\d)[-−])?\d[\d,]*(?:\.\d+)?")


def token_f1(answer: str, gold: str) -> float:
    """F1 score of the words of two texts, 2PR / (P + R), ignoring articles, case and punctuation, as in SQuAD.

    Example:
      >>> round(token_f1("The vessel keeps clear.", "a vessel must keep clear"), 3)
      0.571
    """
    answer_words, gold_words = _words(answer), _words(gold)
    common = sum((Counter(answer_words) & Counter(gold_words)).values())
    if not common:
        return float(answer_words == gold_words)
    precision, recall = common / len(answer_words), common / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def distinct(text: str, n: int = 3) -> float | None:
    """Share of the runs of n words in a text that are different; 1 without repetition, None for fewer than n words.

    Example:
      >>> distinct("to be or not to be", 2)
      0.8
    """
    words = text.casefold().split()
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else None


def _words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in text.split() if word not in ("a", "an", "the")]


def is_correct(check: Mapping[str, Any] | None, answer: str) -> bool | None:
    """Whether an answer passes its check; None without a check.

    Kinds: `contains_any` (one of the texts is in the answer as whole words, ignoring case), `number` (a number in the
    answer has this value), `regex` (it matches anywhere, ignoring case), `exact` (the answer equals this, ignoring
    case, surrounding spaces and a final full stop).

    Example:
      >>> is_correct({"kind": "number", "value": 144}, "12 × 12 = 144.")
      True
    """
    if check is None:
        return None
    kind, value = check["kind"], check["value"]
    if kind == "contains_any":
        return any(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) for text in value)
    if kind == "number":
        numbers = (text.replace(",", "").replace("−", "-") for text in NUMBER.findall(answer))
        return any(float(text) == float(value) for text in numbers)
    if kind == "regex":
        return re.search(value, answer, re.IGNORECASE) is not None
    if kind == "exact":
        return answer.strip().rstrip(".").casefold() == str(value).strip().rstrip(".").casefold()
    raise ValueError(f"check kind {kind!r} is not known; known: contains_any, number, regex, exact")


def require_check(check: Mapping[str, Any]) -> None:
    """Raises ValueError if `is_correct` cannot use a check, so that the error comes before any model is run."""
    if not isinstance(check, Mapping) or check.keys() != {"kind", "value"}:
        raise ValueError("a check is null or has a kind and a value")
    kind, value = check["kind"], check["value"]
    if kind == "contains_any" and (not isinstance(value, list) or not value or {*map(type, value)} != {str}):
        raise ValueError("the value of contains_any is a list of texts")
    if kind == "number" and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError("the value of number is a number")
    if kind == "regex" and not isinstance(value, str):
        raise ValueError("the value of regex is text")
    try:
        is_correct(check, "")
    except re.error as error:
        raise ValueError(f"the regex {value!r} is not one: {error}") from error
