"""The report: what it tells, what it survives, and that nothing a model writes becomes HTML."""

import json
import math
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from written import evaluation, jsonl, metrics_row, rollout, write_run

from runs import charts, figures, records
from runs.charts import PANELS
from runs.comparison import comparison_page
from runs.records import read_run
from runs.report import write_report

HOSTILE = (
    "</pre></article><script>alert('owned')</script><img src=x onerror=alert(1)>\"'&amp;\x00\x1b[2J\u202e"
)


class Page(HTMLParser):
    """A report, taken apart: its tags, every attribute, and the text of each kind of element."""

    VOID = frozenset({"meta"})

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], {}, []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    @property
    def text(self):
        return " ".join(self.texts["body"][0].split())

    @property
    def charts(self):
        """Titles of the charts."""
        return [unescape(title) for title in re.findall("<figcaption><h3>([^<]*)</h3>", self.source)]


@pytest.fixture
def folder(tmp_path):
    """A GRPO run of 60 steps."""
    return write_run(tmp_path / "my run")


# ------------------------------------------------------------------------------------------------------------
# What it tells


def test_headline_names_the_run_and_gives_first_and_last_accuracy_steps_and_time(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path)
    assert page.texts["title"][0] == "my run"
    assert "my run arithmetic · dapo · seed 7 · from outputs/sft/final" in spaced(page)
    assert "first validation accuracy 10.0% before training; 95% interval 5.0% to 15.0%, n = 200" in spaced(
        page
    )
    assert "last validation accuracy 50.0% after step 60; 95% interval 45.0% to 55.0%" in spaced(page)
    assert "best 60.0% after step 30" in spaced(page)
    assert "steps 60 finished" in spaced(page)
    assert "time in steps 2 min" in spaced(page)
    assert "options high: 9" in spaced(page)
    assert "torch 2.13.0" in spaced(page)
    assert "commit –" in spaced(page)
    assert "train_grpo.py --data 'a b'" in spaced(page)
    assert page.attributes.count(("class", "tiles")) == 1


def spaced(page):
    """The page's text with elements apart."""
    return " ".join(
        re.sub(r"<[^>]*>", " ", page.source.partition("<body>")[2]).replace("&#x27;", "'").split()
    )


def test_every_metric_is_in_a_chart_known_or_not(folder):
    rows = [metrics_row(step, **{"rollout/odd_fraction": 0.25}) for step in range(1, 61)]
    for row in rows:
        row["critic/explained_variance"] = row["step"] / 60
    jsonl(folder / "metrics.jsonl", rows)
    page = Page(write_report(folder))
    assert page.charts == [
        "Accuracy",
        "Mean reward",
        "Loss",
        "Reward by part, unweighted",
        "Groups without a signal",
        "Gradient norm",
        "Time per step",
        "Explained variance",
    ]
    # One that never changes is a number.
    assert "the same in every step: Undecided fraction 0%; Odd fraction 25%." in page.text


def test_what_is_zero_but_for_rounding_is_not_drawn(folder):
    rounding = {
        "policy/loss": 1e-9,
        "policy/approx_kl": 3e-13,
        "policy/kl": 0.01,
        "policy/clip_fraction": 0.0,
    }
    rows = [metrics_row(step, **rounding) for step in range(1, 61)]
    for row in rows:
        row["policy/approx_kl"] *= row["step"]
    jsonl(folder / "metrics.jsonl", rows)
    page = Page(write_report(folder))
    assert "Loss" not in page.charts
    assert "Clipped tokens" not in page.charts
    kl = page.source.partition("<h3>KL</h3>")[2].partition("</figure>")[0]
    assert re.findall(r"</i>([^<]*)<b>", kl) == ["to the reference"]
    told = "the same in every step: Loss 0; KL within an update 0; Clipped tokens 0%; Undecided fraction 0%."
    assert told in page.text
    rows[30]["policy/clip_fraction"] = 1e-3
    jsonl(folder / "metrics.jsonl", rows)
    assert "Clipped tokens" in Page(write_report(folder)).charts


