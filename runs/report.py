"""The report of a run: one HTML file with its figures, curves, samples and configuration.

The curves are SVG written by hand: it takes the page's colours in light and dark, weighs a few kilobytes, and
costs training no import. Everything that comes from a run is hostile until it is escaped: a model may write
any text.
"""

import json
import math
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from runs.watchdog import FINDINGS

ROLLOUT_BYTES = 1 << 20  # read of each end of rollouts.jsonl, which may hold gigabytes
SAMPLES = 4  # rollouts shown of the first step and of the last
TEXT_LIMIT = 4000  # characters shown of a completion
LARGEST = 1e30  # a value beyond it is no reading; sums of such values overflow


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: its name in the legend.
        points: (step, value), in order of steps, all finite.
        band: (step, low, high), where there is an interval.
        marked: draw every point: they are few, and each one counts.
        lost: values left out because they are not finite.
    """

    label: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]]
    marked: bool = False
    lost: int = 0


# Title, whether the values are shares, and the metrics with their labels. The first one that a run has stands
# large beside its accuracy. What a run logs beyond these gets a chart of its own: nothing measured is hidden.
PANELS: tuple[tuple[str, bool, dict[str, str]], ...] = (
    ("Mean reward", False, {"train/reward": "reward"}),
    ("Loss", False, {"policy/loss": "loss"}),
    ("Completion tokens", False, {"rollout/completion_tokens": "tokens"}),
    (
        "Form of completions",
        True,
        {"train/format_rate": "well formed", "rollout/truncated_fraction": "cut off at the limit"},
    ),
    ("Groups without a signal", True, {"rollout/zero_variance_groups": "all rewards equal"}),
    ("Entropy per token", False, {"policy/entropy": "nats"}),
    ("Gradient norm", False, {"policy/grad_norm": "before clipping"}),
    ("KL", False, {"policy/kl": "to the reference", "policy/approx_kl": "within an update"}),
    ("Clipped tokens", True, {"policy/clip_fraction": "share"}),
    (
        "Time per step",
        False,
        {"time/generate_s": "generate, s", "time/score_s": "score, s", "time/update_s": "update, s"},
    ),
)


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
    config = _read_yaml(folder / "config.yaml")
    environment = _read_json(folder / "environment.json")
    metrics, broken_metrics = read_rows(folder / "metrics.jsonl")
    evaluations, broken_evaluations = read_rows(folder / "eval.jsonl")
    name = folder.resolve().name
    facts = [str(config["data"])] if "data" in config else []
    if config:
        facts.append(str(config.get("algo", "supervised fine-tuning")))
    facts += [f"seed {config['seed']}"] if "seed" in config else []
    facts += [f"from {config['model']}"] if "model" in config else []
    broken = broken_metrics + broken_evaluations
    return PAGE.substitute(
        title=_text(name),
        facts=" · ".join(_text(fact) for fact in facts),
        tiles=_tiles(config, metrics, evaluations),
        warning=_warnings(broken, [*metrics, *evaluations]),
        charts=_charts(metrics, evaluations),
        rollouts=_rollouts(folder / "rollouts.jsonl"),
        tables=_tables(config, environment),
    )


def _warnings(broken: int, rows: Sequence[dict[str, Any]]) -> str:
    """What the watchdog found, and what could not be read."""
    told = [
        f"Step {row.get('step')}, {finding['cause']}: {finding['text']}"
        for row in rows
        for finding in row.get(FINDINGS, ())
    ]
    told += [f"{_count(broken, 'unreadable line')} left out."] if broken else []
    return "".join(f'<p class="warning">{_text(text)}</p>' for text in told)


# ------------------------------------------------------------------------------------------------------------
# Reading


def _read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a JSONL file, and how many of its lines could not be read (a kill cuts the last one)."""
    if not path.is_file():
        return [], 0
    return _parse_lines(path.read_bytes().splitlines())


def _parse_lines(lines: Iterable[bytes]) -> tuple[list[dict[str, Any]], int]:
    rows, broken = [], 0
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            broken += 1
    return rows, broken


