"""Screens generated texts for refusals, repeated instructions and repetition."""

from __future__ import annotations

import re
from collections import Counter

from raft_jax.refine.english import STOP_WORDS
from raft_jax.refine.words import words_of

REFUSAL = re.compile(
    r"^\W*(i( a|['’]?)m (sorry|unable|not able)|sorry,|i apologi[sz]e|i can(no|['’])t (help|assist|answer|provide)|"
    r"as an ai\b)",
    re.IGNORECASE,
)
# "Here is the rewritten text:" and the like, before a text that is complete without it.
LEAD_IN = re.compile(
    r"^\W*(?:(?:sure|certainly|of course|okay|ok|absolutely)\b[^\n:]{0,100}[:!.]\s+)?"
    r"(?:(?:here(?:['’]s| is| are)|below is|the following is|this is)\b[^\n:]{0,60}"
    r"\b(?:text|version|answer|rewrit\w*|rephras\w*|paraphras\w*|merge\w*|response|sentences?)\b[^\n:]{0,60}:"
    r"|(?:(?:re-?written|re-?phrased|merged|revised|final|combined)\s+(?:text|version|answer|response)|"
    r"(?:rewrite|answer|response|output)|"
    r"the (?:correct |right |short )?answer (?:to (?:this|the|your) question )?is)\s*:)\s*",
    re.IGNORECASE,
)
# Phrases of texts that are about the task instead of the subject.
TASK_WORDS = re.compile(
    r"\bre-?writ(?:e|es|ing|ten)\b|\bre-?phras(?:e|es|ed|ing)\b|\bparaphras(?:e|es|ed|ing)\b|\bmerg(?:e|es|ed|ing)\b|"
    r"\b(?:complete|full|clear) sentences?\b|\btexts? [12]\b|"
    r"\b(?:first|second|two|both|original|given|provided) texts?\b|"
    r"\b(?:this|the) (?:text|passage|answer|response|statement) "
    r"(?:answers|provides|describes|explains|discusses|is about|says|states)\b|"
    r"\bthe (?:user|assistant|prompt|instructions?)\b|^\W*(?:user|assistant|system)\s*:|<\|[^|]*\|>|\[/?INST\]|</?s>",
    re.IGNORECASE | re.MULTILINE,
)
RUN = 4  # consecutive words that a text may not share with the instructions
_ITEM = re.compile(r"\s*[-*•·]\s+\w")
_LINE = re.compile(r"(?<=[.!?])\s+|\n+")


def without_lead_in(text: str) -> str:
    """Removes a lead-in that only announces the text, and quotation marks around the text after it.

    Example:
      >>> without_lead_in("Here is the rewritten text:\\n\\n\\"The boat gives way.\\"")
      'The boat gives way.'
      >>> without_lead_in("Here is what you need: a form.")
      'Here is what you need: a form.'
    """
    match = LEAD_IN.match(text)
    rest = text[match.end() :].strip() if match else ""
    if not rest:
        return text
    if len(rest) > 1 and (rest[0], rest[-1]) in (('"', '"'), ("“", "”")) and not re.search(r'["“”]', rest[1:-1]):
        rest = rest[1:-1].strip()
    return rest


def repeated_instructions(text: str, instructions: str, sources: str) -> str | None:
    """Words of `text` that come from its prompt's instructions or are about the task; None if there are none.

    Args:
      text: a generated text.
      instructions: the prompt without the row's own texts.
      sources: the row's own texts; words from them are allowed.

    Example:
      >>> repeated_instructions("Keep every fact and number of it.", "Keep every fact and number.", "The fee is $5.")
      'keep every fact and number'
    """
    allowed = sources.lower()
    for match in TASK_WORDS.finditer(text):
        if match[0].lower() not in allowed:
            return match[0]
    return shared_run(text, instructions, sources)


def shared_run(text: str, instructions: str, sources: str) -> str | None:
    """Four or more consecutive words that are in the text and the instructions, but not in the row's own texts."""
    words, scaffold, own = words_of(text), _runs(words_of(instructions)), _runs(words_of(sources))
    for start in range(len(words) - RUN + 1):
        run = tuple(words[start : start + RUN])
        if run in scaffold and run not in own and sum(word not in STOP_WORDS for word in run) > 1:
            end = start + RUN
            while end < len(words) and tuple(words[end - RUN + 1 : end + 1]) in scaffold:
                end += 1
            return " ".join(words[start:end])
    return None


def repetition(text: str, gold: str) -> str | None:
    """A sentence, or six consecutive words, that a text has at least twice and more often than the gold answer.

    Sentences that differ in stop words only are the same. Items of a list count at any length, other sentences from
    three words.

    Example:
      >>> repetition("Call the local office. Call your local office.", "Call the local office.")
      'Call your local office.'
    """
    wanted = Counter(map(_meaning, _LINE.split(gold)))
    counts: Counter = Counter()
    for line in _LINE.split(text):
        meaning = _meaning(line)
        counts[meaning] += 1
        if (len(words_of(line)) >= 3 or _ITEM.match(line)) and counts[meaning] > max(1, wanted[meaning]):
            return line.strip()
    in_gold, in_text = (Counter(_runs(words_of(side), 6, unique=False)) for side in (gold, text))
    for run, count in in_text.items():
        if count > max(1, in_gold[run]):
            return " ".join(run)
    return None


def _meaning(sentence: str) -> str:
    """A sentence without stop words; the whole sentence if fewer than two other words are left."""
    words = words_of(sentence)
    meaning = [word for word in words if word not in STOP_WORDS]
    return " ".join(meaning if len(meaning) > 1 else words)


def _runs(words: list[str], length: int = RUN, unique: bool = True):
    runs = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return set(runs) if unique else runs