def test_the_spread_of_rewards_is_one_chart(folder):
    spread = {"min": 0.0, "max": 1.0, "std": 0.5}
    names = ("train/reward", "rewards/correct", "rewards/my.py:new/old")
    extra = {f"{name}/{figure}": value for name in names for figure, value in spread.items()}
    extra["rewards/my.py:new/old"] = 1.0
    jsonl(folder / "metrics.jsonl", [metrics_row(step, **extra) for step in range(1, 61)])
    page = Page(write_report(folder))
    assert page.charts[3:5] == ["Reward by part, unweighted", "Standard deviation of rewards"]
    assert not [title for title in page.charts if title in ("Min", "Max", "Std")]
    chart = page.source.partition("<h3>Standard deviation of rewards</h3>")[2].partition("</figure>")[0]
    assert re.findall(r"</i>([^<]*)<b>([^<]*)</b>", chart) == [("correct", "0.5"), ("my.py:new/old", "0.5")]


def test_known_metrics_are_logged_by_the_scripts():
    source = "".join(Path(charts.__file__).parents[1].joinpath(name).read_text() for name in SCRIPTS)
    for _, _, keys in PANELS:
        for key in keys:
            # `policy/<name>` is put together from the names of the loss's figures.
            assert f'"{key}"' in source or f'"{key.partition("/")[2]}"' in source, key


SCRIPTS = ("train_grpo.py", "train_sft.py", "rollouts.py", "updates.py", "losses.py")


def test_points_stand_where_the_axes_say(folder):
    page = Page(write_report(folder))
    accuracy = page.source.partition("<h3>Accuracy</h3>")[2].partition("</figure>")[0]
    # Gridlines and labels of the value axis, from the drawing itself.
    grid = [float(y) for y in re.findall(r'class="grid" d="M[\d.]+,([\d.]+)H', accuracy)]
    labels = [float(text) / 100 for text in re.findall(r'class="end">([\d.]+)%<', accuracy)]
    steps = [
        (float(x), float(s))
        for x, s in re.findall(r'<text x="([\d.]+)" y="\d+" class="mid">(\d+)<', accuracy)
    ]
    assert labels[0] == 0
    assert labels[-1] >= 0.65  # the top of the highest interval
    assert steps[0][1] == 0
    assert steps[-1][1] == 60

    def value(y):
        return labels[0] + (y - grid[0]) / (grid[-1] - grid[0]) * (labels[-1] - labels[0])

    def step(x):
        return (x - steps[0][0]) / (steps[-1][0] - steps[0][0]) * 60

    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', accuracy)
    drawn = [(step(float(x)), value(float(y))) for x, y in circles]
    assert [s for s, _ in drawn] == pytest.approx([0, 30, 60], abs=0.1)
    assert [v for _, v in drawn] == pytest.approx([0.1, 0.6, 0.5], abs=0.003)
    band = re.search(r'class="band" points="([^"]*)"', accuracy)[1].split()
    edges = [value(float(point.partition(",")[2])) for point in band]
    assert edges == pytest.approx([0.15, 0.65, 0.55, 0.45, 0.55, 0.05], abs=0.003)
    assert "<title>step 30: 60%, 55.0% to 65.0%</title>" in accuracy


def test_a_spike_in_a_long_run_is_still_drawn():
    points = [(step, 1.0) for step in range(20_000)]
    points[12_345] = (12_345, 50.0)
    kept = charts._thin(points)
    assert len(kept) <= 500
    assert (12_345, 50.0) in kept
    assert kept == sorted(kept)
    smooth = charts._smooth(points)
    assert len(smooth) == 150
    assert [smooth[0][0], smooth[-1][0]] == [0, 19_999]
    assert max(value for _, value in smooth) == pytest.approx(1 + 49 / 1001)


