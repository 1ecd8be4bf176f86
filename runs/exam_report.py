"""The report of an evaluation: one HTML file with its figures, the comparison and answers to read."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runs.charts import LARGE, Series, draw_chart
from runs.figures import count, number
from runs.page import PAGE, safe, wide_table
from runs.report import draw_tiles, tables
from runs.samples import PICKED, article, beside, column

SIGNIFICANT = 0.05
Pair = tuple[dict[str, Any], dict[str, Any]]  # the baseline's greedy answer to a problem, and the model's


def _share(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: f"{figures[key]:.1%}"


def _share_of_k(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: f"{figures[key]:.1%} (k = {figures['samples']})"


def _corrections(figures: dict[str, Any]) -> str:
    helped = figures["self_correction_accuracy"]
    return f"{figures['self_correction_rate']:.1%}" + (
        f" (right: {helped:.0%})" if helped is not None else ""
    )


# Key, label, how it is shown, and the key of its interval.
FIGURES: tuple[tuple[str, str, Callable[[dict[str, Any]], str], str], ...] = (
    ("accuracy_strict", "accuracy, strict", _share("accuracy_strict"), "ci95"),
    ("accuracy_lenient", "accuracy, lenient", _share("accuracy_lenient"), ""),
    ("accuracy_sampled", "accuracy, sampled", _share("accuracy_sampled"), "ci95_sampled"),
    ("best_of_n", "best of k by reward", _share_of_k("best_of_n"), "ci95_best_of_n"),
    ("maj_at_k", "majority of k", _share_of_k("maj_at_k"), "ci95_maj_at_k"),
    ("pass_at_k", "pass@k", _share_of_k("pass_at_k"), "ci95_pass_at_k"),
    ("format_rate", "well formed", _share("format_rate"), ""),
    ("truncation_rate", "truncated", _share("truncation_rate"), ""),
    ("undecided_rate", "undecided", _share("undecided_rate"), ""),
    ("mean_tokens", "tokens, mean", lambda f: f"{f['mean_tokens']:.1f}", ""),
    ("median_tokens", "tokens, median", lambda f: f"{f['median_tokens']:.0f}", ""),
    ("thinking_rate", "thinks", _share("thinking_rate"), ""),
    ("verification_rate", "checks itself", _share("verification_rate"), ""),
    ("self_correction_rate", "corrects itself", _corrections, ""),
)
KINDS = {"level": "By level", "difficulty": "By difficulty", "steps": "By number of steps"}


def figure_rows(models: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """The figures of models, one column each, under a head; intervals under what they belong to."""
    rows = [["", *models]]
    for key, label, show, interval in FIGURES:
        if all(key in figures for figures in models.values()):
            rows.append([label, *map(show, models.values())])
            if interval:
                told = ("{:.1%} to {:.1%}".format(*figures[interval]) for figures in models.values())
                rows.append(["  95 % interval", *told])
    return rows


def points(share: float) -> str:
    """A difference of shares."""
    return f"{100 * share:+.1f}".replace("-", "−")


def exam_page(
    report: dict[str, Any],
    answers: Mapping[str, Sequence[dict[str, Any]]],
    config: dict[str, Any],
    environment: dict[str, Any],
) -> str:
    """The report of an evaluation.

    Args:
        report: what report.json holds.
        answers: by the model's name: the fields of an `exam.Answer`, with `number`, `question` and `gold` of
            the problem; `how` it was drawn; what it earned as `reward`, None where nothing was chosen by it,
            and whether it was `chosen`.
        config: what was asked for.
        environment: versions, device, command.
    """
    name, before = report["model"], report.get("baseline")
    models = {name: report} if before is None else {before["model"]: before, name: report}
    facts = [f"{report['data']}, {report['split']} split", count(report["n"], "problem")]
    facts += [f"beside {before['model']}"] if before else []
    facts += [_contamination(report["contaminated"], config)] if "contaminated" in report else []
    greedy = ([row for row in answers[one] if row["how"] == GREEDY] for one in models)
    pairs = list(zip(*greedy, strict=True)) if before else []
    head, *rows = figure_rows(models)
    parts = (
        draw_tiles(_tiles(report)),
        _comparison(report, pairs) if before else "",
        f"<h2>Figures</h2><p>Greedy answers unless sampled or of k samples.</p>{wide_table(head, rows)}",
        _charts(models),
        _by_kind(models),
        _changed(report, pairs) if before else "",
        _picked(answers[name]),
        tables({key: value for key, value in config.items() if value is not None}, environment),
    )
    title, under = safe(name), " · ".join(map(safe, facts))
    return PAGE.substitute(title=title, facts=under, body="\n".join(parts))


def _contamination(seen: int, config: dict[str, Any]) -> str:
    if not seen:
        return f"no problem also in {config['train_data']}"
    left_out = ", left out" if config["contaminated"] == "drop" else ""
    return f"{count(seen, 'problem')} also in {config['train_data']}{left_out}"


def _tiles(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    low, high = report["ci95"]
    interval = f"95% interval {low:.1%} to {high:.1%}, n = {report['n']}"
    tiles = [("strict accuracy", f"{report['accuracy_strict']:.1%}", interval)]
    if "difference" in report:
        low, high = report["difference"]["ci95"]
        gain = points(report["difference"]["accuracy_strict"])
        under = f"points; 95% interval {points(low)} to {points(high)}, p = {number(report['p_value'])}"
        tiles.append(("difference to the baseline", gain, under))
    undecided = f"{report['undecided_rate']:.1%} undecided, {report['format_rate']:.1%} well formed"
    tiles.append(("lenient accuracy", f"{report['accuracy_lenient']:.1%}", undecided))
    cut = f"median {report['median_tokens']:.0f}; {report['truncation_rate']:.1%} truncated"
    return [*tiles, ("tokens a completion", f"{report['mean_tokens']:.1f}", cut)]


# ------------------------------------------------------------------------------------------------------------
# Two models


def _comparison(report: dict[str, Any], pairs: Sequence[Pair]) -> str:
    """How sure the difference is."""
    before, after = report["baseline"]["model"], report["model"]
    gain, low, high = map(points, (report["difference"]["accuracy_strict"], *report["difference"]["ci95"]))
    told = (
        f"{after} solves {count(len(_gained(pairs)), 'problem')} that {before} does not, and does not solve "
        f"{len(_lost(pairs))} that it does: {gain} points, 95% interval {low} to {high}. Were both equally "
        f"good, a difference at least as large would be seen with probability {number(report['p_value'])} "
        "(McNemar's test, exact)."
    )
    if report["p_value"] >= SIGNIFICANT:
        told += " That does not tell the two apart: chance alone often does as much."
    return f"<h2>Beside the baseline</h2><p>{safe(told)}</p>"


def _gained(pairs: Sequence[Pair]) -> list[Pair]:
    return [(before, after) for before, after in pairs if _is_right(after) and not _is_right(before)]


def _lost(pairs: Sequence[Pair]) -> list[Pair]:
    return [(before, after) for before, after in pairs if _is_right(before) and not _is_right(after)]


def _is_right(row: dict[str, Any]) -> bool:
    return row["correct"] is True


def _changed(report: dict[str, Any], pairs: Sequence[Pair]) -> str:
    """Problems that only one of the two models solves, with both answers."""
    names = (report["baseline"]["model"], report["model"])
    told = ""
    for title, some in (("Gained", _gained(pairs)), ("Lost", _lost(pairs))):
        if some:
            shown = "".join(_pair(pair, names) for pair in some[:PICKED])
            told += f"<h2>{title}</h2><p>{min(len(some), PICKED)} of {len(some)}.</p>{shown}"
    return told


def _pair(pair: Pair, names: Sequence[str]) -> str:
    cards = [article(row, _facts(row), name) for row, name in zip(pair, names, strict=True)]
    return beside(pair[0]["question"], cards)


# ------------------------------------------------------------------------------------------------------------
# Curves and tables


def _charts(models: Mapping[str, dict[str, Any]]) -> str:
    """Accuracy over the difficulty, where it is a number, and the chance of a right one over the samples."""
    charts = []
    for kind, title in KINDS.items():
        lines = [_accuracy_over(kind, name, figures) for name, figures in models.items()]
        if all(line and len(line.points) > 2 for line in lines):
            furthest = int(max(line.points[-1][0] for line in lines))
            along = kind.removesuffix("s")
            charts.append(draw_chart(f"Accuracy {title.lower()}", lines, furthest, True, LARGE, along))
    if all(len(figures.get("pass_at", ())) > 1 for figures in models.values()):
        lines = [
            Series(name, [(int(k), share) for k, share in figures["pass_at"].items()], [], marked=True)
            for name, figures in models.items()
        ]
        title = "A right one among k samples (pass@k)"
        charts.append(draw_chart(title, lines, int(lines[0].points[-1][0]), True, LARGE, "sample"))
    return f'<div class="large">{"".join(charts)}</div>' if charts else ""


def _accuracy_over(kind: str, name: str, figures: dict[str, Any]) -> Series | None:
    told = figures["by"].get(kind, {})
    numbers = [re.fullmatch(r"\D*(\d{1,3})\D*", text) for text in told]
    if not all(numbers):
        return None
    places = [int(found[1]) for found in numbers]
    rows = list(zip(places, told.values(), strict=True))
    band = [(place, *row["ci95"]) for place, row in rows]
    return Series(name, [(place, row["accuracy_strict"]) for place, row in rows], band, marked=True)


def _by_kind(models: Mapping[str, dict[str, Any]]) -> str:
    """Accuracy by how hard the data says that a problem is, and by how many steps its solution has."""
    told = ""
    first = next(iter(models.values()))["by"]
    for kind, title in KINDS.items():
        if kind in first:
            head = [kind.removesuffix("s"), "problems", *models]
            rows = [
                [text, row["n"], *(_accuracy(figures["by"][kind][text]) for figures in models.values())]
                for text, row in first[kind].items()
            ]
            told += f"<h2>{title}</h2>{wide_table(head, rows)}"
    return told


def _accuracy(row: dict[str, Any]) -> str:
    return "{:.1%} ({:.1%} to {:.1%})".format(row["accuracy_strict"], *row["ci95"])


# ------------------------------------------------------------------------------------------------------------
# Answers

GREEDY = "greedy"


def _picked(rows: Sequence[dict[str, Any]]) -> str:
    """Answers of each kind that stands out, one a problem; kinds of which there is none are named."""
    kinds = _picks(rows)
    columns = [
        column(title, (article(row, _facts(row)) for row in _one_a_problem(some)[:PICKED]), note)
        for title, some, note in kinds
        if some
    ]
    missing = ", ".join(title.lower() for title, some, _ in kinds if not some)
    note = f'<p class="note">Of these there is none: {safe(missing)}.</p>' if missing else ""
    told = f"Among {count(len(rows), 'answer')}, one a problem."
    return (
        f"<h2>Answers that stand out</h2><p>{safe(told)}</p><div class='pair'>{''.join(columns)}</div>{note}"
    )


def _picks(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]], str]]:
    """Title, answers and a note of each kind; what says most stands first."""

    def worth(row: dict[str, Any]) -> tuple[float, int]:
        return row["reward"] or 0.0, -row["tokens"]

    right = sorted((row for row in rows if row["correct"] is True), key=worth, reverse=True)
    wrong = sorted((row for row in rows if row["correct"] is False), key=worth)
    fooled = [row for row in reversed(wrong) if row["chosen"]]
    lenient = [row for row in wrong if row["correct_lenient"] is True]
    undecided = [row for row in rows if row["correct"] is None]
    cut = [row for row in rows if row["truncated"]]

    def told(some: Sequence[dict[str, Any]], what: str) -> str:
        return f"{count(len(some), 'answer')} {what}"

    return [
        ("Best", right, told(right, "right by the strict judge; the best paid, then the shortest.")),
        ("Worst", wrong, told(wrong, "wrong by the strict judge; the worst paid, then the longest.")),
        ("Rewarded, and wrong", fooled, told(fooled, "that the rewards chose among the samples.")),
        ("Right by the lenient judge alone", lenient, told(lenient, "not marked as it was asked for.")),
        ("Undecided", undecided, told(undecided, "that could not be judged in time.")),
        ("Truncated", cut, told(cut, "cut off at the limit.")),
    ]


def _one_a_problem(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    problems: dict[int, dict[str, Any]] = {}
    for row in rows:
        problems.setdefault(row["number"], row)
    return list(problems.values())


def _facts(row: dict[str, Any]) -> list[str]:
    extracted = "nothing" if row["extracted"] is None else row["extracted"]
    facts = [f"answer {extracted}", f"expected {row['gold']}", row["how"]]
    facts += [f"reward {row['reward']:.3g}"] if row["reward"] is not None else []
    facts += ["chosen"] if row["chosen"] else []
    facts += [count(row["tokens"], "token")]
    facts += ["not well formed"] if not row["well_formed"] else []
    return [*facts, "cut off"] if row["truncated"] else facts