def _read_ends(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows from the beginning and from the end of a JSONL file, without reading what lies between."""
    if not path.is_file():
        return [], []
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(ROLLOUT_BYTES)
        file.seek(max(0, size - ROLLOUT_BYTES))
        tail = file.read()
    # The cut goes through a line at the end of the one and at the beginning of the other.
    head_lines = head.split(b"\n")[: -1 if size > ROLLOUT_BYTES else None]
    tail_lines = tail.split(b"\n")[1 if size > ROLLOUT_BYTES else 0 :]
    return _parse_lines(filter(None, head_lines))[0], _parse_lines(filter(None, tail_lines))[0]


def _series(rows: Sequence[dict[str, Any]], key: str, label: str) -> Series:
    """The values of a metric over the steps."""
    values = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    points = [(step, value) for step, value in values if _is_reading(value)]
    return Series(label, points, [], lost=len(values) - len(points))


def _accuracy_series(evaluations: Sequence[dict[str, Any]]) -> list[Series]:
    """Accuracy with its interval, one series a set."""
    found = []
    for name in dict.fromkeys(row["set"] for row in evaluations):
        rows = [row for row in evaluations if row["set"] == name and _is_reading(row["accuracy_strict"])]
        points = [(row["step"], row["accuracy_strict"]) for row in rows]
        found.append(Series(name, points, [(row["step"], *row["ci95"]) for row in rows], marked=True))
    return found


def _is_reading(value: float) -> bool:
    return math.isfinite(value) and abs(value) < LARGEST


# ------------------------------------------------------------------------------------------------------------
# Headline figures


def _tiles(
    config: dict[str, Any], metrics: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> str:
    """What one looks for first: the accuracy before and after, the steps, the time."""
    tiles = []
    if evaluations:
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
    done = metrics[-1]["step"] if metrics else 0
    total = config.get("total_steps", "an unknown number")
    tiles.append(("steps", f"{done}", "finished" if done == total else f"of {total}"))
    seconds = [value for row in metrics for key, value in row.items() if key.startswith("time/")]
    spent = math.fsum(value for value in seconds if _is_reading(value))
    tiles.append(("time in steps", _duration(spent), "evaluation and saving not counted"))
    return "".join(
        f'<div class="tile"><p>{_text(over)}</p><strong>{_text(figure)}</strong><p>{_text(under)}</p></div>'
        for over, figure, under in tiles
    )


def _when(row: dict[str, Any]) -> str:
    return f"after step {row['step']}" if row["step"] else "before training"


def _duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


# ------------------------------------------------------------------------------------------------------------
# Charts


def _charts(metrics: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    """Every curve of the run, the learning curve first."""
    logged = dict.fromkeys(key for row in metrics for key in row if key not in ("step", FINDINGS))
    last_step = max([row["step"] for row in [*metrics, *evaluations]], default=0)
    accuracy = _accuracy_series(evaluations)
    if "train/accuracy" in logged:
        accuracy.append(_series(metrics, "train/accuracy", "training samples"))
    parts = {
        key: key.removeprefix("rewards/")
        for key in logged
        if key.startswith("rewards/") and not key.endswith(("/undecided_fraction", *SPREAD))
    }
    stds = {f"{key}/std": label for key, label in parts.items()}
    of_parts = ("Reward by part, unweighted", False, parts), ("Standard deviation of rewards", False, stds)
    panels = [*PANELS[:2], *of_parts, *PANELS[2:]]
    shown = {"train/accuracy"}.union(*(keys for _, _, keys in panels))
    shown |= {key for key in logged if key.endswith(SPREAD)}
    panels += [
        (_headline(key), key.endswith("fraction"), {key: key.partition("/")[0]})
        for key in logged
        if key not in shown
    ]
    panels = [panel for panel in panels if panel[2].keys() & logged.keys()]
    charts = [_chart("Accuracy", accuracy, last_step, shares=True, size=LARGE)]
    for position, (title, shares, keys) in enumerate(panels):
        lines = [_series(metrics, key, label) for key, label in keys.items() if key in logged]
        charts.append(_chart(title, lines, last_step, shares, SMALL if position else LARGE))
    if not any(charts):
        return ""
    return (
        "<h2>Curves</h2><p>Over steps. A band is a 95% interval; a faint line is every step, the strong one "
        "its moving mean; the figure in a legend is the last.</p>"
        f'<div class="large">{"".join(charts[:2])}</div><div class="small">{"".join(charts[2:])}</div>'
    )


def _headline(key: str) -> str:
    return key.rpartition("/")[2].replace("_", " ").capitalize()


SPREAD = ("/min", "/max", "/std")  # of a reward: the last has a chart, the others say little over steps
LARGE, SMALL = (480, 240), (310, 170)  # in the pixels that they take on a wide screen
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 24  # what axis labels need around a chart


def _chart(
    title: str,
    lines: Sequence[Series],
    last_step: int,
    shares: bool = False,
    size: tuple[int, int] = SMALL,
) -> str:
    """One chart with its legend; nothing where no line has a point.

    Args:
        title: above it.
        lines: what it shows.
        last_step: the right end of the axis, the same in every chart of a report.
        shares: values are in [0, 1] and told as percentages.
        size: width and height.
    """
    width, height = size
    lines = [line for line in lines if line.points or line.lost]
    values = [value for line in lines for _, value in line.points]
    values += [edge for line in lines for _, *edges in line.band for edge in edges]
    if not lines:
        return ""
    ticks = _value_ticks(values, shares)
    steps = _ticks(0, max(last_step, 1), 5, least=1)

    def place(step: float, value: float) -> str:
        x = LEFT + (width - LEFT - RIGHT) * step / max(last_step, 1)
        y = height - BOTTOM - (height - TOP - BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])
        return f"{x:.1f},{y:.1f}"

    drawn = []
    for value in ticks:
        x, y = place(0, value).split(",")
        drawn.append(f'<path class="grid" d="M{x},{y}H{width - RIGHT}"/>')
        drawn.append(f'<text x="{LEFT - 7}" y="{y}" dy=".32em" class="end">{_number(value, shares)}</text>')
    for step in steps:
        if step <= max(last_step, 1):
            x = place(step, ticks[0]).partition(",")[0]
            drawn.append(f'<text x="{x}" y="{height - 6}" class="mid">{step:g}</text>')
    # The last is drawn first: the line that a chart is about lies on top.
    for position, line in reversed(list(enumerate(lines))):
        drawn.append(f'<g class="c{position % 6}">{_line(line, place, shares)}</g>')
    legend = "".join(
        f'<span class="c{position % 6}"><i></i>{_text(line.label)}'
        f"<b>{_number(line.points[-1][1], shares) if line.points else '–'}</b></span>"
        for position, line in enumerate(lines)
    )
    lost = sum(line.lost for line in lines)
    note = f'<p class="warning">{_count(lost, "value")} not finite, left out</p>' if lost else ""
    return (
        f"<figure><figcaption><h3>{_text(title)}</h3><div>{legend}</div></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(title)} over steps">'
        f"{''.join(drawn)}</svg>{note}</figure>"
    )


def _line(line: Series, place: Any, shares: bool) -> str:
    """The marks of one series: its band, its values, and where they are many, their moving mean on top."""
    drawn = ""
    if len(line.band) > 1:
        edge = [place(step, high) for step, _, high in line.band]
        edge += [place(step, low) for step, low, _ in reversed(line.band)]
        drawn += f'<polygon class="band" points="{" ".join(edge)}"/>'
    elif line.band:
        step, low, high = line.band[0]
        drawn += f'<path class="whisker" d="M{place(step, low)}L{place(step, high)}"/>'
    is_noisy = len(line.points) >= 40 and not line.marked
    if len(line.points) > 1:
        path = " ".join(place(*point) for point in _thin(line.points))
        drawn += f'<polyline class="{"raw" if is_noisy else "line"}" points="{path}"/>'
    if is_noisy:
        path = " ".join(place(*point) for point in _smooth(line.points))
        drawn += f'<polyline class="line" points="{path}"/>'
    if line.marked or len(line.points) == 1:
        intervals = {step: f", {low:.1%} to {high:.1%}" for step, low, high in line.band}
        for step, value in line.points:
            x, y = place(step, value).split(",")
            told = f"step {step}: {_number(value, shares)}{intervals.get(step, '')}"
            drawn += f'<circle cx="{x}" cy="{y}" r="3"><title>{told}</title></circle>'
    return drawn


def _thin(points: Sequence[tuple[float, float]], buckets: int = 250) -> list[tuple[float, float]]:
    """At most two points a bucket, its lowest and its highest: a spike stays a spike."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept = []
    for number in range(buckets):
        bucket = points[number * len(points) // buckets : (number + 1) * len(points) // buckets]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def _smooth(points: Sequence[tuple[float, float]], places: int = 150) -> list[tuple[float, float]]:
    """The mean over a window of a twentieth of the run, at some places along it."""
    half = max(2, len(points) // 40)
    count = min(places, len(points))
    middles = [round(number * (len(points) - 1) / (count - 1)) for number in range(count)]
    return [
        (points[middle][0], statistics.fmean(p[1] for p in points[max(0, middle - half) : middle + half + 1]))
        for middle in middles
    ]


def _value_ticks(values: Sequence[float], shares: bool) -> list[float]:
    """Ticks that hold all values, and zero where it is near."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if 0 < low <= high / 2 or (shares and low < 0.5):
        low = 0.0
    if high < 0 and high >= low / 2:
        high = 0.0
    if high - low <= 1e-3 * max(abs(low), abs(high)):  # flat as far as labels of four digits can tell
        margin = abs(high) / 10 or 1.0
        low, high = (low if low == 0 else low - margin), high + margin
        high = min(high, 1.0) if shares else high
        low = low if high > low else high - 0.1
    return _ticks(low, high, 4)


def _ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """Round numbers from `low` or under it to `high` or over it, about `count` steps of 1, 2 or 5 apart."""
    rough = max((high - low) / count, least)
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [number * size for number in range(first, last + 1)]


def _number(value: float, shares: bool) -> str:
    """A value in a few characters."""
    if shares:
        return f"{100 * value:.3g}%"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{float(f'{value:.4g}'):g}".replace("-", "−")
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")


# ------------------------------------------------------------------------------------------------------------
# Samples


def _rollouts(path: Path) -> str:
    """Completions of the first step and of the last, side by side."""
    head, tail = _read_ends(path)
    if not head or not tail:
        return ""
    first = [row for row in head if row["step"] == head[0]["step"]]
    last = [row for row in tail if row["step"] == tail[-1]["step"]]
    columns = [first, last] if first[0]["step"] != last[0]["step"] else [first]
    shown = "".join(
        f"<div><h3>Step {_text(rows[0]['step'])}</h3>{''.join(map(_rollout, _one_a_group(rows)))}</div>"
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
    facts.append(_count(row["tokens"], "token"))
    facts += ["cut off"] if row["finish_reason"] == "length" else []
    return (
        f'<article><p class="question">{_text(_shorten(row["question"]))}</p>'
        f"<pre>{_text(_shorten(row['completion']))}</pre>"
        f'<p><b class="{verdict}">{verdict}</b> {_text(_shorten(" · ".join(facts)))}</p></article>'
    )


def _shorten(text: str) -> str:
    if len(text) <= TEXT_LIMIT:
        return text
    half = TEXT_LIMIT // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


# ------------------------------------------------------------------------------------------------------------
# The page


def _tables(config: dict[str, Any], environment: dict[str, Any]) -> str:
    """The configuration and the environment, for whoever wants to run it again."""
    facts = dict(environment)
    command = facts.pop("command", None)
    facts |= facts.pop("packages", {})
    told = f'<h2>Run it again</h2><pre class="command">{_text(shlex.join(command))}</pre>' if command else ""
    tables = "".join(
        f"<div><h2>{title}</h2><table>{''.join(map(_table_row, rows.items()))}</table></div>"
        for title, rows in (("Configuration", config), ("Environment", facts))
        if rows
    )
    return f'{told}<div class="pair">{tables}</div>'


def _table_row(item: tuple[str, Any]) -> str:
    name, value = item
    if isinstance(value, dict):
        value = ", ".join(f"{key}: {part}" for key, part in value.items())
    return f"<tr><th>{_text(name)}</th><td>{_text('–' if value in (None, '') else value)}</td></tr>"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# What a browser would hide, or obey by turning the text around it, is shown by its number.
HIDDEN = [*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F)]
PICTURES = {code: f"[U+{code:04X}]" for code in [*HIDDEN, *range(0x2066, 0x206A)]}


def _text(value: Any) -> str:
    """Anything as text for the page: the one door from a run's content to HTML."""
    return escape(str(value).translate(PICTURES))


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --text: #24272c; --soft: #6a7079;
  --rule: #e6e5e0; --c0: #2f6cb3; --c1: #c06a2c; --c2: #3f8660; --c3: #8058a6; --c4: #b3475d; --c5: #587786; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1c1f23; --text: #e3e4e2;
  --soft: #979da6; --rule: #2d3136; --c0: #77aef0; --c1: #e3a063; --c2: #78c096; --c3: #b998de;
  --c4: #ea8599; --c5: #98b6c4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 3rem 1.5rem 4rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; font-weight: 650; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; font-weight: 620; margin: 2.6rem 0 .6rem; }
h3 { font-size: .95rem; font-weight: 620; margin: 0; }
p { margin: 0; overflow-wrap: anywhere; }
header p, h2 + p, .tile p, figcaption { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 1rem;
  margin: 1.8rem 0 1rem; }
.tile, figure, article { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: .9rem 1.1rem; font-size: .85rem; }
.tile strong { display: block; font-size: 1.75rem; font-weight: 620; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.large, .small { display: grid; gap: 1rem; margin-top: 1rem; }
.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
figure { display: flex; flex-direction: column; margin: 0; padding: 1rem 1.1rem .7rem; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .1rem 1rem;
  margin-bottom: .5rem; font-size: .82rem; }
figcaption h3 { color: var(--text); }
figcaption div { display: flex; flex-wrap: wrap; gap: 0 .9rem; }
figcaption i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em;
  background: var(--c); }
figcaption b { margin-left: .45em; color: var(--text); font-weight: 550; }
svg { display: block; width: 100%; height: auto; margin-top: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: var(--rule); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.line, .raw, .whisker { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.raw { stroke-width: 1; opacity: .3; } .band { fill: var(--c); opacity: .16; } .whisker { opacity: .5; }
circle { fill: var(--c); }
.warning { color: var(--c4); font-size: .82rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem;
  align-items: start; }
.pair > div { min-width: 0; }
h2 + p + .pair { margin-top: .8rem; }
article { margin-top: .7rem; padding: .8rem 1rem; font-size: .85rem; }
article > p:last-child { color: var(--soft); }
.question { font-weight: 550; white-space: pre-wrap; max-height: 8rem; overflow: auto; }
pre { margin: .5rem 0; padding: .6rem .75rem; max-height: 15rem; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--page); border-radius: 7px;
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.command { border: 1px solid var(--rule); background: var(--card); }
.correct { color: var(--c2); } .wrong { color: var(--c4); } .undecided { color: var(--c1); }
table { border-collapse: collapse; width: 100%; font-size: .85rem; table-layout: fixed; }
.pair h2 { margin-top: 1.6rem; }
th, td { padding: .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { width: 42%; padding-right: 1rem; color: var(--soft); font-weight: 450; }
</style>
</head>
<body>
<header><h1>$title</h1><p>$facts</p></header>
<div class="tiles">$tiles</div>
$warning
$charts
$rollouts
$tables
</body>
</html>
""")
