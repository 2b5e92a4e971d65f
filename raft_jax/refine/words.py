"""Words, stems and numbers of a text, in the form that the checks compare."""

from __future__ import annotations

import re
from collections.abc import Iterator

from raft_jax.refine.english import NUMBERS, ORDINALS, SCALES, STOP_WORDS, UNITS

STEM = 5  # number of letters of a word that are compared: "applying" and "application" have one stem

_WORD = re.compile(r"[^\W_]+(?:['’][^\W\d_]+)*")
_CONTRACTION = re.compile(r"\w*n't$|'(?:ll|re|ve|d|m|s)$")


def words_of(text: str) -> list[str]:
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def stem_of(word: str) -> str:
    """The compared form of a word: its first `STEM` letters, after removing possessive and plural endings."""
    word = re.sub(r"'s?$", "", word.lower().replace("’", "'"))
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    return word[:STEM]


def content_stems(text: str) -> list[str]:
    """Stems of the words that carry meaning, in order; numbers and their units are compared separately."""
    words = (_CONTRACTION.sub("", word) for word in words_of(text))
    return [stem_of(word) for word in words if word and not (word in STOP_WORDS or word in UNITS or is_number(word))]


def is_number(word: str) -> bool:
    return word[0].isdigit() or any(word in table for table in (NUMBERS, SCALES, ORDINALS))


def numbers(text: str) -> set[str]:
    """The numbers of a text as digits, including number words except "one" and "second", which have other meanings.

    Example:
      >>> sorted(numbers("twenty-five of 1,000 at 10:30, or two hundred and ten"))
      ['1000', '10:30', '210', '25']
    """
    return {value for value, _ in numbers_with_units(text)}


def numbers_with_units(text: str) -> Iterator[tuple[str, str | None]]:
    """Each number, and the unit after it or the currency before it; None without a unit."""
    tokens = re.findall(r"\d+(?:[.,:]\d+)*|[^\W\d_]+|[$€£%]", text.lower())
    index = 0
    while index < len(tokens):
        number, after = _number_at(tokens, index)
        if number is None:
            index += 1
            continue
        before = tokens[index - 1] if index and tokens[index - 1] in "$€£" else ""
        unit = UNITS.get(before or (tokens[after] if after < len(tokens) else ""))
        yield number, unit
        index = after


def _number_at(tokens: list[str], index: int) -> tuple[str | None, int]:
    """The number that begins at a token, and the index of the token after it; None if no number begins there."""
    token = tokens[index]
    if token[0].isdigit():
        return digits(token), index + 1
    if token in ORDINALS:
        return str(ORDINALS[token]), index + 1
    if token not in NUMBERS or token == "one":
        return None, index
    total, part = 0, 0
    while index < len(tokens):
        token = tokens[index]
        if token in NUMBERS:
            part += NUMBERS[token]
        elif token == "hundred":
            part *= 100
        elif token in SCALES:
            total, part = total + part * SCALES[token], 0
        elif token != "and" or tokens[index - 1] not in SCALES or not {*tokens[index + 1 : index + 2]} & NUMBERS.keys():
            break
        index += 1
    return str(total + part), index


def digits(token: str) -> str:
    """The canonical form of a number: no thousands separators, leading zeros or trailing decimal zeros."""
    token = re.sub(r",(?=\d{3}(?:\D|$))", "", token)
    if re.fullmatch(r"\d+(?:\.\d+)?", token):
        whole, _, rest = token.partition(".")
        rest = rest.rstrip("0")
        return f"{int(whole)}.{rest}" if rest else str(int(whole))
    return token
