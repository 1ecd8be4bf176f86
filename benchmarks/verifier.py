"""The judge of `rewards.verify` beside Math-Verify, on the
same pairs in one run: judgements a second, and right ones.

    python benchmarks/verifier.py                    # the table
    python benchmarks/verifier.py --json rows.jsonl  # {"case", "peer", "peer_value", "ours", "ratio", "unit"}

Every pair is new to the judge and no verdict is remembered: Math-Verify's own caches are emptied before each
repeat, ours has none. Pairs are made from a fixed seed; more than 30 % of them differ as strings, many of
these are equal in value. A ratio above 1 means that Ponder is better. Each side judges the same number of
pairs; the value is the median of the repeats, alternating between the two so that a busy machine troubles
both.
"""

import argparse
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import write_rows  # noqa: E402
from rewards.verify import is_correct  # noqa: E402 - the path has to be set first

Pair = tuple[str, str, bool]  # answer, gold, are they equal?


def number_pairs(count: int, seed: int) -> list[Pair]:
    """Short answers as to GSM8K, in the formats that models use, one in three of them wrong."""
    rng = random.Random(seed)
    formats = [
        str,
        str,
        str,
        lambda n: f"{n:,}",
        lambda n: f"${n}",
        lambda n: f"{n}.00",
        lambda n: f"{n} apples",
        lambda n: f"{n}.",
    ]
    pairs = []
    for _ in range(count):
        gold = rng.choice([rng.randint(1, 99), rng.randint(100, 9999), rng.randint(10_000, 2_000_000)])
        equal = rng.random() < 2 / 3
        answer = gold if equal else gold + rng.choice([-10, -1, 1, 10, 100])
        pairs.append((rng.choice(formats)(answer), str(gold), equal))
    return pairs


def latex_pairs(count: int, seed: int) -> list[Pair]:
    """Short answers as to MATH: fractions, roots, multiples of pi, tuples, intervals, polynomials, sets."""
    rng = random.Random(seed)
    return [rng.choice(_KINDS)(rng) for _ in range(count)]


def _fraction(rng: random.Random) -> Pair:
    a, b, k = rng.randint(1, 40), rng.randint(2, 40), rng.randint(1, 3)
    wrong = rng.random() < 1 / 3
    answer = rf"\frac{{{a * k + wrong}}}{{{b * k}}}"
    gold = rng.choice([rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a}}}{{{b}}}", f"{a}/{b}"])
    return answer, gold, not wrong


def _root(rng: random.Random) -> Pair:
    outside, inside = rng.randint(2, 9), rng.choice([2, 3, 5, 6, 7])
    wrong = rng.random() < 1 / 3
    answer = rng.choice(
        [rf"{outside + wrong}\sqrt{{{inside}}}", rf"\sqrt{{{(outside + wrong) ** 2 * inside}}}"]
    )
    return answer, rf"{outside}\sqrt{{{inside}}}", not wrong


def _pi(rng: random.Random) -> Pair:
    a, b = rng.randint(1, 20), rng.choice([2, 3, 4, 6, 7])
    wrong = rng.random() < 1 / 3
    answer = rng.choice([rf"\frac{{{a}\pi}}{{{b + wrong}}}", rf"\frac{{{a}}}{{{b + wrong}}}\pi"])
    return answer, rf"\frac{{{a}\pi}}{{{b}}}", not wrong


def _tuple(rng: random.Random) -> Pair:
    a, b = rng.randint(-9, 9), rng.randint(1, 9)
    wrong = rng.random() < 1 / 3
    answer = rng.choice([f"({a},{b + wrong})", rf"\left({a}, {b + wrong}\right)"])
    return answer, f"({a}, {b})", not wrong


def _interval(rng: random.Random) -> Pair:
    a, b = rng.randint(-9, 0), rng.randint(1, 9)
    wrong = rng.random() < 1 / 3
    return f"[{a},{b + wrong})", f"[{a}, {b})", not wrong


def _polynomial(rng: random.Random) -> Pair:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    wrong = rng.random() < 1 / 3
    answer = rng.choice([f"x^2+{a + b}x+{a * b + wrong}", f"{a * b + wrong}+{a + b}x+x^2"])
    return answer, rng.choice([f"(x+{a})(x+{b})", f"x^2 + {a + b}x + {a * b}"]), not wrong


