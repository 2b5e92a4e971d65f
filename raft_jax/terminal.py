"""Prints untrusted text safely on a terminal: control characters are replaced by visible ones."""

from __future__ import annotations

import re

# Control characters except tab and newline → their control pictures (U+2400 to U+2421).
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
# C1 controls, bidirectional formatting characters and surrogates → the replacement character.
HIDDEN = [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
VISIBLE |= dict.fromkeys(HIDDEN, 0xFFFD)
LINE_END = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def visible(text: str) -> str:
    """Text with control characters made visible: ids and names in a file, a model's answers, errors that quote them.

    Example:
      >>> visible("a\\x1b[31mb")
      'a␛[31mb'
    """
    return text.translate(VISIBLE)


def one_line(text: object, length: int = 400) -> str:
    """`visible` text on one line of at most `length` characters, such as a library's message or a value from a file.

    Example:
      >>> one_line("expected a list\\n  got 7", length=20)
      'expected a list got…'
    """
    text = visible(LINE_END.sub(" ", str(text).strip()))
    return text if len(text) <= length else text[: length - 1] + "…"
