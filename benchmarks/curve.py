"""Draw a run: accuracy of the samples, entropy, groups without signal and length over the steps.

pip install -r requirements-benchmarks.txt
python benchmarks/curve.py outputs/demo-seed0/grpo --plot docs/curve.png
"""

import argparse
import json
from pathlib import Path

CURVES = {
    "train/accuracy": "accuracy of the samples",
    "policy/entropy": "entropy, nats a token",
    "rollout/zero_variance_groups": "groups without signal",
    "rollout/completion_tokens": "tokens a completion",
}


def main() -> None:
    """Read the metrics, draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--plot", type=Path, required=True, help="draw to this file")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = (arguments.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(3.2 * len(CURVES), 2.6), layout="tight")
    for axis, (key, label) in zip(axes, CURVES.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row[key] for row in rows], color="#1f6feb", linewidth=1.2)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(arguments.plot, dpi=110)


if __name__ == "__main__":
    main()
