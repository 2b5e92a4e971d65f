"""What the models of a refinement took, from the records that its rows are made of; and the preview of some rows."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from raft_jax.config import Config
from raft_jax.data.refined import RefinedRow
from raft_jax.outcome import Work, merged
from raft_jax.refine.endpoint import cost_of
from raft_jax.terminal import visible

ROLES = {"rewrite": "rewriter", "fuse": "fuser"}  # the roles by the stages of their records
WIDTH = 100  # of the texts of a preview, in characters


def account(records: Sequence[Mapping], config: Config) -> list[Work]:
    """What each role took, of the records that say so: programs take nothing, and older versions did not say."""
    works = []
    for record in records:
        if "seconds" not in record:
            continue
        role, name = _role_of(record, config)
        endpoint = config.endpoints.get(name)
        prompt_tokens, num_tokens = record["prompt_tokens"], record["num_tokens"]
        cost = cost_of(endpoint, prompt_tokens, num_tokens) if endpoint else None
        took = prompt_tokens, num_tokens, record["seconds"], record["retries"]
        works.append(Work(role, record["model"], 1, *took, cost))
    order = ["rewriter", "fuser", *(f"judge {name}" for name in config.refine.judges)]
    return sorted(merged(works), key=lambda work: order.index(work.role) if work.role in order else len(order))


def _role_of(record: Mapping, config: Config) -> tuple[str, str]:
    """The role of a record's model as the table names it, and as the config does."""
    if (role := ROLES.get(record["stage"])) is not None:
        return role, getattr(config.refine, role)
    # id#judge#hash, and of a reply without a score also its number
    parts = record["key"].rsplit("#", 3 if record["stage"] == "ask" else 2)
    return f"judge {parts[1]}", parts[1]


def preview_lines(rows: Sequence[RefinedRow], works: Sequence[Work], num_rows: int) -> Iterator[str]:
    """Some rows stage by stage, what they took, and what all rows may take.

    Args:
      rows: the rows of the preview.
      works: what they took.
      num_rows: the number of all rows.
    """
    for row in rows:
        yield from map(visible, _row_lines(row))
    share = num_rows / len(rows)
    tokens, seconds = sum(work.num_tokens for work in works), sum(work.seconds for work in works)
    costs = [work.cost for work in works if work.cost is not None]
    yield (
        f"{len(rows)} of {num_rows} rows: {tokens:,} tokens written in {seconds:,.1f} s of requests"
        + (f", cost {sum(costs):.4g}" if costs else "")
    )
    yield (
        f"all {num_rows} rows, if they are like these: about {tokens * share:,.0f} tokens, {seconds * share:,.0f} s of "
        "requests" + (f", cost {sum(costs) * share:.4g}" if costs else "; prices: endpoints.NAME.price_in, price_out")
    )
    yield "what was made is in the ledger, and is not made or paid for again"


def _row_lines(row: RefinedRow) -> Iterator[str]:
    yield f"── {row.id}"
    yield from _text("question", row.question)
    yield from _text("gold", row.gold)
    yield from _text(f"rewriting, {row.rewrite_status}", row.rewrite or "—", row.rewrite_note)
    if row.similarity is not None:
        yield f"  similarity {row.similarity:.3f}, {'accepted' if row.accepted else 'not accepted'}"
    for candidate in row.rounds:
        yield from _text(f"candidate {candidate.round}, {candidate.status}", candidate.candidate or "—", candidate.note)
        for name, score in candidate.scores.items():
            reason = candidate.reasons.get(name, "")
            yield f"    {name} {'no score' if score is None else f'{score:.3f}'}{f': {reason}' if reason else ''}"
    yield from _text(f"target, from {row.chosen}", row.answer, row.reason)
    yield ""


def _text(title: str, text: str, note: str = "") -> Iterator[str]:
    """A text below its title, in lines of `WIDTH`."""
    yield f"  {title}{f' ({note})' if note else ''}:"
    for line in text.splitlines() or [""]:
        yield from textwrap.wrap(line, WIDTH, initial_indent="    ", subsequent_indent="    ") or ["    "]
