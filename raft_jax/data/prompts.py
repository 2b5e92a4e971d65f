"""The prompts of the method as conversations: question, rewriting, fusion, judging, teacher.

Their texts are the files in raft_jax/prompts, or a user's copies of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from raft_jax.errors import InputError, require_train
from raft_jax.files import is_there, read_text

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


@dataclass(frozen=True)
class Prompts:
    """The prompts of rewriting, fusion, judges and teacher, as jinja templates.

    A template with a line `---` has the system turn above and the user's turn below it; one without is the user's turn.

    Attributes:
      texts: the source of each template, by the names in `PLACEHOLDERS`.
    """

    texts: Mapping[str, str]

    def digest(self, name: str) -> str:
        """A hash of a template."""
        return hashlib.sha256(self.texts[name].encode()).hexdigest()[:8]

    def rewrite(self, answer: str, question: str = "", context: str = "", turns: Turns = ()) -> Conversation:
        """See `rewrite_prompt`."""
        return self._task("rewrite", turns, answer=answer, question=_whole(question, context))

    def fuse(self, answer: str, rewrite: str, question: str = "", context: str = "", turns: Turns = ()) -> Conversation:
        """See `fusion_prompt`."""
        return self._task("fuse", turns, answer=answer, rewrite=rewrite, question=_whole(question, context))

    def teacher(self, question: str, answer: str, context: str = "", turns: Turns = ()) -> Conversation:
        """See `teacher_prompt`."""
        system, user = self._rendered("teacher", answer=answer, question=_whole(question, context))
        turns = list(turns)
        if system and not any(role == "system" for role, _ in turns):
            turns = [("system", system), *turns]
        return _ask(user, turns)

    def judge(
        self, question: str, context: str, answer: str, candidate: str, candidate_first: bool = False
    ) -> Conversation:
        """Asks a model to score a candidate against the gold answer (App. C-D), the one or the other first."""
        parts = [f"Reference answer:\n{answer}", f"Candidate answer:\n{candidate}"]
        texts = "\n\n".join(reversed(parts) if candidate_first else parts)
        system, user = self._rendered("judge", question=_whole(question, context), texts=texts)
        return _ask(user, [("system", system)] if system else [])

    def judge_open(
        self, question: str, context: str, answer: str, candidate: str, candidate_first: bool = False
    ) -> Conversation:
        """Asks a model to score a candidate by itself, as an answer to a general question; takes what `judge` takes."""
        system, user = self._rendered("judge_open", question=_whole(question, context), answer=candidate)
        return _ask(user, [("system", system)] if system else [])

    def _task(self, name: str, turns: Turns, **values: str) -> Conversation:
        """A task about a text, in the conversation of the question. The text of an existing system turn comes first."""
        own = "\n\n".join(content for role, content in turns if role == "system")
        others = [turn for turn in turns if turn[0] != "system"]
        system, user = self._rendered(name, system=own, **values)
        if own and "system" not in _used(self.texts[name]):
            system = f"{own}\n\n{system}" if system else own
        return _ask(user, [("system", system), *others] if system else others)

    def _rendered(self, name: str, **values: str) -> tuple[str, str]:
        """The system turn, "" if there is none, and the user's turn."""
        system, user = _compiled(self.texts[name])
        return system.render(values) if system else "", user.render(values)


# What the templates have to use, and what they may use besides.
PLACEHOLDERS = {
    "rewrite": (("answer",), ("question", "system")),
    "fuse": (("answer", "rewrite"), ("question", "system")),
    "judge": (("texts",), ("question",)),
    "judge_open": (("answer", "question"), ()),
    "teacher": (("answer", "question"), ()),
}
PROMPT_FILES = Path(__file__).parents[1] / "prompts"


def load_prompts(folder: str | None = None) -> Prompts:
    """The prompts in a folder, NAME.txt for each name in `PLACEHOLDERS`; those it lacks are the package's own.

    Raises:
      InputError: there is no such folder, none of the files is in it, or one is no template, lacks a placeholder or has
        one that is not known; names the file.

    Example:
      >>> load_prompts().judge("How long?", "", "30 days.", "It takes 30 days.")[-1]["content"][-25:]
      'answer:\\nIt takes 30 days.'
    """
    if folder is None:
        return _own_prompts()
    texts = dict(_own_prompts().texts)
    place = Path(folder).expanduser()
    own = [name for name in PLACEHOLDERS if is_there(place / f"{name}.txt")]
    if not own:
        names = ", ".join(f"{name}.txt" for name in PLACEHOLDERS)
        raise InputError(
            f"refine.prompts: {folder} has none of {names}; `raft-jax prompts --copy {folder}` writes them there"
        )
    for name in own:
        texts[name] = read_text(place / f"{name}.txt")
        _require_placeholders(texts[name], f"refine.prompts: {place / name}.txt", *PLACEHOLDERS[name])
    return Prompts(texts)


