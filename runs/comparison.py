"""Runs beside each other: where each stands, how well it did, and in what they differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runs.charts import draw_charts
from runs.figures import count, duration
from runs.page import PAGE, safe, wide_table
from runs.records import Record
from runs.watchdog import FINDINGS

NOTHING = "–"
# What differs between any two runs and explains nothing.
OF_NO_MATTER = {"output", "resume", "tracker", "log_level", "keep_checkpoints", "save_every"}

# What a run's folder has for whoever asks further, if it is there.
PLACES = {"report": "report.html", "best model": "best", "final model": "final", "incidents": "incidents"}


def summary(run: Record) -> dict[str, str]:
    """What one asks first of a run, each with its name."""
    rows, best = run.held_out, run.best
    return {
        "state": run.state,
        "method": run.method,
        "model": str(run.config.get("model", NOTHING)),
        "data": str(run.config.get("data", NOTHING)),
        "steps": f"{run.last_step} of {run.config.get('total_steps', NOTHING)}",
        "time in steps": duration(run.seconds),
        "accuracy at first": accuracy(rows[0]) if rows else NOTHING,
        "accuracy now": accuracy(rows[-1]) if rows else NOTHING,
        "best accuracy": f"{accuracy(best[0])}, {best[1]}" if best else NOTHING,
    }


def accuracy(row: dict[str, Any]) -> str:
    """An evaluation in a few words."""
    low, high = row["ci95"]
    return f"{row['accuracy_strict']:.1%} ({low:.1%} to {high:.1%}, n = {row['n']})"


def differences(runs: Sequence[Record]) -> list[list[str]]:
    """The fields of the configurations that all runs have and not all alike, with each one's value."""
    shared = [key for key in runs[0].config if all(key in run.config for run in runs)]
    rows = [[key, *(str(run.config[key]) for run in runs)] for key in shared if key not in OF_NO_MATTER]
    return [row for row in rows if len(set(row[1:])) > 1]


def list_table(runs: Sequence[Record], folder: Path) -> list[list[str]]:
    """A row a run, under a head."""
    head = ["run", "state", "method", "model", "steps", "time in steps", "accuracy now"]
    told = [(str(run.folder.relative_to(folder)), summary(run)) for run in runs]
    return [head, *([name, *(figures[key] for key in head[1:])] for name, figures in told)]


def name_all(runs: Sequence[Record]) -> dict[str, Record]:
    """The runs by a short name of each: as much of their path as tells them apart."""
    paths = [run.folder.resolve() for run in runs]
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return dict(zip(names, runs, strict=True))


def compare_table(runs: Mapping[str, Record]) -> list[list[str]]:
    """A column a run: what one asks first, then the fields in which they differ."""
    told = [summary(run) for run in runs.values()]
    asked = [[key, *(figures[key] for figures in told)] for key in told[0]]
    differing = [row for row in differences(list(runs.values())) if row[0] not in told[0]]
    return [["", *runs], *asked, *differing]


def comparison_page(runs: Mapping[str, Record]) -> str:
    """A page with the table and all curves overlaid."""
    head, *rows = compare_table(runs)
    body = f"{wide_table(head, rows)}\n{draw_charts(runs)}"
    return PAGE.substitute(title=safe(" · ".join(runs)), facts=count(len(runs), "run"), body=body)


def show(run: Record) -> str:
    """Everything that a run tells, in lines."""
    lines = [f"{key:<19}{value}" for key, value in summary(run).items()]
    lines += [
        f"{key:<19}{run.folder / place}" for key, place in PLACES.items() if (run.folder / place).exists()
    ]
    lines += ["", *(f"step {row['step']:<6}{row['set']} {accuracy(row)}" for row in run.evaluations)]
    for row in [*run.metrics, *run.evaluations]:
        lines += [f"step {row['step']:<6}{told['cause']}: {told['text']}" for told in row.get(FINDINGS, ())]
    if run.metrics:
        lines += ["", f"step {run.metrics[-1]['step']}"]
        told = [(key, value) for key, value in run.metrics[-1].items() if key not in ("step", FINDINGS)]
        lines += [f"  {key:<36}{value:g}" for key, value in told]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the columns under each other, a rule under the first."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * sum(widths, 2 * (len(widths) - 1)), *lines[1:]])