def test_what_emerges_in_thoughts_is_drawn_over_the_evaluations(folder):
    emerging = [{"thinking_rate": 0.1 * i, "thought_tokens": 5.0 * i} for i in (1, 2, 3)]
    rows = [evaluation(30 * i, 0.5) | told for i, told in enumerate(emerging)]
    for row in rows:
        row |= {"verification_rate": 0.0, "self_correction_rate": 0.02}
    jsonl(folder / "eval.jsonl", rows)
    page = Page(write_report(folder))
    assert page.charts[-2:] == ["Thoughts on held-out problems", "Tokens of thoughts on held-out problems"]
    thoughts, tokens = page.source.split("<figure>")[-2:]
    assert "<title>step 60: 30%</title>" in thoughts
    assert re.findall(r"</i>([^<]*)<b>([^<]*)</b>", thoughts) == [("thinks", "30%")]
    assert "<title>step 60: 15</title>" in tokens
    assert "Thoughts on held-out problems checks itself 0%" in page.text
    both = comparison_page({"a": read_run(folder), "b": read_run(folder)})
    assert "<h3>Thoughts on held-out problems: thinks</h3>" in both
    assert "<h3>Tokens of thoughts on held-out problems</h3>" in both


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 60, [0, 20, 40, 60]),
        (-0.03, 0.03, [-0.04, -0.02, 0, 0.02, 0.04]),
        (3e-14, 5e-14, [3e-14, 3.5e-14, 4e-14, 4.5e-14, 5e-14]),
        (1020, 1040, [1020, 1025, 1030, 1035, 1040]),
    ],
)
def test_ticks_are_round_and_hold_all_values(low, high, expected):
    assert charts._ticks(low, high, 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "shares"),
    [
        ([], False),
        ([0.0], True),
        ([1.0], True),
        ([5.0, 5.0], False),
        ([1.0, 1.0000005], False),
        ([-2.0], False),
        ([1e-20], False),
        ([-1e29, 1e29], False),
    ],
)
def test_an_axis_has_a_length_whatever_the_values(values, shares):
    ticks = charts._value_ticks(values, shares)
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 8
    assert all(ticks[0] <= value <= ticks[-1] for value in values)
    assert len({figures.number(tick, shares) for tick in ticks}) == len(ticks)  # no label stands twice


@pytest.mark.parametrize(
    ("value", "shares", "told"),
    [
        (0.7264, True, "72.6%"),
        (1.0, True, "100%"),
        (0.0002, True, "0.02%"),
        (0.0, False, "0"),
        (-0.02, False, "−0.02"),
        (31.318, False, "31.32"),
        (3.33e-5, False, "3.33e−5"),
        (123456.0, False, "1.23e5"),
    ],
)
def test_numbers_are_short(value, shares, told):
    assert figures.number(value, shares) == told


@pytest.mark.parametrize(
    ("seconds", "told"), [(2.84, "2.8 s"), (42, "42 s"), (420, "7 min"), (8000, "2 h 13 min")]
)
def test_durations_read_as_people_say_them(seconds, told):
    assert figures.duration(seconds) == told


# ------------------------------------------------------------------------------------------------------------
# Samples


def test_samples_are_one_a_group_of_the_first_step_and_the_last(folder):
    page = Page(write_report(folder))
    assert page.texts["pre"][:8] == [
        *(f"step 1, group {group}, sample 0" for group in range(4)),
        *(f"step 60, group {group}, sample 0" for group in range(4)),
    ]
    assert [text for text in page.texts["h3"] if text.startswith("Step")] == ["Step 1", "Step 60"]
    fact = "correct answer 3 · expected 3 · reward 1.1 (correct 1, format –) · advantage +0.50 · 12 tokens"
    assert spaced(page).partition("Completions that stand out")[0].count(fact) == 8