def copy_prompts(folder: str) -> list[Path]:
    """Writes the prompts of the package into a folder, and returns their paths.

    Raises:
      InputError: one of the files is there already, or the folder cannot be written to.
    """
    place = Path(folder).expanduser()
    paths = [place / f"{name}.txt" for name in PLACEHOLDERS]
    if there := [path for path in paths if is_there(path)]:
        raise InputError(f"{there[0]}: is there already; remove it, or name another folder")
    try:
        place.mkdir(parents=True, exist_ok=True)
        for path in paths:
            path.write_text(_own_prompts().texts[path.stem], "utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror})") from error
    return paths


@cache
def _own_prompts() -> Prompts:
    return Prompts({name: read_text(PROMPT_FILES / f"{name}.txt") for name in PLACEHOLDERS})


def _require_placeholders(text: str, place: str, needed: Sequence[str], allowed: Sequence[str]) -> None:
    from jinja2 import TemplateError

    try:
        used = _used(text)
        _compiled(text)
    except TemplateError as error:
        raise InputError(f"{place}: not a template ({error}); see jinja's documentation") from error
    if missing := [name for name in needed if name not in used]:
        raise InputError(f"{place}: has no {{{{ {missing[0]} }}}}; put it where that text belongs")
    if unknown := sorted(used - {*needed, *allowed}):
        known = ", ".join((*needed, *allowed))
        raise InputError(f"{place}: {{{{ {unknown[0]} }}}} is not known; there are {known}")


@cache
def _environment():
    require_train("jinja2")
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)


@cache
def _compiled(text: str):
    """The templates of the system turn, None if there is none, and of the user's turn."""
    *system, user = map(_environment().from_string, _turns(text))
    return (*system, user) if system else (None, user)


@cache
def _used(text: str) -> set[str]:
    """The variables that a template uses."""
    from jinja2 import meta

    parsed = map(_environment().parse, _turns(text))
    return set().union(*map(meta.find_undeclared_variables, parsed))


def _turns(text: str) -> list[str]:
    """The templates of the system turn, if there is one, and of the user's turn."""
    return text.replace("\r\n", "\n").split("\n---\n", 1)


def rewrite_prompt(answer: str, question: str = "", context: str = "", turns: Turns = ()) -> Conversation:
    """Asks the model to rewrite the gold answer in its own words (Eq. 1).

    The task is in the system turn and the user turn is the answer alone: small models then lose the least of the answer
    and seldom repeat the task (docs/refinement.md). The question is given for terse answers, which cannot be expanded
    to full sentences without it.
    """
    return load_prompts().rewrite(answer, question, context, turns)


def fusion_prompt(answer: str, rewrite: str, question: str = "", context: str = "", turns: Turns = ()) -> Conversation:
    """Asks the model to merge the gold answer, which has the facts, and the rewriting, which has the style (Eq. 4)."""
    return load_prompts().fuse(answer, rewrite, question, context, turns)


def teacher_prompt(question: str, answer: str, context: str = "", turns: Turns = ()) -> Conversation:
    """The teacher's prompt (Eq. 7, App. H): the earlier turns, then background knowledge and question in one turn."""
    return load_prompts().teacher(question, answer, context, turns)


def _whole(question: str, context: str) -> str:
    """The question, preceded by the context that it may refer to."""
    return f"{context}\n\n{question}" if context else question


def _ask(text: str, turns: Turns = ()) -> Conversation:
    earlier = [{"role": role, "content": content} for role, content in turns]
    return [*earlier, {"role": "user", "content": text}]


def without_system_turn(conversation: Conversation) -> Conversation:
    """Moves the system text to the start of the first user turn, for chat templates without a system turn."""
    if conversation[0]["role"] != "system":
        return conversation
    system, first, *rest = conversation
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]
