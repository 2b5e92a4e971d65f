"""Text of others on a terminal: what it would obey is made visible."""

from __future__ import annotations

# Control characters but tab and newline → their pictures.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
# Further controls, characters that turn the direction of a line, and halves of characters → the replacement character.
HIDDEN = [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
VISIBLE |= dict.fromkeys(HIDDEN, 0xFFFD)
ONE_LINE = VISIBLE | {ord("\n"): 0x2424, 0x2028: 0x2424, 0x2029: 0x2424}


def visible(text: str, one_line: bool = False) -> str:
    """Text as it may be shown: a file's ids and names, a model's answers, an error that quotes them.

    Example:
      >>> visible("a\\x1b[31mb")
      'a␛[31mb'
    """
    return text.translate(ONE_LINE if one_line else VISIBLE)