def test_completions_that_stand_out_are_picked_from_the_end_one_a_group(folder):
    rows = [
        rollout(step, group, f"{step}.{group}.{sample}", reward=0.5, advantage=0.0, correct=None)
        for step in (1, 2)
        for group in range(5)
        for sample in range(2)
    ]
    change = {row["completion"]: row for row in rows}
    change["2.0.0"] |= {"reward": 3.0, "advantage": 1.0}
    change["2.0.1"] |= {"reward": 2.0}  # of a group that is shown already
    change["1.3.1"] |= {"reward": 1.0, "advantage": -2.0}
    change["1.4.0"] |= {"reward": -1.0, "advantage": None}  # not learned from
    change["1.0.0"] |= {"correct": False, "advantage": 0.5, "reward": 0.1}
    change["1.1.0"] |= {"correct": False, "advantage": 0.5, "reward": 0.9}
    change["1.2.0"] |= {"correct": False, "advantage": -0.5}
    change["2.4.0"] |= {"correct": True, "advantage": 0.5}
    jsonl(folder / "rollouts.jsonl", rows)
    page = Page(write_report(folder))
    assert "Among the last 20, step 1 to 2." in page.text
    picked = {}
    for part in page.source.partition("Completions that stand out")[2].split("<h3>")[1:]:
        title, _, shown = part.partition("</h3>")
        picked[title] = re.findall(r"<pre>([^<]*)</pre>", shown)
    assert picked["Best paid"][:2] == ["2.0.0", "1.3.1"]
    assert picked["Worst paid"][:2] == ["1.4.0", "1.0.0"]
    assert picked["Most surprising"][:2] == ["1.3.1", "2.0.0"]
    assert picked["Rewarded, and wrong"] == ["1.1.0", "1.0.0"]
    assert "2 completions: wrong by the strict judge" in page.text
    assert max(map(len, picked.values())) == 3


def test_every_reward_has_its_weight_and_spread_in_a_table(folder):
    weights = {"correct": 1.0, "format": 0.1, "model:x": 1.0}
    (folder / "config.yaml").write_text(json.dumps({"rewards": weights}))
    rows = [metrics_row(step) for step in range(1, 61)]
    for row in rows:
        row |= {f"train/reward/{name}": 0.25 for name in ("min", "max", "std")}
        row |= {"rewards/correct/min": 0.0, "rewards/correct/max": 1.0, "rewards/correct/std": 0.49}
    jsonl(folder / "metrics.jsonl", rows)
    page = Page(write_report(folder))
    (table,) = re.findall(r'<table class="wide">(.*?)</table>', page.source)
    cells = [re.findall(r"<t[hd]>([^<]*)</t[hd]>", row) for row in table.split("</tr>")[1:-1]]
    assert cells == [
        ["in all", "", "0.01", "0.6", "0.25", "0.25", "0.25"],
        ["correct", "1", "0.01", "0.6", "0.49", "0", "1"],
    ]


def test_incidents_are_told_with_their_cause_and_where_to_look(folder):
    assert "Incidents" not in Page(write_report(folder)).texts["h2"]
    (folder / "incidents").mkdir()
    for step in range(1, 31):
        incident = {"step": step, "causes": [None, f"the loss is nan {HOSTILE}", None], "rows": []}
        (folder / "incidents" / f"step-{step:06d}.json").write_text(json.dumps(incident))
    page = Page(write_report(folder))
    assert "30 steps with updates that were not finite; the last 20." in page.text
    told = page.source.partition("<h2>Incidents</h2>")[2].partition("</table>")[0]
    assert re.findall(r"<tr><th>(\d+)</th><td>1 of 3</td>", told) == [str(step) for step in range(11, 31)]
    assert "incidents/step-000030.json" in told
    assert "script" not in page.tags


def test_a_completion_that_dynamic_sampling_left_out_is_said_to_be(folder):
    jsonl(folder / "rollouts.jsonl", [rollout(1, 0, "x", advantage=None)])
    assert "reward 1.1 (correct 1, format –) · not learned from" in spaced(Page(write_report(folder)))


def test_verdict_has_three_outcomes_and_a_cut_is_told(folder):
    jsonl(
        folder / "rollouts.jsonl",
        [
            rollout(1, group, "x", correct=correct, extracted=None, finish_reason="length")
            for group, correct in enumerate((True, False, None))
        ],
    )
    told = spaced(Page(write_report(folder))).partition("Completions that stand out")[0]
    for verdict in ("correct", "wrong", "undecided"):
        assert f"{verdict} answer nothing" in told
    assert told.count("cut off") == 3


