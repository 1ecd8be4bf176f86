"""Statistics beside independent oracles: SciPy, brute force, simulation."""

import itertools
import math
import random
import statistics

import pytest

import figures
from figures import bootstrap_interval, difference_interval, mcnemar, pass_at_k, wilson_interval

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("n", [1, 7, 200, 1000])
def test_wilsons_interval_is_scipys(n):
    for successes in {0, 1, n // 3, n - 1, n}:
        told = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson_interval(successes, n) == pytest.approx((told.low, told.high), abs=1e-12)


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_ones(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(1, 2), (3, 10), (7.5, 10), (0, 1), (1, 1), (250, 500)])
def test_wilson_bounds_are_the_shares_that_the_score_test_just_accepts(successes, n):
    share = successes / n
    for bound in wilson_interval(successes, n):
        assert 0 <= bound <= 1
        assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), abs=1e-6)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        wilson_interval(0, 0)


def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one():
    for n, correct in [(5, 0), (5, 2), (6, 5), (4, 4)]:
        samples = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(samples, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="k must be between 1 and the 4 samples, got 5"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (3, 3), (2, 9), (30, 11), (0, 40)])
def test_mcnemar_is_the_binomial_test_of_what_changed(lost, won):
    before = [True] * lost + [False] * won + [True, False] * 5
    after = [False] * lost + [True] * won + [True, False] * 5
    expected = stats.binomtest(won, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(before, after) == pytest.approx(expected, abs=1e-12)


def planted(n, accuracy, gain, seed):
    """Verdicts of two models whose true accuracies differ by `gain`; most problems are alike for both."""
    dice = random.Random(seed)
    before = [dice.random() < accuracy for _ in range(n)]
    # Of what was right some is lost, of what was wrong a little more than that is won.
    lose = 0.1
    win = (gain + lose * accuracy) / (1 - accuracy)
    return before, [dice.random() < (1 - lose if right else win) for right in before]


def test_half_a_point_is_not_called_significant_and_twenty_are():
    half = [mcnemar(*planted(200, 0.5, 0.005, seed)) for seed in range(200)]
    # A test at 5 % may err one time in 20, and finds half a point hardly more often.
    assert sum(p < 0.05 for p in half) <= 20
    assert mcnemar(*planted(200, 0.5, 0.005, 0)) > 0.05
    assert all(mcnemar(*planted(200, 0.5, 0.2, seed)) < 0.05 for seed in range(50))
    low, high = difference_interval(*planted(200, 0.5, 0.2, 0))
    assert 0 < low < 0.2 < high


@pytest.mark.parametrize(("accuracy", "gain", "n"), [(0.5, 0.0, 200), (0.9, 0.02, 100), (0.3, 0.2, 50)])
def test_the_difference_lies_in_its_interval_as_often_as_it_says(accuracy, gain, n):
    inside = 0
    for seed in range(600):
        low, high = difference_interval(*planted(n, accuracy, gain, seed))
        inside += low <= gain <= high
    assert 0.93 <= inside / 600 <= 0.985


def test_the_bootstraps_interval_is_about_the_means():
    dice = random.Random(1)
    values = [dice.random() ** 2 for _ in range(400)]
    low, high = bootstrap_interval(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)


@pytest.mark.parametrize("function", [mcnemar, difference_interval])
def test_nothing_cannot_be_compared(function):
    with pytest.raises(ValueError, match="at least one"):
        function([], [])
    with pytest.raises(ValueError, match="zip"):
        function([True], [])
    with pytest.raises(ValueError, match="values must hold"):
        figures.bootstrap_interval([])
