"""The curves of runs: which there are, and SVG written by hand.

It takes the page's colours in light and dark, weighs a few kilobytes, and costs training no import.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runs.figures import count, is_reading, number
from runs.page import safe
from runs.records import Record
from runs.watchdog import FINDINGS


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: its name in the legend.
        points: (step, value), in order of steps, all finite.
        band: (step, low, high), where there is an interval.
        marked: draw every point: they are few, and each one counts.
        lost: values left out because they are not finite.
        is_flat: there is nothing to see, zero all along or a metric of no panel that never changes.
    """

    label: str
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]]
    marked: bool = False
    lost: int = 0
    is_flat: bool = False

    @property
    def last(self) -> float:
        """Its last value, if it has one."""
        return self.points[-1][1]


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
    ("Throughput of sampling", False, {"rollout/tokens_per_s": "tokens a second"}),
    ("Peak memory", False, {"memory/peak_mib": "MiB"}),
)
# The same, of evaluations: what emerges in thoughts as a run goes on.
EMERGING: tuple[tuple[str, bool, dict[str, str]], ...] = (
    (
        "Thoughts on held-out problems",
        True,
        {
            "thinking_rate": "thinks",
            "verification_rate": "checks itself",
            "self_correction_rate": "corrects itself",
        },
    ),
    ("Tokens of thoughts on held-out problems", False, {"thought_tokens": "tokens"}),
)
# What rounding leaves where a metric is zero by construction: on the policy that sampled.
ROUNDING = {"policy/loss": 5e-5, "policy/approx_kl": 1e-6, "rollout/sampler_mismatch_kl": 1e-6}
SPREAD = ("/min", "/max", "/std")  # of a reward: the last has a chart, the others say little over steps


def _series(run: Record, key: str, label: str) -> Series:
    """The values of a metric over the steps; what rounding leaves of nothing is zero."""
    values = [(row["step"], row[key]) for row in run.metrics if isinstance(row.get(key), int | float)]
    points = [(step, value) for step, value in values if is_reading(value)]
    if all(abs(value) <= ROUNDING.get(key, 0.0) for _, value in points):
        points = [(step, 0.0) for step, _ in points]
    lost = len(values) - len(points)
    return Series(label, points, [], lost=lost, is_flat=not lost and _is_flat(key, points))


def _is_flat(key: str, points: Sequence[tuple[float, float]]) -> bool:
    values = [value for _, value in points]
    if not any(values):
        return bool(values)
    has_panel = key.startswith("rewards/") or any(key in keys for _, _, keys in PANELS)
    is_still = max(values) - min(values) <= 1e-4 * max(map(abs, values))  # as far as labels can tell
    return is_still and len(values) > 1 and not has_panel


def _accuracy_series(run: Record, name: str | None = None) -> list[Series]:
    """Accuracy with its interval, one series a set, under the run's name if it has one."""
    found = []
    sets = dict.fromkeys(row["set"] for row in run.evaluations)
    for set_ in sets:
        rows = [row for row in run.evaluations if row["set"] == set_ and is_reading(row["accuracy_strict"])]
        points = [(row["step"], row["accuracy_strict"]) for row in rows]
        band = [(row["step"], *row["ci95"]) for row in rows]
        label = set_ if name is None else f"{name}, {set_}" if len(sets) > 1 else name
        found.append(Series(label, points, band, marked=True))
    return found


def _emerging_series(run: Record, key: str, label: str) -> Series:
    """A figure of the evaluations on the set that was first evaluated on."""
    rows = [row for row in run.held_out if is_reading(row.get(key, math.nan))]
    points = [(row["step"], row[key]) for row in rows]
    return Series(label, points, [], marked=True, is_flat=_is_flat(key, points))


def draw_charts(runs: Mapping[str, Record]) -> str:
    """Every curve, the learning curve first. Of several runs, a chart has one metric and a line for each.

    Args:
        runs: by the name that the legend has for them.
    """
    last_step = max(run.last_step for run in runs.values())
    plots = _overlay(runs) if len(runs) > 1 else _curves(*runs.values())
    charts, left_out = [], []
    for title, shares, lines in plots:
        lines = [line for line in lines if line.points or line.lost]
        still = [line for line in lines if line.is_flat]
        if len(runs) > 1 and (len(still) < len(lines) or len({line.last for line in still}) > 1):
            still = []  # beside another, a line that does not move says something, too
        if drawn := [line for line in lines if line not in still]:
            charts.append(draw_chart(title, drawn, last_step, shares, LARGE if len(charts) < 2 else SMALL))
        names = {title if len(runs) > 1 or len(lines) == 1 else f"{title} {x.label}": x for x in still}
        left_out += [f"{name} {number(line.last, shares)}" for name, line in names.items()]
    if not charts:
        return ""
    note = (
        f"<p class='note'>Not drawn, since the same in every step: {safe('; '.join(left_out))}.</p>"
        if left_out
        else ""
    )
    return (
        "<h2>Curves</h2><p>Over steps. A band is a 95% interval; a faint line is every step, the strong one "
        "its moving mean; the figure in a legend is the last.</p>"
        f'<div class="large">{"".join(charts[:2])}</div><div class="small">{"".join(charts[2:])}</div>{note}'
    )


Plot = tuple[str, bool, list[Series]]  # title, whether the values are shares, lines


