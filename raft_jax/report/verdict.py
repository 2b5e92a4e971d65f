"""What each method gained in the domain and what it forgot, in sentences with 95 % intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from raft_jax.report.folder import RunRecords, label
from raft_jax.scores import ModelScores

FEWEST = 8  # with fewer questions an interval would not be reliable
NOISE, TOO_FEW = "no difference beyond noise", "too few to tell a difference"


@dataclass(frozen=True)
class Measure:
    """A score of one answer, and the format of its differences."""

    part: str  # "answers" (held-out questions) or "general_answers"
    key: str
    name: str
    unit: str = ""
    digits: int = 3
    scale: float = 1.0


DOMAIN = (
    Measure("answers", "accepted", "domain accuracy", " percentage points", digits=1, scale=100.0),
    Measure("answers", "gold_logprob", "log-likelihood of the gold answers", " nats per token"),
    Measure("answers", "token_f1", "token F1"),
    Measure("answers", "similarity", "similarity to the gold answers"),
)
DIVERGENCE = Measure("general_answers", "divergence", "divergence from the base model", " nats per token", digits=4)
OPEN = Measure("general_answers", "accepted", "accepted answers", " percentage points", digits=1, scale=100.0)
ACCURACY = Measure("general_answers", "correct", "accuracy", " percentage points", digits=1, scale=100.0)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and half the width of its 95 % interval; None with fewer than `FEWEST` pairs."""

    mean: float
    half_width: float | None
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0, else 0."""
        if self.half_width is None or abs(self.mean) <= self.half_width:
            return 0
        return 1 if self.mean > 0 else -1


@dataclass(frozen=True)
class Verdict:
    """One method against the base model, or RAFT against another method: in short, then in numbers."""

    methods: tuple[str, ...]
    short: str
    domain: tuple[str, ...]
    general: tuple[str, ...]


def verdicts(run: RunRecords) -> list[Verdict]:
    """RAFT against each other method on the same questions, then each method against the base model.

    Models that have not been evaluated are left out; empty if the base model has not been.
    """
    if "base" not in run.models:
        return []
    methods = [name for name in run.models if name != "base"]
    others = [name for name in methods if name != "raft"] if "raft" in methods else []
    pairs = [(other, "raft") for other in others] + [("base", name) for name in methods]
    return [verdict for before, after in pairs if (verdict := _verdict(run, before, after))]


def _verdict(run: RunRecords, before: str, after: str) -> Verdict | None:
    domain = [(measure, change) for measure in DOMAIN if (change := paired(run, measure, before, after))]
    divergence, accuracy = paired(run, DIVERGENCE, before, after), paired(run, ACCURACY, before, after)
    if not domain or divergence is None:
        return None
    signs = {change.sign for _, change in domain} - {0}
    learned = "mixed" if len(signs) == 2 else {1: "more", -1: "less"}.get(next(iter(signs), 0), "noise")
    if before == "base":
        short = f"{label(after)} {_AGAINST_BASE[learned]} and {_ACCURACY[accuracy.sign if accuracy else 0]}."
    else:
        forgot = _FORGOT[divergence.sign].format(other=label(before))
        short = f"{label(after)} {forgot} {_AGAINST_OTHER[learned]}."
        if (divergence.sign, learned) == (0, "noise"):
            short = f"Between {label(after)} and {label(before)} there is {NOISE}."
    methods = (after,) if before == "base" else (after, before)
    if divergence.half_width is None or all(change.half_width is None for _, change in domain):
        short = f"{label(after)} against {label(before)}: too few questions to tell a difference from noise."
    return Verdict(methods, short, _domain(domain), _general(divergence, accuracy, before == "base"))


_AGAINST_BASE = {
    "more": "improved in the domain",
    "less": "got worse in the domain",
    "mixed": "improved in some respects in the domain and got worse in others",
    "noise": f"shows {NOISE} in the domain",
}
_AGAINST_OTHER = {
    "more": "and learned more of the domain",
    "less": "and learned less of the domain",
    "noise": f"with {NOISE} in the domain",
    "mixed": "and is better in some respects in the domain and worse in others",
}
_FORGOT = {
    -1: "forgot less than {other},",
    1: "forgot more than {other},",
    0: f"shows {NOISE} from {{other}} in forgetting,",
}
_ACCURACY = {
    -1: "answers fewer general prompts correctly",
    1: "answers more general prompts correctly",
    0: f"shows {NOISE} in accuracy on general prompts",
}


def paired(run: RunRecords, measure: Measure, before: str, after: str) -> Difference | None:
    """The paired difference of a score between two models; None if they have no scored questions in common."""
    earlier, later = (scores_of(run.models[name], measure) for name in (before, after))
    return difference([later[key] - earlier[key] for key in later if key in earlier], measure.scale)


def difference(values: list[float], scale: float = 1.0) -> Difference | None:
    """Mean of values and the half width of its 95 % interval by Student's t.

    Example:
      >>> change = difference([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
      >>> change.mean, round(change.half_width, 2)
      (4.5, 2.04)
    """
    if not values:
        return None
    half_width = None
    if len(values) >= FEWEST:
        half_width = scale * t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Difference(scale * fmean(values), half_width, len(values))


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, expanded around the normal one; within 0.5 % from 7 degrees of freedom."""
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def scores_of(model: ModelScores, measure: Measure) -> dict[str, float]:
    """The score of each answer that has one."""
    values = {answer.id: getattr(answer, measure.key) for answer in getattr(model, measure.part)}
    return {key: float(value) for key, value in values.items() if value is not None and math.isfinite(value)}


def _domain(changes: list[tuple[Measure, Difference]]) -> tuple[str, ...]:
    """Each measure with its change; measures without a significant change are joined at the end."""
    clear = [_change(measure, change) for measure, change in changes if change.sign]
    unclear = [f"{measure.name} {_interval(measure, change)}" for measure, change in changes if not change.sign]
    few = all(change.half_width is None for _, change in changes)
    return (*clear, *([f"{TOO_FEW if few else NOISE} in {_joined(unclear)}"] if unclear else []))


def _general(divergence: Difference, accuracy: Difference | None, against_base: bool) -> tuple[str, ...]:
    """The changes in divergence and accuracy on general prompts, against the base model or another method."""
    parts = []
    for measure, change in ((DIVERGENCE, divergence), (ACCURACY, accuracy)):
        if change is None:
            continue
        if change.sign:
            parts.append(_change(measure, change, "" if against_base and measure is DIVERGENCE else "+"))
        else:
            unclear = TOO_FEW if change.half_width is None else NOISE
            parts.append(f"{unclear} in {measure.name} {_interval(measure, change)}")
    return tuple(parts)


def _change(measure: Measure, change: Difference, sign: str = "+") -> str:
    return f"{measure.name} {change.mean:{sign}.{measure.digits}f}{measure.unit} {_interval(measure, change, sign)}"


def _interval(measure: Measure, change: Difference, sign: str = "+") -> str:
    unit = "" if change.sign else measure.unit
    if change.half_width is None:
        return f"({change.mean:{sign}.{measure.digits}f}{unit} over {change.count})"
    low, high = change.mean - change.half_width, change.mean + change.half_width
    return f"({low:{sign}.{measure.digits}f} to {high:{sign}.{measure.digits}f}{unit})"


def _joined(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
