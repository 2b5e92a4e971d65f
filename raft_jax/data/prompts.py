"""The three prompts of the method, as conversations: rewriting, fusion, and what the teacher sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Conversation = list[dict[str, str]]
Turns = Iterable[Sequence[str]]  # (role, content): the system turn and all turns before the question


def question_prompt(question: str, context: str = "", turns: Turns = ()) -> Conversation:
    """What the student sees: the turns before, then the question, after its context where it has one.

    Example:
      >>> question_prompt("How long?", turns=[("system", "Be brief.")])
      [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'How long?'}]
    """
    return _ask(_whole(question, context), turns)


def rewrite_prompt(question: str, answer: str, context: str = "") -> Conversation:
    """The model says the gold answer again in its own words, knowing the question (Eq. 1).

    Small models answer the question anew when it stands next to the task; so the task and the text come last.
    """
    return _ask(
        f"This text answers the question: {_whole(question, context)}\n\n"
        "Rewrite the following text in clear, complete sentences. Keep every fact, number and name.\n\n"
        f"{answer}"
    )


def fusion_prompt(question: str, answer: str, rewrite: str, context: str = "") -> Conversation:
    """Merges the gold answer, which has the facts, and the rewriting, which has the style, into one (Eq. 4)."""
    return _ask(
        f"These texts answer the question: {_whole(question, context)}\n\n"
        f"Text 1: {answer}\n\nText 2: {rewrite}\n\n"
        "Merge the two texts into one, in clear, complete sentences. Keep every fact, number and name of text 1. "
        "Write the merged text only."
    )


def teacher_prompt(question: str, answer: str, context: str = "", turns: Turns = ()) -> Conversation:
    """What the teacher sees (Eq. 7, App. H): the turns before, then background knowledge and the question in one."""
    return _ask(
        f"Background reference knowledge:\n{answer}\n\n"
        "Answer the following question, using the background knowledge where it helps.\n"
        f"{_whole(question, context)}",
        turns,
    )


def _whole(question: str, context: str) -> str:
    """What is asked: a question may hang on what came before it."""
    return f"{context}\n\n{question}" if context else question


def _ask(text: str, turns: Turns = ()) -> Conversation:
    earlier = [{"role": role, "content": content} for role, content in turns]
    return [*earlier, {"role": "user", "content": text}]
