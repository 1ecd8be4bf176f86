"""The report of a run: one HTML file with its figures, curves, samples and configuration."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs.charts import draw_charts
from runs.figures import count, duration
from runs.page import PAGE, safe
from runs.records import Record, read_ends, read_run
from runs.watchdog import FINDINGS

SAMPLES = 4  # rollouts shown of the first step and of the last
TEXT_LIMIT = 4000  # characters shown of a completion


def write_report(folder: Path) -> Path:
    """Write the report of a run into its folder; returns its path."""
    path = folder / "report.html"
    # A lone surrogate, which JSON can carry, has no UTF-8.
    path.write_bytes(report_page(folder).encode("utf-8", "replace"))
    return path


def report_page(folder: Path) -> str:
    """The report of a run, finished or not, from whatever of it is there.

    Args:
        folder: the run's; missing files and values that are not finite are left out, and counted.
    """
    run = read_run(folder)
    config = run.config
    facts = [str(config["data"])] if "data" in config else []
    if config:
        facts.append(str(config.get("algo", "supervised fine-tuning")))
    facts += [f"seed {config['seed']}"] if "seed" in config else []
    facts += [f"from {config['model']}"] if "model" in config else []
    parts = (
        _tiles(run),
        _warnings(run),
        draw_charts(run),
        _rollouts(folder / "rollouts.jsonl"),
        _tables(run),
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
    if evaluations := run.evaluations:
        name = evaluations[0]["set"]
        rows = [row for row in evaluations if row["set"] == name]
        best = max(rows, key=lambda row: row["accuracy_strict"])
        ends = [("first", rows[0]), ("last", rows[-1])] if len(rows) > 1 else [("only", rows[0])]
        for which, row in ends:
            low, high = row["ci95"]
            under = f"{_when(row)}; 95% interval {low:.1%} to {high:.1%}, n = {row['n']}"
            if which == "last" and best["accuracy_strict"] > row["accuracy_strict"]:
                under += f"; best {best['accuracy_strict']:.1%} {_when(best)}"
            tiles.append((f"{which} {name} accuracy", f"{row['accuracy_strict']:.1%}", under))
    else:
        tiles.append(("validation accuracy", "–", "no evaluation was made"))
    done = run.metrics[-1]["step"] if run.metrics else 0
    total = run.config.get("total_steps", "an unknown number")
    tiles.append(("steps", f"{done}", "finished" if done == total else f"of {total}"))
    tiles.append(("time in steps", duration(run.seconds), "evaluation and saving not counted"))
    return "".join(
        f'<div class="tile"><p>{safe(over)}</p><strong>{safe(figure)}</strong><p>{safe(under)}</p></div>'
        for over, figure, under in tiles
    )


def _when(row: dict[str, Any]) -> str:
    return f"after step {row['step']}" if row["step"] else "before training"


# ------------------------------------------------------------------------------------------------------------
# Samples


def _rollouts(path: Path) -> str:
    """Completions of the first step and of the last, side by side."""
    head, tail = read_ends(path)
    if not head or not tail:
        return ""
    first = [row for row in head if row["step"] == head[0]["step"]]
    last = [row for row in tail if row["step"] == tail[-1]["step"]]
    columns = [first, last] if first[0]["step"] != last[0]["step"] else [first]
    shown = "".join(
        f"<div><h3>Step {safe(rows[0]['step'])}</h3>{''.join(map(_rollout, _one_a_group(rows)))}</div>"
        for rows in columns
    )
    return (
        "<h2>Completions</h2><p>One completion from each of a few groups, not picked by what it earned.</p>"
        f'<div class="pair">{shown}</div>'
    )


def _one_a_group(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[Any, dict[str, Any]] = {}
    for row in rows:
        groups.setdefault(row["group"], row)
    return list(groups.values())[:SAMPLES]


def _rollout(row: dict[str, Any]) -> str:
    verdict = {True: "correct", False: "wrong"}.get(row["correct"], "undecided")
    extracted = "nothing" if row["extracted"] is None else row["extracted"]
    parts = ", ".join(f"{name} {'–' if v is None else f'{v:g}'}" for name, v in row["rewards"].items())
    facts = [f"answer {extracted}", f"expected {row['gold']}", f"reward {row['reward']:.3g} ({parts})"]
    advantage = row["advantage"]
    facts.append("not learned from" if advantage is None else f"advantage {advantage:+.2f}")
    facts.append(count(row["tokens"], "token"))
    facts += ["cut off"] if row["finish_reason"] == "length" else []
    return (
        f'<article><p class="question">{safe(_shorten(row["question"]))}</p>'
        f"<pre>{safe(_shorten(row['completion']))}</pre>"
        f'<p><b class="{verdict}">{verdict}</b> {safe(_shorten(" · ".join(facts)))}</p></article>'
    )


def _shorten(told: str) -> str:
    if len(told) <= TEXT_LIMIT:
        return told
    half = TEXT_LIMIT // 2
    return f"{told[:half]}\n[… {len(told) - 2 * half} characters left out …]\n{told[-half:]}"


# ------------------------------------------------------------------------------------------------------------
# The page


def _tables(run: Record) -> str:
    """The configuration and the environment, for whoever wants to run it again."""
    facts = dict(run.environment)
    command = facts.pop("command", None)
    facts |= facts.pop("packages", {})
    told = f'<h2>Run it again</h2><pre class="command">{safe(shlex.join(command))}</pre>' if command else ""
    tables = "".join(
        f"<div><h2>{title}</h2><table>{''.join(map(_table_row, rows.items()))}</table></div>"
        for title, rows in (("Configuration", run.config), ("Environment", facts))
        if rows
    )
    return f'{told}<div class="pair">{tables}</div>'


def _table_row(item: tuple[str, Any]) -> str:
    name, value = item
    if isinstance(value, dict):
        value = ", ".join(f"{key}: {part}" for key, part in value.items())
    return f"<tr><th>{safe(name)}</th><td>{safe('–' if value in (None, '') else value)}</td></tr>"
