"""What came out of a refinement and what it took, for the table at its end and for the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from raft_jax.data.refined import RefinedRow, Round

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Work:
    """What a role's model did for the rows of a refinement, in this run and in those that it goes on from.

    Attributes:
      role: "rewriter", "fuser" or "judge NAME".
      model: its model's name.
      calls: texts and judgements, with those that had no score in them.
      prompt_tokens: tokens of the prompts.
      num_tokens: tokens that were generated.
      seconds: the sum over all calls, also of those that ran at once.
      retries: tries that came to nothing.
      cost: in the currency of the endpoint's prices; None without prices.
    """

    role: str
    model: str
    calls: int
    prompt_tokens: int
    num_tokens: int
    seconds: float
    retries: int
    cost: float | None = None


@dataclass(frozen=True)
class JudgeCounts:
    """How a judge scored the candidates.

    Attributes:
      name: the judge's.
      scored: candidates that it scored.
      silent: candidates without a score.
      mean: of its scores; None if there are none.
      accepts: share of its scores that reach `refine.accept`; None if there are none.
    """

    name: str
    scored: int
    silent: int
    mean: float | None
    accepts: float | None


@dataclass(frozen=True)
class QualityCounts:
    """How natural one kind of text is to the student, beside the gold answers of the same rows.

    Attributes:
      name: "rewritings" or "fused answers".
      rows: how many there are.
      perplexity: exp of minus the mean over rows of the mean log-likelihood per token.
      gold_perplexity: the same of their gold answers.
      length: mean of their characters as multiples of the gold answers'.
      coverage: mean share of the gold answers' numbers and names; None where none has any.
      less_likely: rows whose gold answer is more likely per token.
    """

    name: str
    rows: int
    perplexity: float
    gold_perplexity: float
    length: float
    coverage: float | None
    less_likely: int


def perplexity(logprob: float) -> float:
    """exp of minus a mean log-likelihood per token; infinite where a float cannot hold it.

    Example:
      >>> round(perplexity(-0.6931472), 6)
      2.0
    """
    return math.exp(-logprob) if logprob > -700 else math.inf


def quality_counts(rows: Sequence[RefinedRow]) -> list[QualityCounts]:
    """The counts of usable rewritings and of fused answers, where there are such with log-likelihoods."""
    counts = []
    for key, name in (("rewrite", "rewritings"), ("fused", "fused answers")):
        pairs = [(row.quality[key], row.quality["gold"]) for row in rows if row.quality and key in row.quality]
        known = [(text, text.logprob, gold.logprob) for text, gold in pairs]
        known = [(text, mine, golds) for text, mine, golds in known if mine is not None and golds is not None]
        if not known:
            continue
        texts, mine, golds = zip(*known, strict=True)
        shares = [text.coverage for text in texts if text.coverage is not None]
        counts.append(
            QualityCounts(
                name,
                len(texts),
                perplexity(sum(mine) / len(mine)),
                perplexity(sum(golds) / len(golds)),
                sum(text.length for text in texts) / len(texts),
                sum(shares) / len(shares) if shares else None,
                sum(own < gold for own, gold in zip(mine, golds, strict=True)),
            )
        )
    return counts


def less_natural(row: RefinedRow) -> bool:
    """Whether a row's fused answer is less likely to the student, per token, than its gold answer."""
    fused, gold = ((row.quality or {}).get(name) for name in ("fused", "gold"))
    return bool(
        fused and gold and fused.logprob is not None and gold.logprob is not None and fused.logprob < gold.logprob
    )


def quantiles(values: Sequence[float], shares: Sequence[float] = QUANTILES) -> list[float]:
    """Each quantile is one of the values: the smallest that so large a share of them does not exceed.

    Example:
      >>> quantiles([4.0, 1.0, 2.0, 3.0], [0.5, 0.95])
      [2.0, 4.0]
    """
    return np.quantile(np.asarray(values), shares, method="inverted_cdf").tolist()


def judge_counts(rows: Sequence[RefinedRow], accept: float) -> list[JudgeCounts]:
    """The counts of each judge, in the order of their first candidate."""
    judged = _judged(rows)
    counts = []
    for name in dict.fromkeys(name for candidate in judged for name in candidate.scores):
        all_scores = [candidate.scores[name] for candidate in judged if name in candidate.scores]
        scores = [score for score in all_scores if score is not None]
        share = sum(score >= accept for score in scores) / len(scores) if scores else None
        mean = sum(scores) / len(scores) if scores else None
        counts.append(JudgeCounts(name, len(scores), len(all_scores) - len(scores), mean, share))
    return counts