def test_only_the_ends_of_a_large_file_are_read_and_cut_lines_are_left_out(folder, monkeypatch):
    monkeypatch.setattr(records, "ROLLOUT_BYTES", 2000)
    path = folder / "rollouts.jsonl"
    with open(path, "r+b") as file:
        size = path.stat().st_size
        file.seek(3000)
        file.write(b"\xff" * (size - 6000))  # what lies between is not even looked at
    pre = Page(write_report(folder)).texts["pre"]
    assert pre[0] == "step 1, group 0, sample 0"
    assert [text for text in pre if text.startswith("step 60")]
    assert all(re.fullmatch(r"step (1|60), group \d, sample \d", text) for text in pre[:-1])


def test_a_long_completion_is_shortened_in_the_middle(folder):
    jsonl(folder / "rollouts.jsonl", [rollout(1, 0, "a" * 10_000 + "the end")])
    text = Page(write_report(folder)).texts["pre"][0]
    assert "[… 6007 characters left out …]" in text
    assert text.startswith("aaa")
    assert text.endswith("the end")
    assert len(text) < 4100


# ------------------------------------------------------------------------------------------------------------
# Hostile and broken


def test_nothing_that_a_run_holds_becomes_html(tmp_path):
    # Attached to every field that is shown: a model's text, names from a user's data, reward names, settings.
    folder = tmp_path / "<script>alert('run')<"
    folder.mkdir()
    json_config = {
        "model": HOSTILE,
        "data": HOSTILE,
        "algo": HOSTILE,
        "seed": HOSTILE,
        HOSTILE: {HOSTILE: HOSTILE},
    }
    (folder / "config.yaml").write_text(json.dumps(json_config))
    environment = {"packages": {HOSTILE: HOSTILE}, "command": [HOSTILE], HOSTILE: HOSTILE}
    (folder / "environment.json").write_text(json.dumps(environment))
    jsonl(
        folder / "metrics.jsonl",
        [metrics_row(1, **{f"rewards/{HOSTILE}": 1.0, f"x/{HOSTILE}": 1.0, HOSTILE: 2.0})],
    )
    jsonl(folder / "eval.jsonl", [{**evaluation(1, 0.5), "set": HOSTILE, "n": HOSTILE}])
    hostile = {"question": HOSTILE, "gold": HOSTILE, "extracted": HOSTILE, "rewards": {HOSTILE: 1.0}}
    jsonl(folder / "rollouts.jsonl", [rollout(1, 0, HOSTILE, **hostile)])
    page = Page(write_report(folder))
    assert {"script", "img", "iframe", "link", "object", "a"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.source.count("<style>") == 1
    assert page.texts["pre"][0].startswith("</pre></article><script>alert('owned')</script>")
    assert page.texts["pre"][0].endswith("\"'&amp;[U+0000][U+001B][2J[U+202E]")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.source)


def test_the_page_needs_nothing_from_anywhere(folder):
    source = write_report(folder).read_text()
    assert not re.search(r"https?:|url\(|@import|<link|<script|src=", source)
    assert "default-src 'none'; style-src 'unsafe-inline'" in source
    assert "prefers-color-scheme: dark" in source


def test_text_without_utf8_is_survived(folder):
    (folder / "rollouts.jsonl").write_text(json.dumps(rollout(1, 0, "lone \ud800 surrogate")) + "\n")
    assert Page(write_report(folder)).texts["pre"][0] == "lone ? surrogate"


