"""What an evaluation says of a model, and how sure it can be: shares, intervals, comparisons.

Pure functions of counts and verdicts. A problem is what is drawn at random, so an interval counts problems;
several samples of one are not independent.
"""

import math
import random
import statistics
from collections.abc import Sequence

Z95 = statistics.NormalDist().inv_cdf(0.975)
BOOTSTRAPS = 2000


def wilson_interval(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that at least one of k samples is right, unbiased, from `correct` right ones among n.

    Source: Chen et al. 2021, arXiv 2107.03374, eq. 1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} samples, got {k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean over problems, by drawing them with replacement: for figures that are no
    shares of right answers, such as pass@k.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife" (percentiles).
    """
    if not values:
        raise ValueError("values must hold at least one problem's figure, got none")
    dice, n = random.Random(seed), len(values)
    means = sorted(sum(dice.choices(values, k=n)) / n for _ in range(BOOTSTRAPS))
    low, high = round(0.025 * BOOTSTRAPS), round(0.975 * BOOTSTRAPS) - 1
    return means[low], means[high]


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """The chance of a difference at least as large between two models of equal accuracy on the same problems.

    Exact: of the problems that only one of them solves, each is either's with probability one half.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions".
    """
    lost, won = _changes(before, after)
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    return min(1.0, 2 * tail)


def difference_interval(before: Sequence[bool], after: Sequence[bool], z: float = Z95) -> tuple[float, float]:
    """The 95 % interval of the difference of two models' accuracy on the same problems, after less before.

    Source: Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions":
    half a problem is added to each of the four outcomes.
    """
    lost, won = _changes(before, after)
    n = len(before) + 2
    lost, won = lost + 0.5, won + 0.5
    centre = (won - lost) / n
    half = z * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    return max(-1.0, centre - half), min(1.0, centre + half)


def _changes(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """Problems that only `before` solved, and that only `after` did."""
    pairs = list(zip(before, after, strict=True))
    if not pairs:
        raise ValueError("before and after must hold at least one problem's verdict, got none")
    return sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)
