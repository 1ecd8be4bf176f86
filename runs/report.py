"""The report of a run: one HTML file with its figures, curves, samples and configuration."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs.charts import draw_charts
from runs.figures import count, duration, number
from runs.page import PAGE, safe, wide_table, write_page
from runs.records import Record, read_run
from runs.samples import show_canaries, show_samples
from runs.watchdog import FINDINGS

INCIDENTS = 20  # shown, the last


def write_report(folder: Path) -> Path:
    """Write the report of a run into its folder; returns its path."""
    path = folder / "report.html"
    write_page(path, report_page(folder))
    return path


def report_page(folder: Path) -> str:
    """The report of a run, finished or not, from whatever of it is there.

    Args:
        folder: the run's; missing files and values that are not finite are left out, and counted.
    """
    run = read_run(folder)
    config = run.config
    facts = [str(config["data"])] if "data" in config else []
    facts += [run.method] if config else []
    facts += [f"seed {config['seed']}"] if "seed" in config else []
    facts += [f"from {config['model']}"] if "model" in config else []
    parts = (
        _tiles(run),
        _warnings(run),
        draw_charts({run.name: run}),
        _rewards(run),
        _incidents(run),
        show_canaries(folder / "canaries.jsonl"),
        show_samples(folder / "rollouts.jsonl"),
        tables(run.config, run.environment),
    )
    return PAGE.substitute(
        title=safe(run.name), facts=" · ".join(safe(fact) for fact in facts), body="\n".join(parts)
    )


def _warnings(run: Record) -> str:
    """What the watchdog found, and what could not be read."""
    told = [
        f"Step {row.get('step')}, {finding['cause']}: {finding['text']}"
        for row in [*run.metrics, *run.evaluations]
        for finding in row.get(FINDINGS, ())
    ]
    told += [f"{count(run.broken, 'unreadable line')} left out."] if run.broken else []
    return "".join(f'<p class="warning">{safe(text)}</p>' for text in told)


# ------------------------------------------------------------------------------------------------------------
# Headline figures


def _tiles(run: Record) -> str:
    """What one looks for first: the accuracy before and after, the steps, the time."""
    tiles = []
    if rows := run.held_out:
        name = rows[0]["set"]
        best, when = run.best
        ends = [("first", rows[0]), ("last", rows[-1])] if len(rows) > 1 else [("only", rows[0])]
        for which, row in ends:
            low, high = row["ci95"]
            under = f"{_when(row)}; 95% interval {low:.1%} to {high:.1%}, n = {row['n']}"
            if which == "last" and best["accuracy_strict"] > row["accuracy_strict"]:
                under += f"; best {best['accuracy_strict']:.1%} {when}"
            tiles.append((f"{which} {name} accuracy", f"{row['accuracy_strict']:.1%}", under))
    else:
        tiles.append(("validation accuracy", "–", "no evaluation was made"))
    done = run.metrics[-1]["step"] if run.metrics else 0
    total = run.config.get("total_steps", "an unknown number")
    tiles.append(("steps", f"{done}", "finished" if done == total else f"of {total}"))
    tiles.append(("time in steps", duration(run.seconds), "evaluation and saving not counted"))
    return draw_tiles(tiles)


def draw_tiles(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Figures in large type, each with what stands over and under it."""
    told = "".join(
        f'<div class="tile"><p>{safe(over)}</p><strong>{safe(figure)}</strong><p>{safe(under)}</p></div>'
        for over, figure, under in tiles
    )
    return f'<div class="tiles">{told}</div>'


def _when(row: dict[str, Any]) -> str:
    return f"after step {row['step']}" if row["step"] else "before training"


# ------------------------------------------------------------------------------------------------------------
# Tables


def _rewards(run: Record) -> str:
    """What every reward gave at first and gives now."""
    first, last = (run.metrics[end] if run.metrics else {} for end in (0, -1))
    keys = {"in all": "train/reward"} | {name: f"rewards/{name}" for name in run.config.get("rewards") or {}}
    rows = [
        [
            name,
            number(run.config["rewards"][name]) if key != "train/reward" else "",
            *(number(row[key]) if key in row else "–" for row in (first, last)),
            *(number(last[f"{key}/{figure}"]) for figure in ("std", "min", "max")),
        ]
        for name, key in keys.items()
        if f"{key}/std" in last
    ]
    if not rows:
        return ""
    head = ["", "weight", "mean at first", "mean now", "standard deviation", "least", "greatest"]
    note = "<p>Over the completions of a step; each before it is weighted.</p>"
    return f"<h2>Rewards</h2>{note}{wide_table(head, rows)}"


def _incidents(run: Record) -> str:
    """Updates that were not finite and left out, with where to look."""
    files = sorted((run.folder / "incidents").glob("step-*.json"))
    if not files:
        return ""
    rows = []
    for file in files[-INCIDENTS:]:
        incident = json.loads(file.read_text(encoding="utf-8"))
        causes = [cause for cause in incident["causes"] if cause]
        left_out = f"{len(causes)} of {len(incident['causes'])}"
        rows.append([incident["step"], left_out, "; ".join(dict.fromkeys(causes)), f"incidents/{file.name}"])
    told = f"{count(len(files), 'step')} with updates that were not finite" + (
        f"; the last {INCIDENTS}" if len(files) > INCIDENTS else ""
    )
    head = ["step", "updates left out", "cause", "what it learned from"]
    return f"<h2>Incidents</h2><p>{told}.</p>{wide_table(head, rows)}"


def tables(config: dict[str, Any], environment: dict[str, Any]) -> str:
    """The configuration and the environment, for whoever wants to run it again."""
    facts = dict(environment)
    command = facts.pop("command", None)
    facts |= facts.pop("packages", {})
    told = f'<h2>Run it again</h2><pre class="command">{safe(shlex.join(command))}</pre>' if command else ""
    both = "".join(
        f"<div><h2>{title}</h2><table>{''.join(map(_table_row, rows.items()))}</table></div>"
        for title, rows in (("Configuration", config), ("Environment", facts))
        if rows
    )
    return f'{told}<div class="pair">{both}</div>'


def _table_row(item: tuple[str, Any]) -> str:
    name, value = item
    if isinstance(value, dict):
        value = ", ".join(f"{key}: {part}" for key, part in value.items())
    return f"<tr><th>{safe(name)}</th><td>{safe('–' if value in (None, '') else value)}</td></tr>"
