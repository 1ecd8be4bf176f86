"""How the cost of sampling grows: tokens a second and memory, one size varied at a time, on the tiny model.

    pip install -r requirements-benchmarks.txt
    python benchmarks/growth.py --plot docs/growth.png
    python benchmarks/growth.py --sizes "prompt tokens" --repeats 3 --json rows.jsonl

Every point is a process of its own: seconds are the median of the repeats after a first call, memory is the
process' highest resident size less what it was before the first call. Where nothing is said, 8 prompts of
32 tokens have 8 completions of 64 tokens each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import require_matplotlib, write_rows  # noqa: E402

BASE = {"prompts": 8, "group": 8, "prompt_tokens": 32, "completion_tokens": 64}
# The name of a size, what varies, its values, and what is held beside it.
SIZES: dict[str, tuple[str, list[int], dict[str, int]]] = {
    "rows": ("prompts", [1, 4, 16, 64, 128, 256, 512], {"group": 1}),
    "completion tokens": ("completion_tokens", [64, 256, 1024, 4096], {"prompts": 2}),
    "group size": ("group", [1, 4, 16, 64], {"prompts": 4}),
    "prompt tokens": ("prompt_tokens", [16, 64, 256, 1024, 2048], {}),
}


def run_point(shape: dict[str, int], repeats: int) -> dict[str, float]:
    """Seconds, tokens a second and MiB of one point, in this process."""
    import torch

    from inference import SamplingParams
    from inference.engine import TorchEngine
    from memory import peak_memory
    from tiny import build_tiny

    model, tokenizer = build_tiny(0)
    engine = TorchEngine(model.eval(), tokenizer)
    engine.stop_token_ids = torch.tensor([-1])
    prompts = [
        [40 + (7 * i + j) % 60 for j in range(shape["prompt_tokens"])] for i in range(shape["prompts"])
    ]
    params = SamplingParams(shape["completion_tokens"])
    before = peak_memory(model.device)
    engine.generate(prompts, shape["group"], params, (0,))
    times = []
    for repeat in range(repeats):
        began = time.perf_counter()
        engine.generate(prompts, shape["group"], params, (1 + repeat,))
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    tokens = shape["prompts"] * shape["group"] * shape["completion_tokens"]
    memory = (peak_memory(model.device) - before) / 2**20
    return {"seconds": seconds, "tokens_per_s": tokens / seconds, "memory_mib": memory}


def measure(size: str, repeats: int) -> list[dict[str, Any]]:
    """The points of a size."""
    name, values, held = SIZES[size]
    rows = []
    for value in values:
        shape = BASE | held | {name: value}
        command = [sys.executable, __file__, "--point", json.dumps(shape), "--repeats", str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{size} {value} failed:\n{done.stderr[-3000:]}")
        row = {"size": size, "value": value, **json.loads(done.stdout.splitlines()[-1])}
        rows.append(row)
        told = f"{row['seconds']:9.3f} s{row['tokens_per_s']:10,.0f} tokens/s{row['memory_mib']:8.0f} MiB"
        print(f"{size:20}{value:6}{told}", flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory over each size, on logarithmic axes, where linear growth has slope 1."""
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, axes = pyplot.subplots(
        2, len(sizes), figsize=(3.2 * len(sizes), 5.2), squeeze=False, layout="tight"
    )
    for column, size in enumerate(sizes):
        points = [row for row in rows if row["size"] == size]
        values = [row["value"] for row in points]
        for axis, key, label in (
            (axes[0, column], "tokens_per_s", "tokens/s"),
            (axes[1, column], "memory_mib", "MiB"),
        ):
            axis.loglog(values, [row[key] for row in points], marker="o", color="#1f6feb")
            axis.set_xlabel(size)
            axis.set_ylabel(label)
            axis.set_ylim(bottom=1)
            axis.grid(which="major", alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write a row a line to this file")
    parser.add_argument("--plot", type=Path, help="draw to this file")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(run_point(arguments.point, arguments.repeats)))
        return
    require_matplotlib(arguments.plot)
    rows = [row for size in arguments.sizes for row in measure(size, arguments.repeats)]
    write_rows(rows, arguments.json)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
