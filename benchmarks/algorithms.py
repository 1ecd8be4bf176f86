"""Every preset on the built-in task, from the same cold
start, for the same number of completions to learn from.

    pip install -r requirements-benchmarks.txt
    python benchmarks/algorithms.py --output outputs/benchmark              # the table and algorithms.svg
    python benchmarks/algorithms.py --seeds 0 --steps 20 --algos grpo ppo   # a quick look

For each seed one cold start (`train_sft.py` as it is), then every preset from it with its own knobs, without
a KL, at a learning rate divided by its updates a rollout. Accuracy is strict, on test problems, greedy and
sampled. A run that is finished is not run again: the command goes on where it was stopped. `sampled` counts
all completions, those that dynamic sampling threw away included.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate  # noqa: E402 - the path has to be set first
import train_grpo  # noqa: E402
import train_sft  # noqa: E402

LEARNING_RATE = 4e-4
# Fewer steps than the demo's do: the gain is made in the first of them.
STEPS = 40


def run(algo: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one preset from the seed's cold start, unless that is done, and evaluate both."""
    root = Path(args.output)
    sft = train_sft.SFTConfig(output=str(root / f"sft-{seed}"), seed=seed)
    check(train_sft.main(sft))
    updates = train_grpo.PRESETS[algo]["updates_per_rollout"]
    config = train_grpo.GRPOConfig(
        algo=algo,
        model=f"{sft.output}/final",
        output=str(root / f"{algo}-{seed}"),
        seed=seed,
        total_steps=args.steps,
        kl_coef=0.0,
        learning_rate=LEARNING_RATE / updates,
        eval_every=10,
        eval_limit=200,
    )
    check(train_grpo.main(config))
    measured = examine(Path(config.output), baseline=config.model, limit=args.limit, samples=1)
    steps = _read_lines(Path(config.output) / "metrics.jsonl")
    return {
        "algo": algo,
        "seed": seed,
        "before": measured["baseline"]["accuracy_strict"],
        "after": measured["accuracy_strict"],
        "before_sampled": measured["baseline"]["accuracy_sampled"],
        "after_sampled": measured["accuracy_sampled"],
        "sampled": sum(step["rollout/completions"] for step in steps),
        "seconds": sum(step["time/generate_s"] + step["time/update_s"] for step in steps),
        "curve": [
            (row["step"], row["accuracy_strict"])
            for row in _read_lines(Path(config.output) / "eval.jsonl")
            if row["set"] == "validation"
        ],
    }


def check(code: int) -> None:
    """End as a training or an evaluation did, unless it went well."""
    if code:
        raise SystemExit(code)


def examine(folder: Path, **how: Any) -> dict[str, Any]:
    """The figures of a run's final model; what it answered before is not asked again.

    Args:
        folder: of the run.
        how: of `EvaluateConfig`.
    """
    output = folder / "evaluation"
    check(evaluate.main(evaluate.EvaluateConfig(model=f"{folder}/final", output=str(output), **how)))
    return json.loads((output / "report.json").read_text())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a preset, the mean over seeds and the smallest gain."""
    lines = [
        "| Preset | Greedy, before | after | least gain | Sampled, before | after | Completions | Seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for algo in dict.fromkeys(row["algo"] for row in rows):
        mine = [row for row in rows if row["algo"] == algo]

        def mean(key: str, mine: list[dict[str, Any]] = mine) -> float:
            return statistics.mean(row[key] for row in mine)

        least = min(row["after"] - row["before"] for row in mine)
        lines.append(
            f"| `{algo}` | {mean('before'):.1%} | {mean('after'):.1%} | {100 * least:+.1f} points | "
            f"{mean('before_sampled'):.1%} | {mean('after_sampled'):.1%} | {mean('sampled'):,.0f} | "
            f"{mean('seconds'):.0f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Validation accuracy over steps, a line a preset, the mean over seeds."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for algo in dict.fromkeys(row["algo"] for row in rows):
        curves = [dict(row["curve"]) for row in rows if row["algo"] == algo]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [100 * statistics.mean(curve[step] for curve in curves) for step in steps]
        axes.plot(steps, means, label=algo, marker="o", markersize=3)
    axes.set(xlabel="steps of 32 x 8 completions", ylabel="validation accuracy, greedy, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, frameon=False)
    figure.savefig(file, metadata={"Date": None})


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Run what is missing, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", default="outputs/benchmark")
    parser.add_argument(
        "--algos", nargs="+", choices=list(train_grpo.PRESETS), default=list(train_grpo.PRESETS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--limit", type=int, default=500, help="test problems")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args()
    import matplotlib  # before anything is measured, for it may be missing

    matplotlib.use("svg")
    rows = [run(algo, seed, args) for seed in args.seeds for algo in args.algos]
    print(table(rows))
    plot(rows, Path(args.output) / "algorithms.svg")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
