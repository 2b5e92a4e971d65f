"""Statistics for comparisons: coverage by simulation, frontiers worked by hand, the paper's own ratios."""

from __future__ import annotations

import numpy as np
import pytest

from raft_jax.evaluate.statistics import (
    Points,
    equal_domain_difference,
    frontier,
    frontier_area,
    gained_and_lost,
    general_at,
    paired_interval,
    relative_change,
    retention,
)


@pytest.mark.parametrize(
    ("num_seeds", "num_questions", "seed_effect", "question_effect", "noise", "least"),
    [
        (1, 40, 0.0, 1.0, 0.0, 0.92),
        (3, 60, 1.0, 1.0, 0.5, 0.87),
        (5, 30, 0.5, 1.0, 1.0, 0.92),
        (3, 200, 0.1, 1.0, 0.0, 0.92),
    ],
)
def test_intervals_cover_the_true_difference(num_seeds, num_questions, seed_effect, question_effect, noise, least):
    """Of 400 95 % intervals over made-up scores, as many as the docstring says (standard error 1.1 to 1.6 %)."""
    random = np.random.default_rng(0)
    covered, widths, count, true = 0, [], 400, 0.3
    for _ in range(count):
        before = random.normal(size=(num_seeds, num_questions))
        difference = (
            true
            + seed_effect * random.normal(size=(num_seeds, 1))
            + question_effect * random.normal(size=(1, num_questions))
            + noise * random.normal(size=(num_seeds, num_questions))
        )
        found = paired_interval(before, before + difference, num_resamples=400)
        covered += found.low <= true <= found.high
        widths.append(found.high - found.low)
    assert least <= covered / count <= 0.99
    if num_seeds == 1:  # and they are no wider than the interval of known variance
        assert np.mean(widths) == pytest.approx(2 * 1.96 * question_effect / num_questions**0.5, rel=0.08)


def test_questions_that_move_together_are_not_counted_twice():
    """The same questions under four seeds that change nothing are no more evidence than under one."""
    random = np.random.default_rng(1)
    before, after = random.normal(size=(2, 50))
    one = paired_interval(before, after)
    four = paired_interval(np.tile(before, (4, 1)), np.tile(after, (4, 1)))
    assert one.estimate == pytest.approx(np.mean(after - before)) == pytest.approx(four.estimate)
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.05)
    paired_again = paired_interval(before, after)
    assert paired_again == one  # the seed is fixed
    assert paired_interval([1.0, 2.0], [2.0, 3.0]) == (1, 1, 1)  # no question says anything else


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [([1.0], [1.0], "2 or more"), ([1.0, np.nan], [1.0, 2.0], "not finite"), ([[[1.0]]], [1.0, 2.0], r"\[S, Q\]")],
)
def test_scores_without_an_interval_are_refused(before, after, words):
    with pytest.raises(ValueError, match=words):
        paired_interval(before, after)


def test_the_frontier_has_no_dominated_point():
    random = np.random.default_rng(2)
    for _ in range(50):
        domain, general = random.integers(0, 6, (2, 8)).astype(float)
        points = set(zip(domain, general, strict=True))
        expected = sorted(
            point
            for point in points
            if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
        )
        found = list(zip(*map(np.ndarray.tolist, frontier(domain, general)), strict=True))
        assert found == expected


DOMAIN, GENERAL = [10.0, 12.0, 14.0, 13.0, 16.0], [60.0, 58.0, 50.0, 49.0, 30.0]


@pytest.mark.parametrize(
    ("target", "expected"), [(9, 60), (10, 60), (11, 59), (12, 58), (13, 54), (15, 40), (16, 30), (16.1, np.nan)]
)
def test_general_scores_at_equal_domain_quality(target, expected):
    assert general_at(DOMAIN, GENERAL, target) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("domain_range", "floor", "expected"),
    [
        ((10, 16), 0, (118 + 108 + 80) / 6),  # three trapezoids of width 2: 2·59, 2·54, 2·40
        ((10, 20), 0, (118 + 108 + 80) / 10),
        ((10, 20), 30, (118 + 108 + 80 + 120) / 10),
        ((8, 10), 0, 60),
        ((11, 13), 0, (58.5 + 56) / 2),
        ((17, 19), 5, 5),
        ((15, 17), 10, (35 + 10) / 2),
    ],
)
def test_the_area_under_the_frontier(domain_range, floor, expected):
    assert frontier_area(DOMAIN, GENERAL, domain_range=domain_range, floor=floor) == pytest.approx(expected)
    # Against a sum over a fine grid of the definition.
    grid = np.linspace(*domain_range, 20_001)
    values = [general_at(DOMAIN, GENERAL, place) for place in grid]
    mean = np.mean(np.nan_to_num(values, nan=floor))
    assert frontier_area(DOMAIN, GENERAL, domain_range=domain_range, floor=floor) == pytest.approx(mean, rel=1e-3)


