"""A model's chat template, within limits of time and memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from raft_jax.errors import InputError
from raft_jax.terminal import one_line

PROGRAM = Path(__file__).with_name("template_process.py")
SECONDS, MEMORY_BYTES = 2.0, 512 << 20  # limits of CPU time and memory in a separate process
# Size of the longest conversation that a template is tried on, in characters and in turns.
TRIED_CHARACTERS, TRIED_TURNS = 100_000, 20


class ChatTemplate:
    """A chat template, which is untrusted code.

    It is first tried in a process with limits. If it stays within them, conversations no longer than the ones it was
    tried on are rendered in this process. Everything else is rendered in a process with limits, 0.1 s each.

    Args:
      text: Jinja source.
      source: origin of the template, for errors.
      named_tokens: special tokens by their names in templates.
      blank: names that are known to be empty; printing any other undefined name is an error.

    Raises:
      InputError: it does not compile.
    """

    def __init__(self, text: str, source: str, named_tokens: Mapping[str, str], blank: Sequence[str]):
        self.text, self.source, self.named_tokens, self.blank = text, source, named_tokens, tuple(blank)
        compiles, error = _tried(text, tuple(named_tokens.items()), self.blank)
        if not compiles:
            raise InputError(f"{source}: the chat template does not compile: {one_line(error)}")
        self._trusted = not error
        self._compiled = None

    def render(self, conversations: list[dict[str, Any]], date: str | None = None) -> list[str]:
        """The text of each conversation.

        Args:
          conversations: the template's variables: messages, add_generation_prompt and others.
          date: the template's current date, as YYYY-MM-DD; default: the clock's.

        Raises:
          InputError: the template raises, prints an undefined name, or exceeds a limit of time or memory.
        """
        conversations = [
            {"tools": None, "documents": None, **self.named_tokens, **variables} for variables in conversations
        ]
        sizes = [
            (sum(len(message["content"]) for message in conversation["messages"]), len(conversation["messages"]))
            for conversation in conversations
        ]
        if self._trusted and all(size <= TRIED_CHARACTERS and turns <= TRIED_TURNS for size, turns in sizes):
            return self._render_here(conversations, date)
        reply = _ask(self.text, self.blank, conversations, date)
        errors = [result["error"] for result in reply.get("results", [reply]) if "error" in result]
        if errors:
            raise self._refusal(errors[0])
        return [result["text"] for result in reply["results"]]

    def _render_here(self, conversations: list[dict[str, Any]], date: str | None) -> list[str]:
        from raft_jax.models.template_process import compile_template, render

        if self._compiled is None:
            self._compiled = compile_template(self.text, self.blank)
        try:
            return [render(self._compiled, variables, date) for variables in conversations]
        except Exception as error:  # a template can raise anything
            raise self._refusal(error) from error

    def _refusal(self, error: object) -> InputError:
        return InputError(f"{self.source}: the chat template refuses this conversation: {one_line(error)}")


def _ask(text: str, blank: Sequence[str], conversations: list[dict[str, Any]], date: str | None) -> dict[str, Any]:
    """The reply of a process with limits of time and memory; an "error" if it exceeds one."""
    request = {
        "template": text,
        "blank": blank,
        "conversations": conversations,
        "date": date,
        "seconds": SECONDS,
        "bytes": MEMORY_BYTES,
    }
    # -P keeps the program's folder out of sys.path. In a new session, Ctrl-C in a terminal does not reach it.
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAM)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode == -signal.SIGPROF:
        return {"error": f"it takes longer than {SECONDS:g} s"}
    if "MemoryError" in done.stderr or done.returncode < 0:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    return {"error": f"its process has failed: {done.stderr.strip()[-200:]}"}


@lru_cache
def _tried(text: str, named_tokens: tuple[tuple[str, str], ...], blank: tuple[str, ...]) -> tuple[bool, str]:
    """Whether a template compiles, and which limit it exceeded ("" if none).

    A conversation that it refuses is no fault: some templates take no system message, or no answer at the end.
    """
    long = "A line of text, 12:30.\n" * (TRIED_CHARACTERS // TRIED_TURNS // 23)
    turns = [{"role": role, "content": long} for role in ("user", "assistant")] * (TRIED_TURNS // 2)
    thoughts = [turns[0], {"role": "assistant", "content": f"<think>{long}</think>{long}"}]
    short = [{"role": "user", "content": "Why?"}]
    system = {"role": "system", "content": long}
    one = [{"role": "user", "content": long * TRIED_TURNS}]
    conversations = [
        {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": generate,
            **dict(named_tokens),
            **thinking,
        }
        for messages in (short, one, thoughts, turns, [system, *turns[:-1]])
        for generate in (True, False)
        for thinking in ({}, {"enable_thinking": False}, {"enable_thinking": True})
    ]
    reply = _ask(text, blank, conversations, None)
    if "does not compile" in reply:
        return False, reply["does not compile"]
    return True, reply.get("error", "")