@pytest.mark.parametrize(
    "missing",
    [
        {"config.yaml"},
        {"environment.json"},
        {"metrics.jsonl"},
        {"eval.jsonl"},
        {"rollouts.jsonl"},
        {"config.yaml", "environment.json", "metrics.jsonl", "eval.jsonl", "rollouts.jsonl"},
    ],
)
def test_a_missing_or_empty_file_leaves_its_part_out(folder, missing):
    for name in missing:
        (folder / name).unlink()
    page = Page(write_report(folder))
    assert page.texts["h1"] == ["my run"]
    assert ("Curves" in page.texts.get("h2", [])) == (not {"metrics.jsonl", "eval.jsonl"} <= missing)
    assert ("Completions" in page.texts.get("h2", [])) == ("rollouts.jsonl" not in missing)
    assert ("Configuration" in page.texts.get("h2", [])) == ("config.yaml" not in missing)
    assert ("Environment" in page.texts.get("h2", [])) == ("environment.json" not in missing)
    assert ("no evaluation was made" in page.text) == ("eval.jsonl" in missing)
    for name in missing:
        (folder / name).touch() if name.endswith("l") else None
    assert Page(write_report(folder)).source == page.source


def test_a_cold_start_has_its_loss_beside_its_accuracy_and_no_samples(folder):
    (folder / "rollouts.jsonl").unlink()
    (folder / "config.yaml").write_text("data: gsm8k\nseed: 0\ntotal_steps: 60\n")
    jsonl(folder / "metrics.jsonl", [{"step": step, "policy/loss": 1 / step} for step in range(1, 61)])
    page = Page(write_report(folder))
    assert page.charts == ["Accuracy", "Loss"]
    assert "gsm8k · supervised fine-tuning · seed 0" in page.text


def test_a_run_stopped_after_one_step_shows_its_points(folder):
    for name in ("metrics.jsonl", "eval.jsonl", "rollouts.jsonl"):
        first = (folder / name).read_text().splitlines()[0]
        (folder / name).write_text(first + "\n")
    page = Page(write_report(folder))
    assert "steps 1 of 60" in spaced(page)
    assert "only validation accuracy 10.0% before training" in spaced(page)
    assert [text for text in page.texts["h3"] if text.startswith("Step")] == ["Step 1"]
    assert "polyline" not in page.tags
    assert page.tags.count("circle") == 10  # the evaluation and nine metrics that are not zero


def test_values_that_are_not_finite_are_left_out_and_counted(folder):
    rows = [metrics_row(step) for step in range(1, 61)]
    rows[10]["policy/loss"] = math.nan
    rows[20]["policy/loss"] = math.inf
    rows[30]["policy/loss"] = 1e300
    for row in rows:
        row["policy/grad_norm"] = math.nan
    rows[5]["time/update_s"] = math.nan
    jsonl(folder / "metrics.jsonl", rows)
    page = Page(write_report(folder))
    loss = page.source.partition("<h3>Loss</h3>")[2].partition("</figure>")[0]
    assert "3 values not finite, left out" in loss
    norm = page.source.partition("<h3>Gradient norm</h3>")[2].partition("</figure>")[0]
    assert "60 values not finite, left out" in norm
    assert "time in steps 2 min" in spaced(page)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', page.source)


def test_a_line_that_a_kill_cut_is_left_out_and_counted(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "train/rew')
    with open(folder / "rollouts.jsonl", "a") as file:
        file.write('{"step": 61, "gro')
    page = Page(write_report(folder))
    assert "1 unreadable line left out." in page.text
    assert "steps 60 finished" in spaced(page)


def test_training_pays_no_import_for_the_report():
    code = "import sys, runs.report; print(sorted({'matplotlib', 'numpy', 'torch'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    told = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_the_same_problems_stand_beside_each_other_through_time(folder):
    rows = [
        {"step": step, "question": "<7 + 8?>", "correct": step == 5, "completion": f"<b>at {step}</b>"}
        for step in (0, 5)
    ]
    jsonl(folder / "canaries.jsonl", rows)
    source = Page(write_report(folder)).source.partition("The same problems through time")[2]
    assert "&lt;7 + 8?&gt;" in source
    assert source.index("&lt;b&gt;at 0&lt;/b&gt;") < source.index("&lt;b&gt;at 5&lt;/b&gt;")
    assert source.index('class="wrong"') < source.index('class="correct"')
