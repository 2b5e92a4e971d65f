"""Fills the tables of docs/performance.md from benchmarks/results/*.json.

    python benchmarks/tables.py            # rewrites the page
    python benchmarks/tables.py --check    # exit code 1 where the page is out of date

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, and NAME.json is its data; the format of
these files is described in benchmarks/results/README.md. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/performance.md", ROOT / "benchmarks/results"
BLOCK = re.compile(r"(<!-- table: ([\w.-]+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)


def cell(value, spec: str) -> str:
    """One value as text: a number, a text, a median with its range, or nothing.

    Example:
      >>> cell({"median": 6.64, "low": 6.31, "high": 6.84}, ".2f"), cell(0.08, ".0%"), cell("TRL", ".2f")
      ('6.64 (6.31-6.84)', '8%', 'TRL')
    """
    if value is None:
        return ""
    if isinstance(value, dict):
        return "{} ({}-{})".format(*(cell(value[name], spec) for name in ("median", "low", "high")))
    return format(value, "" if isinstance(value, str) else spec)


def table(result: dict) -> str:
    """A result's rows as a table in Markdown, and a line below it that says where they are from."""
    columns = result["columns"]
    lines = [[column["title"] for column in columns], ["---"] * len(columns)]
    lines += [[cell(row[column["key"]], column.get("format", "")) for column in columns] for row in result["rows"]]
    origin = [result["machine"], result["date"], *(f"{name} {version}" for name, version in result["versions"].items())]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\n{result['notes']} ({'; '.join(filter(None, origin))})\n"


def filled(page: str) -> str:
    """The page with every table made from its data."""

    def block(match: re.Match) -> str:
        result = json.loads((RESULTS / f"{match[2]}.json").read_text("utf-8"))
        return f"{match[1]}\n{table(result)}\n{match[3]}"

    return BLOCK.sub(block, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where it is out of date")
    options = parser.parse_args()
    before = PAGE.read_text("utf-8")
    after = filled(before)
    if options.check:
        return int(before != after)
    PAGE.write_text(after, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
