"""Runs beside each other: what ran, where it stands, how it compares; and the command that asks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from written import evaluation, jsonl, metrics_row, write_run

from runs import lock
from runs.__main__ import main
from runs.comparison import aligned, compare_table, comparison_page, differences, name_all, summary
from runs.records import find_runs, read_run


def table(text):
    """The cells of a printed table, by the first of their row."""
    rows = [re.split(" {2,}", line) for line in text.splitlines() if not line.startswith("---")]
    return {name: cells for name, *cells in rows}


def test_a_run_tells_where_it_stands(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "grpo")
    assert read_run(folder).state == "stopped"
    lock.take(folder)
    assert read_run(folder).state == "running"
    lock.release(folder, os.getpid())
    (folder / "final").mkdir()
    assert read_run(folder).state == "finished"
    (folder / lock.LOCK).write_text(json.dumps({"pid": os.getpid(), "started": 0.0, "host": "elsewhere"}))
    assert read_run(folder).state == "finished"


def test_a_summary_has_steps_time_and_accuracy_with_intervals(tmp_path):
    assert summary(read_run(write_run(tmp_path / "grpo"))) == {
        "state": "stopped",
        "method": "dapo",
        "model": "outputs/sft/final",
        "data": "arithmetic",
        "steps": "60 of 60",
        "time in steps": "2 min",
        "accuracy at first": "10.0% (5.0% to 15.0%, n = 200)",
        "accuracy now": "50.0% (45.0% to 55.0%, n = 200)",
        "best accuracy": "60.0% (55.0% to 65.0%, n = 200), after step 30",
    }


def test_a_folder_with_next_to_nothing_in_it_is_summed_up_all_the_same(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    told = summary(read_run(tmp_path))
    assert told["steps"] == "0 of –"
    assert told["accuracy now"] == told["best accuracy"] == told["model"] == "–"


def test_differences_are_of_the_fields_that_all_have_and_that_explain_something(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "a", learning_rate=1e-4, output="a", alone=1, clip_high=None)),
        read_run(write_run(tmp_path / "b", learning_rate=2e-4, output="b", clip_high=0.28)),
    ]
    assert differences(runs) == [["learning_rate", "0.0001", "0.0002"], ["clip_high", "None", "0.28"]]
    assert differences(runs[:1]) == []


def test_runs_are_found_in_subfolders_the_latest_last(tmp_path):
    late = write_run(tmp_path / "a" / "grpo")
    early = write_run(tmp_path / "b")
    (tmp_path / "not a run").mkdir()
    for path in [*early.iterdir(), *late.iterdir()]:
        os.utime(path, (1000, 1000))
    os.utime(late / "metrics.jsonl", (2000, 2000))
    assert find_runs(tmp_path) == [early, late]


def test_list_has_a_line_a_run(tmp_path, capsys):
    write_run(tmp_path / "demo" / "grpo")
    main(["list", str(tmp_path)])
    told = table(capsys.readouterr().out)
    assert told["run"] == ["state", "method", "model", "steps", "time in steps", "accuracy now"]
    row = ["stopped", "dapo", "outputs/sft/final", "60 of 60", "2 min", "50.0% (45.0% to 55.0%, n = 200)"]
    assert told["demo/grpo"] == row
    main(["list", str(tmp_path / "nowhere")])
    assert "no runs in" in capsys.readouterr().out


def test_compare_has_a_column_a_run_and_what_differs(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "a", learning_rate=1e-4)
    jsonl(write_run(tmp_path / "b", learning_rate=2e-4, seed=8) / "eval.jsonl", [evaluation(0, 0.3)])
    monkeypatch.chdir(tmp_path)
    main(["compare", "a", "b"])
    told = table(capsys.readouterr().out)
    assert told[""] == ["a", "b"]
    assert told["accuracy now"] == ["50.0% (45.0% to 55.0%, n = 200)", "30.0% (25.0% to 35.0%, n = 200)"]
    assert told["learning_rate"] == ["0.0001", "0.0002"]
    assert told["seed"] == ["7", "8"]
    assert "total_steps" not in told
    names = [row[0] for row in compare_table({name: read_run(tmp_path / name) for name in "ab"})]
    assert len(names) == len(set(names))  # what both the summary and the settings have stands once


def test_show_tells_evaluations_findings_the_last_step_and_where_things_are(tmp_path, capsys):
    folder = write_run(tmp_path / "grpo")
    finding = {"cause": "no_signal", "text": "all rewards were equal"}
    jsonl(folder / "metrics.jsonl", [metrics_row(1, watchdog=[finding]), metrics_row(2, completions=8)])
    (folder / "best").mkdir()
    main(["show", str(folder)])
    told = capsys.readouterr().out
    assert f"best model         {folder / 'best'}" in told
    assert "incidents" not in told
    assert "step 30    validation 60.0% (55.0% to 65.0%, n = 200)" in told
    assert "step 1     no_signal: all rewards were equal" in told
    assert told.rpartition("\nstep 2\n")[2].splitlines()[-1].split() == ["completions", "8"]


@pytest.mark.parametrize("command", ["show", "compare"])
def test_a_folder_without_a_run_is_refused_with_those_in_it(command, tmp_path, capsys):
    write_run(tmp_path / "demo" / "grpo")
    with pytest.raises(SystemExit) as stopped:
        main([command, str(tmp_path / "demo")])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "holds no run (no config.yaml)" in told
    assert str(tmp_path / "demo" / "grpo") in told


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart(tmp_path, monkeypatch):
    runs = [read_run(tmp_path / path) for path in ("0/grpo", "1/grpo", "1/sft")]
    assert list(name_all(runs)) == ["0/grpo", "1/grpo", "1/sft"]
    assert list(name_all(runs[1:])) == ["grpo", "sft"]
    monkeypatch.chdir(tmp_path)
    assert list(name_all([read_run(Path(".")), *runs[:1]])) == [tmp_path.name, "grpo"]
    assert list(name_all([runs[0], runs[0]])) == ["grpo"]


def charts(page):
    """What each chart of a page shows: the labels of its lines, by its title."""
    told = re.findall(r"<figcaption><h3>([^<]*)</h3>(.*?)</figcaption>", page)
    return {title: re.findall(r"</i>([^<]*)<b>", legend) for title, legend in told}


def test_report_overlays_runs_a_chart_a_metric_and_a_line_a_run(tmp_path, capsys):
    write_run(tmp_path / "a")
    rows = [
        metrics_row(step, **{"train/reward": 0.25, "critic/value_loss": 1 / step}) for step in range(1, 41)
    ]
    jsonl(write_run(tmp_path / "deeper" / "b", seed=8) / "metrics.jsonl", rows)
    main(["report", str(tmp_path / "a"), str(tmp_path / "deeper" / "b")])
    assert capsys.readouterr().out == f"{tmp_path / 'comparison.html'}\n"
    page = (tmp_path / "comparison.html").read_text()
    shown = charts(page)
    assert list(shown)[:2] == ["Accuracy", "Mean reward"]
    for title in ("Accuracy", "Mean reward", "Loss", "Reward by part, unweighted: correct", "Gradient norm"):
        assert shown[title] == ["a", "b"], title
    assert shown["Value loss"] == ["b"]
    assert shown["Time per step: update, s"] == ["a", "b"]
    assert "Undecided fraction" not in shown
    assert "Undecided fraction 0%" in page
    assert "<tr><th>seed</th><td>7</td><td>8</td></tr>" in page
    # A line of each run, and the axis of the longest.
    reward = page.partition("<h3>Mean reward</h3>")[2].partition("</figure>")[0]
    assert reward.count('class="line"') == 2
    assert re.findall(r'class="mid">(\d+)<', reward)[-1] == "60"


def test_what_never_changes_is_drawn_where_runs_differ_in_it(tmp_path):
    for name, rate, clipped in (("a", 1e-4, 0.0), ("b", 2e-4, 0.01)):
        still = {"policy/learning_rate": rate, "x/size": 8}
        rows = [metrics_row(step, **still, **{"policy/clip_fraction": step * clipped}) for step in (1, 2, 3)]
        jsonl(write_run(tmp_path / name) / "metrics.jsonl", rows)
    page = comparison_page(name_all([read_run(tmp_path / name) for name in "ab"]))
    assert charts(page)["Learning rate"] == ["a", "b"]
    assert charts(page)["Clipped tokens"] == ["a", "b"]
    assert "Size 8" in page


def test_report_of_one_run_is_its_own_and_can_go_elsewhere(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    main(["report", str(folder)])
    main(["report", str(folder), "--to", str(tmp_path / "x.html")])
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n{tmp_path / 'x.html'}\n"
    assert (folder / "report.html").read_text() == (tmp_path / "x.html").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(folder), "--to", str(tmp_path / "nowhere" / "x.html")])
    assert stopped.value.code == 2
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err


def test_nothing_that_runs_hold_becomes_html_in_a_comparison(tmp_path):
    hostile = "<script>alert(1)</script>"
    for name in ("a", "b"):
        folder = write_run(tmp_path / f"{name}{hostile.replace('/', '')}", model=hostile, **{hostile: name})
        jsonl(folder / "metrics.jsonl", [metrics_row(1, **{f"rewards/{hostile}": 1.0, f"x/{hostile}": 1.0})])
        jsonl(folder / "eval.jsonl", [{**evaluation(1, 0.5), "set": hostile, "n": hostile}])
    page = comparison_page(name_all([read_run(path) for path in find_runs(tmp_path)]))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10


def test_text_tables_are_aligned():
    assert aligned([["", "one"], ["longer", "x"]]) == "        one\n-----------\nlonger  x"


def test_asking_pays_no_import_of_what_training_needs(tmp_path):
    code = "import sys, runs.__main__; print(sorted({'torch', 'numpy', 'accelerate'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    told = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_who_reads_the_first_lines_alone_is_told_no_more(tmp_path):
    for number in range(40):
        write_run(tmp_path / f"run-{number}")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "runs", "list", str(tmp_path)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=root, text=True, **pipe) as asked:
        asked.stdout.close()  # before anything is said
        assert asked.stderr.read() == ""
        assert asked.wait() == 0
