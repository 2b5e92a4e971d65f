"""The prompts of the method, as conversations: the question, rewriting, fusion, and what the teacher sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

Conversation = list[dict[str, str]]
Turns = Iterable[Sequence[str]]  # (role, content): the system turn and all turns before the question


class Question(Protocol):
    """What has a question: an example, a refined row, an item of the refinement."""

    @property
    def question(self) -> str: ...

    @property
    def context(self) -> str: ...

    @property
    def turns(self) -> Turns: ...


def question_prompt(question: str, context: str = "", turns: Turns = ()) -> Conversation:
    """What the student sees: the turns before, then the question, after its context where it has one.

    Example:
      >>> question_prompt("How long?", turns=[("system", "Be brief.")])
      [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'How long?'}]
    """
    return _ask(_whole(question, context), turns)


def question_of(row: Question) -> Conversation:
    """`question_prompt` of an example or a refined row."""
    return question_prompt(row.question, row.context, row.turns)


def answered(conversation: Conversation, answer: str) -> Conversation:
    """A conversation with the assistant's answer at its end."""
    return [*conversation, {"role": "assistant", "content": answer}]


def rewrite_prompt(answer: str, question: str = "", context: str = "", turns: Turns = ()) -> Conversation:
    """The model says the gold answer again in its own words (Eq. 1).

    The task is a system turn and the answer alone the user's: small models then lose the least and seldom repeat the
    task (docs/refinement.md). The question is for terse answers, which cannot be spelled out without it.
    """
    return _task(
        "Rewrite the input text in clear, complete sentences. Keep every fact, number and name.",
        answer,
        _whole(question, context),
        turns,
    )


def fusion_prompt(answer: str, rewrite: str, question: str = "", context: str = "", turns: Turns = ()) -> Conversation:
    """Merges the gold answer, which has the facts, and the rewriting, which has the style, into one (Eq. 4)."""
    return _task(
        "The input text has two versions of one text. Write one version of it in clear, complete sentences. "
        "Keep every fact, number and name of the first version.",
        f"{answer}\n\n{rewrite}",
        _whole(question, context),
        turns,
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


def _task(task: str, text: str, asked: str, turns: Turns) -> Conversation:
    """A task about a text, in the conversation that the question belongs to; its system turn comes first."""
    own = [content for role, content in turns if role == "system"]
    others = [turn for turn in turns if turn[0] != "system"]
    about = [f"The text answers the question: {asked}"] if asked else []
    role = "You're an AI assistant for text re-writing."
    paragraphs = [*own, role, *about, task] if own or about else [f"{role} {task}"]
    return _ask(text, [("system", "\n\n".join(paragraphs)), *others])


def without_system_turn(conversation: Conversation) -> Conversation:
    """The same for a chat template that has no system turn: its text opens the first user's turn."""
    if conversation[0]["role"] != "system":
        return conversation
    system, first, *rest = conversation
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]