def _curves(run: Record) -> list[Plot]:
    """The charts of one run."""
    accuracy = _accuracy_series(run)
    if any("train/accuracy" in row for row in run.metrics):
        accuracy.append(_series(run, "train/accuracy", "training samples"))
    return (
        [("Accuracy", True, accuracy)]
        + [
            (title, shares, [_series(run, key, label) for key, label in keys.items()])
            for title, shares, keys in _panels([run])
        ]
        + [
            (title, shares, [_emerging_series(run, key, label) for key, label in keys.items()])
            for title, shares, keys in EMERGING
        ]
    )


def _overlay(runs: Mapping[str, Record]) -> list[Plot]:
    """The charts of several runs: one a metric."""
    plots = [("Accuracy", True, [line for name, run in runs.items() for line in _accuracy_series(run, name)])]
    panels = [*_panels(runs.values()), ("Accuracy of training samples", True, {"train/accuracy": ""})]
    for title, shares, keys in panels:
        for key, label in keys.items():
            lines = [_series(run, key, name) for name, run in runs.items()]
            plots.append((f"{title}: {label}" if len(keys) > 1 else title, shares, lines))
    for title, shares, keys in EMERGING:
        for key, label in keys.items():
            lines = [_emerging_series(run, key, name) for name, run in runs.items()]
            plots.append((f"{title}: {label}" if len(keys) > 1 else title, shares, lines))
    return plots


def _panels(runs: Iterable[Record]) -> list[tuple[str, bool, dict[str, str]]]:
    """What the runs logged, laid out in charts, in the order of `PANELS`."""
    rows = [row for run in runs for row in run.metrics]
    logged = dict.fromkeys(key for row in rows for key in row if key not in ("step", FINDINGS))
    parts = {
        key: key.removeprefix("rewards/")
        for key in logged
        if key.startswith("rewards/") and not key.endswith(("/undecided_fraction", *SPREAD))
    }
    stds = {f"{key}/std": label for key, label in parts.items()}
    of_parts = ("Reward by part, unweighted", False, parts), ("Standard deviation of rewards", False, stds)
    panels = [*PANELS[:2], *of_parts, *PANELS[2:]]
    known = {"train/accuracy"}.union(*(keys for _, _, keys in panels))
    panels += [
        (_headline(key), key.endswith("fraction"), {key: key.partition("/")[0]})
        for key in logged
        if key not in known and not key.endswith(SPREAD)
    ]
    there = [
        (title, shares, {k: v for k, v in keys.items() if k in logged}) for title, shares, keys in panels
    ]
    return [panel for panel in there if panel[2]]


def _headline(key: str) -> str:
    return key.rpartition("/")[2].replace("_", " ").capitalize()


LARGE, SMALL = (480, 240), (310, 170)  # in the pixels that they take on a wide screen
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 24  # what axis labels need around a chart


def draw_chart(
    title: str,
    lines: Sequence[Series],
    last_step: int,
    shares: bool = False,
    size: tuple[int, int] = SMALL,
    along: str | None = None,
) -> str:
    """One chart with its legend.

    Args:
        title: above it.
        lines: what it shows.
        last_step: the right end of the axis, the same in every chart of a report.
        shares: values are in [0, 1] and told as percentages.
        size: width and height.
        along: what is counted from left to right; None for the steps of a run, whose end the legend tells.
    """
    width, height = size
    values = [value for line in lines for _, value in line.points]
    values += [edge for line in lines for _, *edges in line.band for edge in edges]
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
        drawn.append(f'<text x="{LEFT - 7}" y="{y}" dy=".32em" class="end">{number(value, shares)}</text>')
    for step in steps:
        if step <= max(last_step, 1):
            x = place(step, ticks[0]).partition(",")[0]
            drawn.append(f'<text x="{x}" y="{height - 6}" class="mid">{step:g}</text>')
    # The last is drawn first: the line that a chart is about lies on top.
    for position, line in reversed(list(enumerate(lines))):
        drawn.append(f'<g class="c{position % 6}">{_line(line, place, shares, along or "step")}</g>')
    legend = "".join(
        f'<span class="c{position % 6}"><i></i>{safe(line.label)}{"" if along else _end(line, shares)}</span>'
        for position, line in enumerate(lines)
    )
    lost = sum(line.lost for line in lines)
    note = f'<p class="warning">{count(lost, "value")} not finite, left out</p>' if lost else ""
    return (
        f"<figure><figcaption><h3>{safe(title)}</h3><div>{legend}</div></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{safe(title)}">'
        f"{''.join(drawn)}</svg>{note}</figure>"
    )


def _end(line: Series, shares: bool) -> str:
    """What a run came to."""
    return f"<b>{number(line.last, shares) if line.points else '–'}</b>"


def _line(line: Series, place: Any, shares: bool, along: str) -> str:
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
            told = f"{along} {step}: {number(value, shares)}{intervals.get(step, '')}"
            drawn += f'<circle cx="{x}" cy="{y}" r="3"><title>{told}</title></circle>'
    return drawn


def _thin(points: Sequence[tuple[float, float]], buckets: int = 250) -> list[tuple[float, float]]:
    """At most two points a bucket, its lowest and its highest: a spike stays a spike."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept = []
    for i in range(buckets):
        bucket = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
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
