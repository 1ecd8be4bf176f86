"""Runs to look into: live curves, every rollout with what it earned and why, canaries through time."""

import json
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from runs.records import find_runs, read_ends, read_rows
from runs.report import report_page

REFRESH_S = 10
FILTERS = {
    "all": lambda row: True,
    "rewarded but strictly wrong": lambda row: row["reward"] > 0 and row["correct"] is False,
    "truncated": lambda row: row["finish_reason"] == "length",
    "undecided": lambda row: row["correct"] is None and row["gold"] is not None,
}
COLUMNS = (
    *("#", "step", "group", "correct", "extracted", "gold", "reward", "by part", "advantage", "tokens"),
    "completion",
)
ROWS = 200  # shown at once
CHARACTERS = 120  # of a completion in the table; whole when it is clicked


class RunsPage:
    """What lies under a folder of runs; only what is found there can be chosen."""

    def __init__(self, folder: Path) -> None:
        """Look into the runs under a folder."""
        self.folder = folder

    def names(self) -> list[str]:
        """The runs, the latest first."""
        return [str(run.relative_to(self.folder)) for run in reversed(find_runs(self.folder))]

    def run(self, name: str | None) -> Path | None:
        """The folder of a run that is there, None for anything else."""
        return self.folder / name if name in self.names() else None

    def report(self, name: str | None) -> str:
        """The run's report, in a frame that runs no script."""
        run = self.run(name)
        if run is None:
            return f"<p>No run under {escape(str(self.folder))} yet: train one.</p>"
        # One line, as Markdown wants its HTML.
        page = escape(report_page(run), quote=True).replace("\n", "&#10;").replace("\r", "&#13;")
        return f'<iframe sandbox="" srcdoc="{page}" title="report" class="report"></iframe>'

    def rollouts(
        self, name: str | None, which: str, step: str = "", group: str = ""
    ) -> tuple[list[list[Any]], list[dict[str, Any]]]:
        """The table's cells, and the rollouts that they are of: what passes the filters, of a step or of the
        run's beginning and end, a megabyte each. A step or group that is no number is none in particular.
        """
        rows = self._rows(name, which, _number(step), _number(group))
        return [_cells(number, row) for number, row in enumerate(rows, start=1)], rows

    def whole(self, rows: list[dict[str, Any]], event: gr.SelectData) -> str:
        """The rollout that was clicked, whole, with its rewards by part.

        Found by its number among the `rows` that were shown, however the table is sorted and whatever the run
        has written since.
        """
        row = rows[int(event.row_value[0]) - 1]
        told = {
            key: row[key] for key in ("question", "gold", "extracted", "correct", "rewards", "finish_reason")
        }
        return json.dumps(told, ensure_ascii=False, indent=1) + "\n\n" + row["completion"]

    def canaries(self, name: str | None) -> list[list[Any]]:
        """How the same problems were answered, problem by problem, step by step."""
        run = self.run(name)
        rows = read_rows(run / "canaries.jsonl")[0] if run and (run / "canaries.jsonl").is_file() else []
        order = {row["question"]: number for number, row in reversed(list(enumerate(rows)))}
        rows.sort(key=lambda row: (order[row["question"]], row["step"]))
        return [[row["question"], row["step"], row["correct"], row["completion"]] for row in rows]

    def _rows(
        self, name: str | None, which: str, step: int | None, group: int | None
    ) -> list[dict[str, Any]]:
        run = self.run(name)
        if run is None or not (run / "rollouts.jsonl").is_file():
            return []

        def keeps(row: dict[str, Any]) -> bool:
            return FILTERS[which](row) and group in (None, row["group"])

        if step is not None:
            return [row for row in _of_step(run / "rollouts.jsonl", step) if keeps(row)][:ROWS]
        first, last = (list(filter(keeps, rows)) for rows in read_ends(run / "rollouts.jsonl"))
        half = ROWS // 2
        return first[:half] + [row for row in last[-half:] if row not in first[:half]]

    def build(self) -> None:
        """Lay out the components and connect them; call it inside `gr.Blocks`."""
        names = self.names()
        with gr.Row():
            chosen = gr.Dropdown(names, value=names[0] if names else None, label="Run", elem_id="run")
            which = gr.Dropdown(list(FILTERS), value="all", label="Rollouts", elem_id="which")
            # Not gr.Number, which takes no number for 0.
            typed = {"placeholder": "all", "max_lines": 1, "max_length": 12}
            step = gr.Textbox("", label="Of step", elem_id="step", **typed)
            group = gr.Textbox("", label="Of group", elem_id="group", **typed)
        # Not gr.HTML, which evaluates strings as scripts, and the page's policy lets nobody do that. What is
        # ours alone stands outside the frame, and inside it nothing runs.
        report = gr.Markdown(sanitize_html=False, latex_delimiters=[], elem_id="report")
        table = gr.Dataframe(headers=list(COLUMNS), label="Rollouts", interactive=False, elem_id="rollouts")
        rows = gr.State([])  # of the table
        rollout = gr.Textbox(label="The rollout clicked on", lines=8, interactive=False, elem_id="rollout")
        canaries = gr.Dataframe(
            headers=["question", "step", "correct", "completion"],
            label="The same problems through time",
            interactive=False,
            wrap=True,
            elem_id="canaries",
        )
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        asked = [chosen, which, step, group]
        chosen.focus(lambda: gr.Dropdown(self.names()), None, chosen, **hidden)
        # None is when the page is loaded and whenever something asked with changes; then as runs go on.
        for event in (None, gr.Timer(REFRESH_S).tick):
            gr.on(event, self.report, chosen, report, **hidden)
            gr.on(event, self.canaries, chosen, canaries, **hidden)
        gr.on(None, self.rollouts, asked, [table, rows], **hidden)
        table.select(self.whole, rows, rollout, **hidden)


def _cells(number: int, row: dict[str, Any]) -> list[Any]:
    parts = [f"{name} {value:g}" for name, value in row["rewards"].items() if value is not None]
    cells = row | {"#": number, "by part": ", ".join(parts), "completion": _short(row["completion"])}
    values = (cells.get(column) for column in COLUMNS)
    return [round(value, 3) if isinstance(value, float) else value for value in values]


def _number(typed: str) -> int | None:
    return int(typed) if typed.strip().isdecimal() else None


def _of_step(path: Path, step: int) -> list[dict[str, Any]]:
    """The rollouts of a step; a line begins with its step, and only that is read of the others'."""
    begins = f'{{"step": {step},'
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.startswith(begins) and line.endswith("\n")]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= CHARACTERS else line[:CHARACTERS] + "…"
