"""Text of others on a terminal: what it would obey is made visible."""

from __future__ import annotations

import re

# Control characters but tab and newline → their pictures.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
# Further controls, characters that turn the direction of a line, and halves of characters → the replacement character.
HIDDEN = [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
VISIBLE |= dict.fromkeys(HIDDEN, 0xFFFD)
LINE_END = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def visible(text: str) -> str:
    """Text as it may be shown: a file's ids and names, a model's answers, an error that quotes them.

    Example:
      >>> visible("a\\x1b[31mb")
      'a␛[31mb'
    """
    return text.translate(VISIBLE)


def one_line(text: object, length: int = 400) -> str:
    """The same on one line, shortened: what a library says, a value from a file.

    Example:
      >>> one_line("expected a list\\n  got 7", length=20)
      'expected a list got…'
    """
    text = visible(LINE_END.sub(" ", str(text).strip()))
    return text if len(text) <= length else text[: length - 1] + "…"