def agreement(rows: Sequence[RefinedRow], accept: float) -> tuple[int, int]:
    """Of the candidates that several judges scored: how many all or none of them accept, and how many there are."""
    sides = [
        {score >= accept for score in scores}
        for candidate in _judged(rows)
        if len(scores := [score for score in candidate.scores.values() if score is not None]) > 1
    ]
    return sum(len(side) == 1 for side in sides), len(sides)


def _judged(rows: Sequence[RefinedRow]) -> list[Round]:
    return [candidate for row in rows for candidate in row.rounds if candidate.scores]


def lines(rows: Sequence[RefinedRow], accept: float, works: Sequence[Work]) -> Iterator[str]:
    """The table at the end of a refinement: similarities, judges, how natural the texts are, what the models took."""
    if similarity := [row.similarity for row in rows if row.similarity is not None]:
        shown = ", ".join(
            f"{share:.0%} up to {value:.3f}" for share, value in zip(QUANTILES, quantiles(similarity), strict=True)
        )
        yield f"  similarity of {len(similarity)} rewritings: {shown}"
    if judges := judge_counts(rows, accept):
        header = ("judge", "scored", "no score", "mean", f"{accept:g} or more")
        yield from _aligned([header, *((j.name, f"{j.scored:,}", f"{j.silent:,}", *_shares(j)) for j in judges)])
        same, several = agreement(rows, accept)
        if several:
            yield f"  the judges agree on {same / several:.0%} of the {several:,} candidates that several scored"
    if counts := quality_counts(rows):
        yield from _aligned([QUALITY_COLUMNS, *map(quality_cells, counts)])
        fused = [count for count in counts if count.name == "fused answers"]
        if fused and fused[0].less_likely:
            yield (
                f"  {fused[0].less_likely:,} of {fused[0].rows:,} fused answers are less natural to the student than "
                "the gold answer, so training on them moves it further, not less"
            )
    if works:
        header = ("model", "", "calls", "tokens read", "written", "seconds", "retries", "cost")
        yield from _aligned([header, *map(work_cells, works)])
        if any(work.cost is not None for work in works):
            yield f"  cost: {sum(work.cost or 0 for work in works):.4g}"


QUALITY_COLUMNS = (
    "text",
    "rows",
    "perplexity",
    "of their gold answers",
    "length to gold",
    "numbers and names kept",
    "less likely than gold",
)


def quality_cells(count: QualityCounts) -> tuple[str, ...]:
    """A row of the table of how natural texts are to the student."""
    return (
        count.name,
        f"{count.rows:,}",
        f"{count.perplexity:.4g}",
        f"{count.gold_perplexity:.4g}",
        f"{count.length:.2f}",
        "" if count.coverage is None else f"{count.coverage:.0%}",
        f"{count.less_likely:,}",
    )


def work_cells(work: Work) -> tuple[str, ...]:
    """A row of the table of what models took."""
    return (
        work.role,
        work.model,
        f"{work.calls:,}",
        f"{work.prompt_tokens:,}",
        f"{work.num_tokens:,}",
        f"{work.seconds:,.1f}",
        f"{work.retries:,}",
        "" if work.cost is None else f"{work.cost:.4g}",
    )


def _shares(judge: JudgeCounts) -> tuple[str, str]:
    if judge.mean is None or judge.accepts is None:
        return "", ""
    return f"{judge.mean:.3f}", f"{judge.accepts:.0%}"


def _aligned(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table, indented; columns with numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = [any(row[column][:1].isdigit() for row in cells[1:]) for column in range(len(widths))]
    for row in cells:
        columns = zip(row, widths, numbers, strict=True)
        yield "  " + "  ".join(f"{cell:{'>' if right else '<'}{width}}" for cell, width, right in columns).rstrip()


def merged(works: Sequence[Work]) -> list[Work]:
    """Works of one role and model as one.

    Example:
      >>> merged([Work("fuser", "m", 1, 5, 2, 1.0, 0), Work("fuser", "m", 2, 5, 2, 0.5, 1, 3.0)])
      [Work(role='fuser', model='m', calls=3, prompt_tokens=10, num_tokens=4, seconds=1.5, retries=1, cost=3.0)]
    """
    result = []
    ordered = sorted(works, key=lambda work: (work.role, work.model))
    for (role, model), group in groupby(ordered, key=lambda work: (work.role, work.model)):
        parts = list(group)
        costs = [part.cost for part in parts if part.cost is not None]
        result.append(
            Work(
                role,
                model,
                sum(part.calls for part in parts),
                sum(part.prompt_tokens for part in parts),
                sum(part.num_tokens for part in parts),
                sum(part.seconds for part in parts),
                sum(part.retries for part in parts),
                sum(costs) if costs else None,
            )
        )
    return result