def _set(rng: random.Random) -> Pair:
    a, b = rng.sample(range(-9, 10), 2)
    wrong = rng.random() < 1 / 3
    return rf"\{{{a},{b + 20 * wrong}\}}", rng.choice([rf"\{{{b}, {a}\}}", rf"\{{{a}, {b}\}}"]), not wrong


_KINDS: list[Callable[[random.Random], Pair]] = [
    _fraction,
    _fraction,
    _root,
    _pi,
    _tuple,
    _interval,
    _polynomial,
    _set,
]


def ours(pairs: list[Pair]) -> tuple[list[bool], list[float]]:
    """Verdicts and seconds of each judgement, extraction included."""
    verdicts, seconds = [], []
    for answer, gold, _ in pairs:
        completion = f"<think>First we add, then we divide.</think><answer>{answer}</answer>"
        start = time.perf_counter()
        verdicts.append(is_correct(completion, gold))
        seconds.append(time.perf_counter() - start)
    return verdicts, seconds


def math_verify(pairs: list[Pair]) -> tuple[list[bool], list[float]]:
    """The same by Math-Verify, as its documentation uses it:
    both sides as the LaTeX that it reads best, no thought.
    """
    from math_verify import parse, verify
    from math_verify import parser as peer_parser

    for name in ("parse_latex_cached", "parse_expr_cached", "extract_latex"):  # not its compiled patterns
        getattr(peer_parser, name).cache_clear()
    verdicts, seconds = [], []
    for answer, gold, _ in pairs:
        completion = f"The answer is \\boxed{{{answer}}}"
        start = time.perf_counter()
        verdicts.append(bool(verify(parse(f"${gold}$"), parse(completion))))
        seconds.append(time.perf_counter() - start)
    return verdicts, seconds


def measure(name: str, make: Callable[[int, int], list[Pair]], count: int, repeats: int) -> list[dict]:
    """Rows for one kind of pairs."""
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    right: dict[str, list[float]] = {"ours": [], "peer": []}
    slowest: list[float] = []
    slowest_peer: list[float] = []
    unequal_strings = 0.0
    for repeat in range(repeats):
        pairs = make(count, repeat)
        unequal_strings += sum(answer != gold for answer, gold, _ in pairs) / count / repeats
        for side, judge_all in (("ours", ours), ("peer", math_verify)):
            verdicts, seconds = judge_all(pairs)
            rates[side].append(count / sum(seconds))
            right[side].append(
                statistics.fmean(v == equal for v, (_, _, equal) in zip(verdicts, pairs, strict=True))
            )
            (slowest if side == "ours" else slowest_peer).append(
                statistics.quantiles(seconds, n=100)[98] * 1000
            )
    print(f"{name}: {count} pairs x {repeats} repeats, {unequal_strings:.0%} of them unequal as strings")

    def row(
        case: str, mine: list[float], peer: list[float], unit: str, lower_is_better: bool = False
    ) -> dict:
        a, b = statistics.median(mine), statistics.median(peer)
        ratio = b / a if lower_is_better else a / b
        return {
            "case": f"{name}: {case}",
            "peer": "math-verify",
            "peer_value": b,
            "ours": a,
            "ratio": ratio,
            "unit": unit,
        }

    return [
        row("judgements a second", rates["ours"], rates["peer"], "1/s"),
        row("right verdicts", right["ours"], right["peer"], "share"),
        row("99th percentile", slowest, slowest_peer, "ms", lower_is_better=True),
    ]


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write a row a line to this file")
    parser.add_argument("--count", type=int, default=400, help="pairs in a repeat")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    logging.disable()
    (
        ours(number_pairs(50, 99)),
        math_verify(latex_pairs(50, 99)),
        ours(latex_pairs(50, 99)),
    )  # imports and first calls
    rows = measure("numbers", number_pairs, arguments.count, arguments.repeats)
    rows += measure("short LaTeX", latex_pairs, arguments.count, arguments.repeats)
    print(f"\n{'case':36}{'math-verify':>14}{'ponder':>12}{'ratio':>9}  unit")
    for row in rows:
        print(
            f"{row['case']:36}{row['peer_value']:14.4g}{row['ours']:12.4g}{row['ratio']:9.2f}  {row['unit']}"
        )
    write_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
