"""Checks that a text keeps the gold answer's numbers, names, negations, opposites and words.

Two texts that differ by one "not", by one number or by two exchanged names have nearly the same embedding, so
the filter of Eq. 3 accepts them. These checks compare the words themselves. They err towards rejecting: a rejected
rewriting costs one row its fused answer, an accepted wrong one trains the model on a falsehood. Numbers, names and
words are compared in any language with spaces between its words; negations, modal verbs and opposites are English.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from raft_jax.refine.english import (
    INSTEAD_OF,
    MODALS,
    NEGATING_PREFIXES,
    NEGATIONS,
    OPPOSITE_PREFIXES,
    OPPOSITES,
    PIVOTS,
    STOP_WORDS,
)
from raft_jax.refine.words import content_stems, is_number, numbers, numbers_with_units, stem_of, words_of

SENTENCE_SLACK = 0.1  # how far the recall of a sentence may be below `word_recall`
MIN_SENTENCE_SUPPORT = 0.5  # smallest share of a sentence's content words that are in gold answer or source
MAX_NEW_WORDS = 0.4  # largest share of a text's content words that are in neither of the two
LONGER_THAN_YES = 3  # words after a "yes"; with at most this many, the "yes" may be omitted
SPELLED_OUT = 6  # new content words that any text may have, as a terse answer becomes a sentence
SAME_SENTENCE = 0.6  # smallest Jaccard index of content words at which two sentences are compared
LONGEST_ITEM = 3  # content words in an item of a list within a sentence; longer items are clauses

_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|(?<=[a-z][.!?])(?=[A-Z])|\n+")
_LIST_MARKER = re.compile(r"^\s*(?:[-*•·]|\(?\d{1,2}[.)]|\(?[a-z][.)])\s+", re.MULTILINE)
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_SYMBOLS = re.compile(r"[_$@%\\<>=|~{}\[\]#^*]|\w[/:]+\w|[a-z0-9]\.[a-z0-9]|\w\(\)")

# "a, b and c" or "a, b, or c"
_SERIES = re.compile(r"[^,;:.!?()\n]+(?:,\s+[^,;:.!?()\n]+)+?,?\s+(?:and|or)\s+[^,;:.!?()\n]+", re.IGNORECASE)
_BETWEEN_ITEMS = re.compile(r",?\s+(?:and|or)\s+|,\s+", re.IGNORECASE)
_EXAMPLE = re.compile(r"\b(?:such as|for example|for instance)\b", re.IGNORECASE)
_LIKE = re.compile(r"\b(?:like|including)\b|\be\.g\.", re.IGNORECASE)
_AND_OTHER = re.compile(r"\b(?:and|or) others?\b", re.IGNORECASE)
_MODAL_PHRASES = (
    (re.compile(r"\b(?:have|has|had|need|needs|needed) to\b"), "obligation"),
    (re.compile(r"\b(?:is|are|be) (?:able|free) to\b"), "permission"),
)


def mismatches(gold: str, text: str, source: str = "", word_recall: float = 0.8) -> list[str]:
    """Lists what `text` loses, adds or reverses compared with the gold answer; empty if there is nothing.

    Args:
      gold: the correct answer.
      text: a rewriting of it, or a fused candidate.
      source: question, context and earlier turns: `text` may have numbers, names and words from it.
      word_recall: smallest share of the gold answer's content words that `text` must have.

    Returns:
      Short phrases, such as "the number 30 is missing".

    Example:
      >>> mismatches("You must file within 30 days.", "You may file within 300 days.")
      ['the number 30 is missing', 'the number 300 is new', 'an obligation became a permission']
      >>> mismatches("Port tack. Rule 12.", "By Rule 12, the boat on port tack gives way.")
      []
    """
    new_items = list(_added_items(gold, text, source))
    gold, text = _without_list_markers(gold), _without_list_markers(text)
    differences = [
        *new_items,
        *_number_mismatches(gold, text, source),
        *_name_mismatches(gold, text, source),
        *_symbol_mismatches(gold, text),
        *_negation_mismatches(gold, text),
        *_modal_mismatches(gold, text),
        *_opposite_mismatches(gold, text),
        *_lost_contrasts(gold, text),
        *_lost_items(gold, text),
        *_lost_words(gold, text, word_recall),
        *_added_words(gold, text, source),
        *_added_examples(gold, text, source),
    ]
    # An exchange between two sentences does not show when whole texts are compared.
    in_text = numbers(text)
    for ours, theirs in _aligned_sentences(gold, text):
        differences += [
            *_exchanged_numbers(ours, theirs, in_text),
            *_sentence_negation(ours, theirs),
            *_modal_mismatches(ours, theirs),
            *_opposite_mismatches(ours, theirs),
            *_reversed_order(ours, theirs),
        ]
    return list(dict.fromkeys(differences))


def is_copy(gold: str, text: str) -> bool:
    """Whether a text is the gold answer word for word, ignoring case, punctuation and spaces.

    Example:
      >>> is_copy("No. Rule 12.", "no, rule 12")
      True
    """
    return words_of(gold) == words_of(text)


def _without_list_markers(text: str) -> str:
    return _LIST_MARKER.sub("", text)


# Numbers


def _number_mismatches(gold: str, text: str, source: str) -> Iterator[str]:
    in_gold, in_text, in_source = list(numbers_with_units(gold)), list(numbers_with_units(text)), numbers(source)
    gold_values, text_values = {value for value, _ in in_gold}, {value for value, _ in in_text}
    gold_words, text_words = set(words_of(gold)), set(words_of(text))
    for value in sorted(gold_values - text_values):
        if not INSTEAD_OF.get(value, frozenset()) & text_words:
            yield f"the number {value} is missing"
    for value in sorted(text_values - gold_values - in_source):
        if not INSTEAD_OF.get(value, frozenset()) & gold_words:
            yield f"the number {value} is new"
    for value in sorted(gold_values & text_values):
        units = [{unit for number, unit in side if number == value and unit} for side in (in_gold, in_text)]
        if all(units) and not units[0] & units[1]:
            yield f"{value} {min(units[0])} became {value} {min(units[1])}"


# Names and code


def names(text: str) -> dict[str, str]:
    """The names in a text, keyed by `_name_key`: capitalised words that do not begin a sentence, and acronyms.

    Example:
      >>> sorted(names("Rule 13 binds every vessel, says the IMO to Alice.").values())
      ['Alice', 'IMO']
    """
    by_key = {}
    for sentence in _SENTENCE_END.split(text):
        opening = True
        for match in re.finditer(r"[^\W\d_][\w’'&-]*|[:\"“(\[]", sentence):
            word = match[0]
            if not word[0].isalpha():
                opening = True
                continue
            acronym = len(word) > 1 and word.isupper()
            if acronym or (word[0].isupper() and not opening):
                for part in re.split(r"[-&]", re.sub(r"['’]s?$", "", word)):
                    if part[:1].isupper() and part not in ("I", "A") and part.lower() not in STOP_WORDS:
                        by_key[_name_key(part)] = part
            opening = False
    return by_key


def _name_key(name: str) -> str:
    """A name in lower case, without possessive and plural endings."""
    name = re.sub(r"['’]s?$", "", name.lower())
    return name[:-1] if len(name) > 3 and name.endswith("s") and not name.endswith("ss") else name


def _keys(text: str) -> set[str]:
    return {_name_key(word) for word in words_of(text)}


def _name_mismatches(gold: str, text: str, source: str) -> Iterator[str]:
    in_gold, in_text, gold_words, text_words = names(gold), names(text), _keys(gold), _keys(text)
    for key in sorted(in_gold.keys() - text_words):
        yield f"the name {in_gold[key]} is missing"
    for key in sorted(in_text.keys() - gold_words - _keys(source)):
        yield f"the name {in_text[key]} is new"


def _symbol_mismatches(gold: str, text: str) -> Iterator[str]:
    """Code, addresses and paths must be unchanged."""
    for token in dict.fromkeys(gold.split()):
        token = token.strip(".,;:!?()'\"“”‘’*")
        if _SYMBOLS.search(token) and not _NUMBER.fullmatch(token.strip("$€£%")) and token not in text:
            yield f"{token} is missing"


# Negations, modal verbs, opposites


def _answer_particle(text: str) -> tuple[str | None, str]:
    """The "yes" or "no" that a text begins with, and the rest of the text."""
    match = re.match(r"\W*(yes|no)\b(?![.]?\s*\d)(?=\s*[^\w\s]|\s*$)", text, re.IGNORECASE)
    return (match[1].lower(), text[match.end() :]) if match else (None, text)


def _count_negations(text: str) -> int:
    text = re.sub(r"\b[Nn]o\.\s*(?=\d)", "number ", text)  # "No. 5" is a number
    text = re.sub(r"\bnot only\b", "", text.lower())
    words = words_of(text)
    return sum(word in NEGATIONS or word.endswith("n't") for word in words)


def _negation_mismatches(gold: str, text: str) -> Iterator[str]:
    (gold_particle, gold_rest), (text_particle, text_rest) = _answer_particle(gold), _answer_particle(text)
    gold_count, text_count = _count_negations(gold_rest), _count_negations(text_rest)
    if text_particle and gold_particle != text_particle:
        yield f"{text_particle!r} is new" if gold_particle is None else f"{gold_particle!r} became {text_particle!r}"
    elif gold_particle == "no" and text_particle is None and text_count == gold_count:
        yield "the 'no' is lost"
    elif gold_particle == "yes" and text_particle is None and len(words_of(gold_rest)) > LONGER_THAN_YES:
        yield "the 'yes' is lost"
    elif text_count < gold_count:
        yield "a negation is lost"
    elif text_count > gold_count + (gold_particle == "no"):
        yield "a negation is new"


def _count_modals(text: str) -> Counter:
    lowered = text.lower()
    counts = Counter(MODALS[word] for word in words_of(lowered) if word in MODALS)
    for pattern, kind in _MODAL_PHRASES:
        counts[kind] += len(pattern.findall(lowered))
    return counts


def _modal_mismatches(gold: str, text: str) -> Iterator[str]:
    gold_modals, text_modals = _count_modals(gold), _count_modals(text)
    for lost in gold_modals:
        for gained in ("obligation", "permission", "advice"):
            if text_modals[lost] < gold_modals[lost] and text_modals[gained] > gold_modals[gained]:
                yield f"{_article(lost)} became {_article(gained)}"


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _opposite_mismatches(gold: str, text: str) -> Iterator[str]:
    """Words that are rarer than in the gold answer while their opposites are more frequent."""
    in_gold, in_text = Counter(words_of(gold)), Counter(words_of(text))

    def change(side) -> int:
        return sum(in_text[word] - in_gold[word] for word in side)

    for left, right in OPPOSITES:
        for lost, gained in ((left, right), (right, left)):
            if lost & in_gold.keys() and gained & in_text.keys() and change(lost - gained) < 0 < change(gained - lost):
                yield f"{_changed(lost, in_gold, in_text)!r} became {_changed(gained, in_text, in_gold)!r}"
                break
    gone, new = set((in_gold - in_text).keys()), set((in_text - in_gold).keys())
    for word in sorted(gone):
        for opposite in sorted(_formed_opposites(word) & new):
            yield f"{word!r} became {opposite!r}"
    for word in sorted(new):
        for plain in sorted(_formed_opposites(word) & gone):
            yield f"{plain!r} became {word!r}"


def _lost_contrasts(gold: str, text: str) -> Iterator[str]:
    """Words that the gold answer has together with their opposites, if the text has only the opposites: "active or
    inactive duty" means both.

    Example:
      >>> list(_lost_contrasts("Paid and unpaid leave count.", "Paid leave counts."))
      ["'unpaid' is missing"]
    """
    in_gold, in_text = set(words_of(gold)), set(words_of(text))
    for word in sorted(in_gold - in_text):
        if any(other in _formed_opposites(word) or word in _formed_opposites(other) for other in in_gold & in_text):
            yield f"{word!r} is missing"


def _formed_opposites(word: str) -> set[str]:
    """Opposites of a word formed with prefixes and suffixes, whether or not they are real words.

    Example:
      >>> sorted(_formed_opposites("underpaid")), sorted(_formed_opposites("harmful"))
      (['derpaid', 'overpaid'], ['harmless'])
    """
    formed = {word.removeprefix(prefix) for prefix in NEGATING_PREFIXES if word.startswith(prefix)}
    for one, other in (*OPPOSITE_PREFIXES, *((b, a) for a, b in OPPOSITE_PREFIXES)):
        if word.startswith(one):
            formed.add(other + word.removeprefix(one))
    for one, other in (("less", "ful"), ("ful", "less")):
        if word.endswith(one):
            formed.add(word.removesuffix(one) + other)
    return {other for other in formed if len(other) > 3}


def _changed(side, more: Counter, fewer: Counter) -> str:
    return max(sorted(side), key=lambda word: more[word] - fewer[word])


# Sentences and words


def _lost_words(gold: str, text: str, word_recall: float) -> Iterator[str]:
    """Missing content words: too many of the answer or of a sentence, or clearly more than there are new words."""
    present, wanted = set(content_stems(text)), list(dict.fromkeys(content_stems(gold)))
    lost, new = [stem for stem in wanted if stem not in present], present - set(wanted)
    allowed = (1 - word_recall) * len(wanted) + 1e-9
    if len(lost) > allowed or len(lost) - len(new) > allowed / 4:
        words = {stem_of(word): word for word in reversed(words_of(gold))}
        named = ", ".join(words[stem] for stem in lost[:3]) + (", …" if len(lost) > 3 else "")
        yield f"{len(lost)} of {len(wanted)} content words are missing ({named})"
        return
    # A sentence counts as present if most of its words are in one sentence of the text, or, if it was split, in two
    # neighbouring ones.
    parts = [set(content_stems(sentence)) for sentence in _SENTENCE_END.split(text)]
    parts += [one | other for one, other in pairwise(parts)]
    for sentence in _SENTENCE_END.split(gold):
        stems = set(content_stems(sentence))
        if len(stems) > 1 and max(len(stems & part) for part in parts) / len(stems) < word_recall - SENTENCE_SLACK:
            yield f"the sentence {_brief(sentence)!r} is missing"


def _lost_items(gold: str, text: str) -> Iterator[str]:
    """Items of a list within a sentence of which no content word is left, if the text has other items of the list.

    Example:
      >>> list(_lost_items("Bring a pen, paper, and a map.", "You need to bring a pen and a map."))
      ["'paper' is missing from a list"]
    """
    present = set(content_stems(text))
    for series in _SERIES.finditer(gold):
        items = [(item.strip(), set(content_stems(item))) for item in _BETWEEN_ITEMS.split(series[0])]
        short = [(item, stems) for item, stems in items if 0 < len(stems) <= LONGEST_ITEM]
        if any(stems & present for _, stems in short):
            yield from (f"{_brief(item)!r} is missing from a list" for item, stems in short if not stems & present)


def _added_words(gold: str, text: str, source: str) -> Iterator[str]:
    known, text_stems = set(content_stems(gold)) | set(content_stems(source)), list(dict.fromkeys(content_stems(text)))
    new = [stem for stem in text_stems if stem not in known]
    if len(new) > max(SPELLED_OUT, MAX_NEW_WORDS * len(text_stems)):
        yield f"{len(new)} of {len(text_stems)} content words are new"
    spelled_out = len(text_stems) <= 2 * SPELLED_OUT
    for sentence in _SENTENCE_END.split(text):
        stems = dict.fromkeys(content_stems(sentence))
        supported = sum(stem in known for stem in stems)
        if len(stems) > 2 and supported / len(stems) < MIN_SENTENCE_SUPPORT and not spelled_out:
            yield f"the sentence {_brief(sentence)!r} is new"


def _added_items(gold: str, text: str, source: str) -> Iterator[str]:
    """Items of a list with one item per line that share no content word with gold answer or source.

    Example:
      >>> list(_added_items("For example:\\n- Plumbing", "For example:\\n- Plumbing\\n- Construction", ""))
      ["the item 'Construction' is new"]
    """
    known = {*content_stems(gold), *content_stems(source)}
    for line in text.splitlines():
        item = _without_list_markers(line)
        if item != line and (stems := set(content_stems(item))) and not stems & known:
            yield f"the item {_brief(item)!r} is new"


def _added_examples(gold: str, text: str, source: str) -> Iterator[str]:
    """Examples and "and others" that neither gold answer nor source has: what they introduce is made up."""
    known = f"{gold}\n{source}"

    def more(*patterns: re.Pattern) -> bool:
        in_text, in_known = (sum(len(pattern.findall(side)) for pattern in patterns) for side in (text, known))
        return in_text > in_known

    if more(_EXAMPLE) and more(_EXAMPLE, _LIKE):  # "like" may become "such as"
        yield "an example is new"
    if more(_AND_OTHER):
        yield "'and other' is new"


def _brief(sentence: str) -> str:
    return " ".join(sentence.split())[:60]


def _aligned_sentences(gold: str, text: str) -> Iterator[tuple[str, str]]:
    """Pairs of sentences (gold, text) that share most of their words; identical sentences are left out."""

    def compared(sentence: str) -> tuple[frozenset[str], frozenset[str]]:
        words = words_of(sentence)
        stems = {stem_of(word) for word in words if word not in STOP_WORDS and not is_number(word)}
        return frozenset(stems), frozenset(words)

    theirs = {compared(sentence): sentence for sentence in _SENTENCE_END.split(text)}
    for sentence in _SENTENCE_END.split(gold):
        stems, words = compared(sentence)
        if len(stems) < 2 or ((stems, words) in theirs and words_of(theirs[stems, words]) == words_of(sentence)):
            continue
        overlap, _, best = max(
            (len(stems & other) / len(stems | other), len(words & all_words), candidate)
            for (other, all_words), candidate in theirs.items()
        )
        if overlap >= SAME_SENTENCE:
            yield sentence, best


def _exchanged_numbers(sentence: str, other: str, in_text: set[str]) -> Iterator[str]:
    """Numbers that moved to another sentence; `_number_mismatches` reports those missing from the whole text."""
    ours, theirs = numbers(sentence), numbers(other)
    if (lost := (ours - theirs) & in_text) and (new := theirs - ours):
        yield f"{min(lost)} became {min(new)} in {_brief(other)!r}"


def _sentence_negation(sentence: str, other: str) -> Iterator[str]:
    ours, theirs = (_count_negations(_answer_particle(side)[1]) for side in (sentence, other))
    if (ours == 0) != (theirs == 0):
        yield f"a negation is {'lost' if ours else 'new'} in {_brief(other)!r}"


def _reversed_order(sentence: str, other: str) -> Iterator[str]:
    """Three or more words, each once in both sentences, in reverse order: "A pays B" becomes "B pays A"."""
    ours, theirs = words_of(sentence), words_of(other)
    if "by" in theirs and "by" not in ours:  # a passive: the order is reversed, the meaning is the same
        return

    def places(words: list[str]) -> tuple[dict[str, int], list[str]]:
        kept = [word for word in words if word not in STOP_WORDS or word in PIVOTS]
        counts = Counter(map(stem_of, kept))
        return {stem_of(word): index for index, word in enumerate(kept) if counts[stem_of(word)] == 1}, kept

    first, kept = places(ours)
    second, _ = places(theirs)
    common = sorted(first.keys() & second.keys(), key=first.__getitem__)
    chains: list[list[str]] = []  # for each word the longest decreasing sequence of positions that ends there
    for index, stem in enumerate(common):
        before = [chains[i] for i in range(index) if second[common[i]] > second[stem]]
        chains.append([*max(before, key=len, default=[]), stem])
    for chain in chains:
        if len(chain) >= 3 and not {chain[0], chain[-1]} & PIVOTS:
            yield f"{kept[first[chain[0]]]!r} and {kept[first[chain[-1]]]!r} changed places"
            return
