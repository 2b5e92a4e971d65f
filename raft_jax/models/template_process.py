"""Renders chat templates, imported or as a separate program, which reads a JSON object and writes another.

A template is untrusted code. Jinja's sandbox keeps it from files and from Python, but only a separate process can limit
its time and its memory (nested loops, `'x' * 10**9`, a filter that pads a text).
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from jinja2 import Undefined, UndefinedError, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import missing

MAX_CHARACTERS = 16 << 20


class Generation(Extension):
    """`{% generation %}` marks the assistant's text for transformers; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class Named(Undefined):
    """An undefined name may be tested but not printed: a special token would be missing without an error."""

    blank: frozenset[str] = frozenset()  # names that are known to be empty

    def __str__(self) -> str:
        if self._undefined_obj is missing and self._undefined_name not in self.blank:
            raise UndefinedError(
                f"it prints {self._undefined_name}, which nothing defines; where that is a special "
                "token, set it in tokenizer_config.json, to null if there is none"
            )
        return ""


def compile_template(text: str, blank: Sequence[str]):
    """Compiles a chat template with the settings of transformers' own environment, which cannot be given limits."""

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        undefined=type("NamedHere", (Named,), {"blank": frozenset(blank), "__slots__": ()}),
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(text)


def render(template, variables: dict[str, Any], date: str | None) -> str:
    day = datetime.datetime.now() if date is None else datetime.date.fromisoformat(date)
    text = template.render(**variables, strftime_now=day.strftime)
    if len(text) > MAX_CHARACTERS:
        raise TemplateError(f"it renders {len(text):,} characters; at most {MAX_CHARACTERS:,} are taken")
    return text


def main() -> None:
    """Answers one request: the rendered conversations, or the errors."""
    request = json.load(sys.stdin)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the default action ends the process
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (request["bytes"], request["bytes"]))
    try:
        template = compile_template(request["template"], request["blank"])
    except TemplateError as error:
        json.dump({"does not compile": str(error)}, sys.stdout)
        return
    results = []
    for variables in request["conversations"]:
        try:
            results.append({"text": render(template, variables, request["date"])})
        except MemoryError:
            raise
        except Exception as error:  # a template can raise anything
            results.append({"error": str(error)[:1000] or type(error).__name__})
    json.dump({"results": results}, sys.stdout)


if __name__ == "__main__":
    main()
