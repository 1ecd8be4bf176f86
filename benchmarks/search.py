"""Accuracy against tokens of every way to search, on a task's test problems.

    pip install -r requirements-benchmarks.txt
    python benchmarks/search.py --model outputs/search/checkpoints/step-000010 --plot docs/search.png

Each problem is a search of its own, judged as `evaluate.py` judges. Tokens are the mean a problem, all that
were sampled. Methods that sample see the same samples: four of them are the first four of eight. Accuracy is
strict, with its 95 % interval, and beside it the difference to a single sample.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402 - the path has to be set first

from benchmarks.results import require_matplotlib, write_rows  # noqa: E402
from data import Problem, load_problems  # noqa: E402
from exam import wilson_interval  # noqa: E402
from inference import Completion, SamplingParams  # noqa: E402
from inference.chat import load_chat_model  # noqa: E402
from inference.search import (  # noqa: E402
    Candidate,
    Query,
    Question,
    SearchResult,
    beam_search,
    best_of_n,
    budget,
    majority_vote,
    mean_logprob,
    self_certainty,
    self_correct,
)
from rewards import judge_problem  # noqa: E402
from rewards.verify import final_answer  # noqa: E402

SAMPLES = (2, 4, 8, 16)
_SUM = re.compile(r"(\d+) \+ (\d+) = (\d+)")


def sums_that_hold(question: Question, candidates: Sequence[Candidate]) -> list[int]:
    """A rule for sums, which knows no answer: true lines of the thought less false ones."""
    lines = [_SUM.findall(candidate.reasoning or "") for candidate in candidates]
    return [sum(1 if int(a) + int(b) == int(c) else -1 for a, b, c in sums) for sums in lines]


def likelihood(question: Question, candidates: Sequence[Candidate]) -> list[float]:
    """A weight for votes: the geometric mean of the tokens' probabilities."""
    return [math.exp(value) for value in mean_logprob(question, candidates)]


def greedy(query: Query, _: int) -> SearchResult:
    """The likeliest token each time."""
    return best_of_n(replace(query, params=replace(query.params, temperature=0.0)), 1)


# A method's name, the sizes it is run at, and what is run.
METHODS: dict[str, tuple[Sequence[int], Callable[[Query, int], SearchResult]]] = {
    "single sample": ((1,), best_of_n),
    "greedy": ((1,), greedy),
    "majority vote": (SAMPLES, majority_vote),
    "vote weighted by likelihood": (
        SAMPLES,
        lambda query, n: majority_vote(query, n, weight=likelihood),
    ),
    "best of n by mean log-probability": (SAMPLES, best_of_n),
    "best of n by self-certainty": (SAMPLES, lambda query, n: best_of_n(query, n, self_certainty)),
    "best of n by a rule": (SAMPLES, lambda query, n: best_of_n(query, n, sums_that_hold)),
    "beam search": ((2, 4, 8), beam_search),
    "self-correction": ((1,), lambda query, _: self_correct(query)),
    "thinking budget": ((8, 16, 20, 24), budget),
    "thinking on after Wait": ((1,), lambda query, n: budget(query, waits=n)),
}


class Remembering:
    """An engine that samples no completion twice; which ones a prompt has does not depend on how many."""

    def __init__(self, engine: Any) -> None:
        """`engine` does the work."""
        self.stream, self.branch = engine.stream, engine.branch
        self._engine, self._known = engine, {}

    def generate(
        self, prompts: list[list[int]], n: int, params: SamplingParams, seed: Sequence[int]
    ) -> list[list[Completion]]:
        """As `Engine.generate`, of one prompt."""
        key = (tuple(prompts[0]), params, tuple(seed))
        if len(self._known.get(key, ())) < n:
            [self._known[key]] = self._engine.generate(
                prompts, max(n, *SAMPLES) if n > 1 else 1, params, seed
            )
        return [self._known[key][:n]]


def measure(method: str, size: int, queries: Sequence[Query], problems: Sequence[Problem]) -> dict[str, Any]:
    """Accuracy and tokens of a method at a size."""
    _, search = METHODS[method]
    results = [search(query, size) for query in tqdm(queries, desc=f"{method} {size}", leave=False)]
    right = [
        bool(judge_problem(result.best.text, problem.gold, problem.columns).correct)
        for result, problem in zip(results, problems, strict=True)
    ]
    accuracy = fmean(right)
    return {
        "method": method,
        "size": size,
        "n": len(problems),
        "accuracy": accuracy,
        "ci95": wilson_interval(sum(right), len(right)),
        "tokens": fmean(result.tokens for result in results),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over tokens, a line a method."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [row for row in rows if row["method"] == method]
        values = [100 * row["accuracy"] for row in points]
        style = {"marker": "osD^v<>PX*d"[number], "markersize": 5, "linewidth": 1.2}
        axis.plot([row["tokens"] for row in points], values, label=method, **style)
    axis.set(xlabel="tokens a problem", ylabel="accuracy, %", ylim=(0, 100))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model folder or a Hub name")
    parser.add_argument("--data", default="arithmetic")
    parser.add_argument("--limit", type=int, default=500, help="test problems")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--max_completion_tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write a row a line to this file")
    parser.add_argument("--plot", type=Path, help="draw to this file")
    arguments = parser.parse_args()
    require_matplotlib(arguments.plot)
    model = load_chat_model(arguments.model)
    engine, params = Remembering(model.engine), SamplingParams(arguments.max_completion_tokens)
    problems = load_problems(arguments.data, "test", limit=arguments.limit)
    queries = [
        Query(engine, model.tokenizer, problem.question, params, (arguments.seed, number), final_answer)
        for number, problem in enumerate(problems)
    ]
    single = measure("single sample", 1, queries, problems)
    print("| Method | Size | Accuracy | 95 % interval | over a single sample | Tokens a problem |")
    print("|---|---|---|---|---|---|")
    rows = []
    for method in arguments.methods:
        for size in METHODS[method][0]:
            row = measure(method, size, queries, problems)
            low, high = row["ci95"]
            gain = 100 * (row["accuracy"] - single["accuracy"])
            figures = (
                f"{row['accuracy']:.1%} | {low:.1%} to {high:.1%} | {gain:+.1f} points | {row['tokens']:.0f}"
            )
            print(f"| {method} | {size} | {figures} |", flush=True)
            rows.append(row)
    write_rows(rows, arguments.json)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