def test_areas_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="increasing pair"):
        frontier_area(DOMAIN, GENERAL, domain_range=(2, 2), floor=0)
    with pytest.raises(ValueError, match="above a general score"):
        frontier_area(DOMAIN, GENERAL, domain_range=(2, 3), floor=31)
    with pytest.raises(ValueError, match="shapes"):
        frontier([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="not finite"):
        frontier([1.0, 2.0], [1.0, np.inf])


def test_methods_are_compared_at_equal_domain_quality():
    """Two methods whose frontiers are known: at the same domain score the second keeps 0.1 more."""
    covered, count = 0, 60
    for trial in range(count):
        random = np.random.default_rng(trial)
        difficulty, hardness = random.normal(size=60), random.normal(size=80)

        def points(kept: float, random=random, difficulty=difficulty, hardness=hardness) -> Points:
            domain = np.array([0.0, 1.0, 2.0])[:, None, None] + 0.3 * difficulty + 0.1 * random.normal(size=(3, 2, 60))
            general = -kept * np.array([0.0, 1.0, 2.0])[:, None, None] + 0.3 * hardness
            return Points(domain, general + 0.1 * random.normal(size=(3, 2, 80)))

        found = equal_domain_difference(points(0.3), points(0.2), 1.0, num_resamples=200)
        assert found.reached > 0.9 and found.interval.estimate == pytest.approx(0.1, abs=0.08)
        covered += found.interval.low <= 0.1 <= found.interval.high
    assert covered / count >= 0.88
    far = equal_domain_difference(points(0.3), points(0.2), 9.0, num_resamples=50)
    assert far.reached == 0 and np.isnan(far.interval.estimate)


# The paper's table: SmolLM3-3B, Llama-3.2-3B-Instruct, Phi-4-mini-instruct.
PAPER = {
    "base": {"D-Acc": (10.6, 7.3, 11.6), "MS-Bench": (68.0, 46.0, 52.5), "IFEval": (31.2, 51.2, 55.5)},
    "SFT": {"D-Acc": (12.8, 15.1, 17.1), "MS-Bench": (61.5, 36.8, 31.5), "IFEval": (24.9, 49.9, 53.4)},
    "RAFT": {"D-Acc": (17.2, 16.5, 21.6), "MS-Bench": (66.8, 40.1, 43.2), "IFEval": (31.4, 51.6, 53.9)},
}


def test_the_papers_averages_come_out():
    """To the tenth of a percent that the rounded scores allow."""
    for benchmark, reported in {"D-Acc": 0.232, "MS-Bench": 0.182, "IFEval": 0.102}.items():
        assert relative_change(PAPER["RAFT"][benchmark], PAPER["SFT"][benchmark]) == pytest.approx(reported, abs=2e-3)
    for method, benchmark, reported in (
        ("SFT", "MS-Bench", 0.768),
        ("RAFT", "MS-Bench", 0.892),
        ("SFT", "IFEval", 0.912),
        ("RAFT", "IFEval", 0.995),
    ):
        assert retention(PAPER[method][benchmark], PAPER["base"][benchmark]) == pytest.approx(reported, abs=6e-4)
    with pytest.raises(ValueError, match="0 or less"):
        retention([1.0], [0.0])
    with pytest.raises(ValueError, match="one each"):
        relative_change([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    # Worked by hand: twice the binomial tail at 1/2, at most 1.
    [(0, 0, 1.0), (1, 0, 1.0), (5, 1, 2 * 7 / 64), (9, 1, 2 * 11 / 1024), (4, 4, 1.0), (0, 8, 2 / 256)],
)
def test_answers_gained_and_lost(gained, lost, p_value):
    before = [False] * gained + [True] * lost + [True, False] * 3
    after = [True] * gained + [False] * lost + [True, False] * 3
    assert gained_and_lost(before, after) == (gained, lost, pytest.approx(p_value))
