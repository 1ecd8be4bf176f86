"""Accuracy against the number of worked examples of the cold start, and of prompts of reinforcement learning.

    pip install -r requirements-benchmarks.txt
    python benchmarks/samples.py --plot docs/samples.png           # goes on where it was stopped
    python benchmarks/samples.py --seeds 0 --output outputs/look   # a third of it

Every cold start takes the same number of steps, and so does every reinforcement learning: only the number of
different examples, or prompts, that the steps draw from differs. The first curve trains a cold start for each
number of examples and goes on from it with all prompts; the second goes on from the cold start of all
examples with fewer prompts. A row of `--json` is a pair of trainings: `peer_value` is the cold start's greedy
strict accuracy on test problems, `ours` that after reinforcement learning, each with Wilson's 95 % interval.
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_grpo  # noqa: E402 - the path has to be set first
import train_sft  # noqa: E402
from benchmarks.algorithms import check, examine  # noqa: E402
from benchmarks.results import require_matplotlib, write_rows  # noqa: E402

EXAMPLES = (100, 500, 1_000, 5_000, 30_000)
# All prompts are as many as the steps draw; these are fewer.
FEW_PROMPTS = (10, 50, 200)
PROMPTS_PER_STEP = 32
COMPLETION_TOKENS = 64  # for training and examination
SAMPLES = 8  # of a cold start

# The two curves: what their numbers count.
OF_EXAMPLES, OF_PROMPTS = "worked examples", "prompts"
# The two sides of a row: the key of its accuracy, its name, its colour.
SIDES = {"peer": ("peer_value", "cold start", "#8b949e"), "ours": ("ours", "after GRPO", "#1f6feb")}


def cold_start(examples: int, seed: int, arguments: argparse.Namespace) -> Path:
    """The folder of a supervised training on so many examples, which is run unless it is there."""
    folder = arguments.output / f"sft-{examples}-{seed}"
    config = train_sft.SFTConfig(
        output=str(folder), seed=seed, limit=examples, total_steps=arguments.cold_steps, eval_every=0
    )
    check(train_sft.main(config))
    return folder


def reinforce(start: Path, prompts: int, seed: int, arguments: argparse.Namespace) -> Path:
    """The folder of a reinforcement learning on so many prompts, which is run unless it is there."""
    folder = arguments.output / f"{start.name.replace('sft', 'grpo')}-{prompts}"
    config = train_grpo.GRPOConfig(
        model=str(start / "final"),
        output=str(folder),
        seed=seed,
        limit=prompts,
        total_steps=arguments.steps,
        prompts_per_step=PROMPTS_PER_STEP,
        max_completion_tokens=COMPLETION_TOKENS,
        kl_coef=0.0,
        eval_every=0,
    )
    check(train_grpo.main(config))
    return folder


def measure(curve: str, number: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A point of a curve for a seed: the cold start, and what reinforcement learning makes of it."""
    every_prompt = arguments.steps * PROMPTS_PER_STEP
    examples, prompts = (number, every_prompt) if curve == OF_EXAMPLES else (EXAMPLES[-1], number)
    ask = {"limit": arguments.limit, "max_completion_tokens": COMPLETION_TOKENS}
    start = cold_start(examples, seed, arguments)
    before = examine(start, samples=SAMPLES, **ask)
    after = examine(reinforce(start, prompts, seed, arguments), **ask)
    value, peer_value = after["accuracy_strict"], before["accuracy_strict"]
    return {
        "case": f"{number} {curve}, seed {seed}",
        "peer": "cold start",
        "peer_value": peer_value,
        "ours": value,
        "ratio": value / peer_value if peer_value else None,
        "unit": "greedy strict accuracy",
        "curve": curve,
        "number": number,
        "seed": seed,
        "peer_ci95": before["ci95"],
        "peer_sampled": before["accuracy_sampled"],
        "peer_pass_at_8": before["pass_at_k"],
        "ours_ci95": after["ci95"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each number of a curve and side, a column a seed."""
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for curve in (OF_EXAMPLES, OF_PROMPTS):
        header = [curve.capitalize(), "", *(f"Seed {seed}" for seed in seeds), "Mean", f"pass@{SAMPLES}"]
        lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for number, points in points_of(curve, rows).items():
            if curve == OF_EXAMPLES:
                lines.append(_line(number, "peer", points))
            elif number == FEW_PROMPTS[0]:  # one cold start a seed, where this curve begins
                lines.append(_line(0, "peer", points))
            lines.append(_line(number, "ours", points))
    return "\n".join(lines[1:])


def _line(number: int, side: str, points: list[dict[str, Any]]) -> str:
    values = [point[SIDES[side][0]] for point in points]
    cells = [
        "{:.1%} ({:.1%}–{:.1%})".format(value, *point[f"{side}_ci95"])
        for value, point in zip(values, points, strict=True)
    ]
    passes = f"{fmean(point['peer_pass_at_8'] for point in points):.1%}" if side == "peer" else ""
    return f"| {number:,} | {SIDES[side][1]} | {' | '.join(cells)} | {fmean(values):.1%} | {passes} |"


def points_of(curve: str, rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The rows of a curve by their number, each in the order of the seeds."""
    mine = sorted(
        (row for row in rows if row["curve"] == curve), key=lambda row: (row["number"], row["seed"])
    )
    return {number: list(of_number) for number, of_number in groupby(mine, key=lambda row: row["number"])}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Both curves: every seed with its interval, a line through the means."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, curve in zip(axes, (OF_EXAMPLES, OF_PROMPTS), strict=True):
        points = points_of(curve, rows)
        for side, (key, label, colour) in SIDES.items():
            means = [100 * fmean(row[key] for row in of_number) for of_number in points.values()]
            axis.plot(list(points), means, color=colour, label=label)
            for row in (row for of_number in points.values() for row in of_number):
                value, (low, high) = row[key], row[f"{side}_ci95"]
                # Seeds beside each other, or their intervals would hide one another.
                place = row["number"] * 1.08 ** (row["seed"] - 1)
                spread = [[100 * (value - low)], [100 * (high - value)]]
                axis.errorbar(place, 100 * value, spread, fmt="o", markersize=3.5, linewidth=1, color=colour)
        axis.set_xscale("log")
        axis.set_xticks(list(points), [f"{number:,}" for number in points])
        axis.minorticks_off()
        axis.set(xlabel=f"{curve} of {'the cold start' if curve == OF_EXAMPLES else 'GRPO'}", ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("greedy strict accuracy, %")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, print the tables, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/samples"), help="the trainings' folder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cold_steps", type=int, default=500, help="of every cold start")
    parser.add_argument("--steps", type=int, default=50, help="of every reinforcement learning")
    parser.add_argument("--limit", type=int, default=1_000, help="test problems")
    parser.add_argument("--json", type=Path, help="write a row a line to this file")
    parser.add_argument("--plot", type=Path, help="draw to this file")
    arguments = parser.parse_args()
    require_matplotlib(arguments.plot)
    every_prompt = arguments.steps * PROMPTS_PER_STEP
    points = [(OF_EXAMPLES, number) for number in reversed(EXAMPLES)]
    points += [(OF_PROMPTS, number) for number in FEW_PROMPTS if number < every_prompt]
    points += [(OF_PROMPTS, every_prompt)]
    rows = [measure(*point, seed, arguments) for seed in arguments.seeds for point in points]
    print(table(rows))
    write_rows(rows, arguments.json)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
