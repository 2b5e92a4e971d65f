"""The prompts of the method as conversations: question, rewriting, fusion, teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

Conversation = list[dict[str, str]]
Turns = Iterable[Sequence[str]]  # (role, content): the system turn and all turns before the question


class Question(Protocol):
    """An object with a question: an example, a refined row, an item of the refinement."""

    @property
    def question(self) -> str: ...

    @property
    def context(self) -> str: ...

    @property
    def turns(self) -> Turns: ...


def question_prompt(question: str, context: str = "", turns: Turns = ()) -> Conversation:
    """The student's prompt: the earlier turns, then the question, preceded by its context if there is one.

    Example:
      >>> question_prompt("How long?", turns=[("system", "Be brief.")])
      [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'How long?'}]
    """
    return _ask(_whole(question, context), turns)


def question_of(row: Question) -> Conversation:
    """`question_prompt` of an example or a refined row."""
    return question_prompt(row.question, row.context, row.turns)


def answered(conversation: Conversation, answer: str) -> Conversation:
    """The conversation followed by the assistant's answer."""
    return [*conversation, {"role": "assistant", "content": answer}]


def rewrite_prompt(answer: str, question: str = "", context: str = "", turns: Turns = ()) -> Conversation:
    """Asks the model to rewrite the gold answer in its own words (Eq. 1).

    The task is in the system turn and the user turn is the answer alone: small models then lose the least of the answer
    and seldom repeat the task (docs/refinement.md). The question is given for terse answers, which cannot be expanded
    to full sentences without it.
    """
    return _task(
        "Rewrite the input text in clear, complete sentences. Keep every fact, number and name.",
        answer,
        _whole(question, context),
        turns,
    )


def fusion_prompt(answer: str, rewrite: str, question: str = "", context: str = "", turns: Turns = ()) -> Conversation:
    """Asks the model to merge the gold answer, which has the facts, and the rewriting, which has the style (Eq. 4)."""
    return _task(
        "The input text has two versions of one text. Write one version of it in clear, complete sentences. "
        "Keep every fact, number and name of the first version.",
        f"{answer}\n\n{rewrite}",
        _whole(question, context),
        turns,
    )


def teacher_prompt(question: str, answer: str, context: str = "", turns: Turns = ()) -> Conversation:
    """The teacher's prompt (Eq. 7, App. H): the earlier turns, then background knowledge and question in one turn."""
    return _ask(
        f"Background reference knowledge:\n{answer}\n\n"
        "Answer the following question, using the background knowledge where it helps.\n"
        f"{_whole(question, context)}",
        turns,
    )


def _whole(question: str, context: str) -> str:
    """The question, preceded by the context that it may refer to."""
    return f"{context}\n\n{question}" if context else question


def _ask(text: str, turns: Turns = ()) -> Conversation:
    earlier = [{"role": role, "content": content} for role, content in turns]
    return [*earlier, {"role": "user", "content": text}]


def _task(task: str, text: str, asked: str, turns: Turns) -> Conversation:
    """A task about a text, in the conversation of the question. The text of an existing system turn comes first."""
    own = [content for role, content in turns if role == "system"]
    others = [turn for turn in turns if turn[0] != "system"]
    about = [f"The text answers the question: {asked}"] if asked else []
    role = "You're an AI assistant for text re-writing."
    paragraphs = [*own, role, *about, task] if own or about else [f"{role} {task}"]
    return _ask(text, [("system", "\n\n".join(paragraphs)), *others])


def without_system_turn(conversation: Conversation) -> Conversation:
    """Moves the system text to the start of the first user turn, for chat templates without a system turn."""
    if conversation[0]["role"] != "system":
        return conversation
    system, first, *rest = conversation
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]
