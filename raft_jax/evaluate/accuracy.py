"""Answers against what was expected: overlap with the gold answer, and answers that a program can check."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def token_f1(answer: str, gold: str) -> float:
    """Overlap of the words of two texts, articles, case and punctuation aside: 2PR / (P + R), as SQuAD counts it.

    Example:
      >>> round(token_f1("The vessel keeps clear.", "a vessel must keep clear"), 3)
      0.571
    """
    found, wanted = _words(answer), _words(gold)
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common:
        return float(found == wanted)
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in text.split() if word not in ("a", "an", "the")]


def is_correct(check: Mapping[str, Any] | None, answer: str) -> bool | None:
    """Whether an answer passes its check; None where there is none.

    Kinds: `contains_any` (one of the texts stands in the answer as whole words, case aside), `number` (a number of
    the answer has this value), `regex` (found anywhere, case aside), `exact` (the answer is this, case, spaces and a
    final full stop aside).

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
        return any(float(found.replace(",", "")) == float(value) for found in NUMBER.findall(answer))
    if kind == "regex":
        return re.search(value, answer, re.IGNORECASE) is not None
    if kind == "exact":
        return answer.strip().rstrip(".").casefold() == str(value).strip().rstrip(".").casefold()
    raise ValueError(f"check kind {kind!r} is not known; known: contains_any, number, regex, exact")
