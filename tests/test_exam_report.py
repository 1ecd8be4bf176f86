"""The report of an evaluation: what it tells of two models, and what it survives."""

import json
import re
from dataclasses import replace

import pytest
from test_report import HOSTILE, Page, spaced

from data import Problem
from evaluate import EvaluateConfig, Result, answers_of, compare, figures_of, report_of
from exam import Answer
from runs.exam_report import exam_page, figure_rows
from runs.page import write_page


def answer(text, correct, lenient=None, tokens=10, **changes):
    told = {"truncated": False, "well_formed": True, "extracted": text} | changes
    lenient = correct if lenient is None else lenient
    return Answer(
        f"<think>{text}</think>",
        tokens,
        told.pop("truncated"),
        told.pop("well_formed"),
        correct,
        lenient,
        **told,
    )


def result(greedy, sampled=(), earned=()):
    groups = [[one] for one in greedy]
    sampled, earned = list(sampled), list(earned)
    return Result(figures_of(groups, sampled, earned), list(greedy), sampled, earned)


def two_models(n=12, **options):
    """A baseline that is right on the first third, a model that is on the second too; with samples."""
    problems = [Problem(f"question {i}", str(i), None, {"level": f"Level {1 + i % 3}"}) for i in range(n)]
    before = [answer(f"before {i}", i < n // 3) for i in range(n)]
    after = [answer(f"after {i}", 0 < i < 2 * n // 3, tokens=100 + i) for i in range(n)]
    sampled = [[answer(f"s{i}.{k}", k == 1, tokens=50 + i) for k in range(4)] for i in range(n)]
    earned = [[0.0, 0.1, 0.2, 0.1 * (i % 2)] for i in range(n)]
    results = {"sft": result(before, sampled, earned), "grpo <b>": result(after, sampled, earned)}
    config = EvaluateConfig(model="grpo <b>", baseline="sft", samples=4, **options)
    return config, results, problems


def page_of(path, config, results, problems, seen=None, environment=None):
    report = report_of(config, results, problems, seen)
    answers = {name: answers_of(problems, one) for name, one in results.items()}
    told = json.loads(json.dumps(report))  # what report.json gives back
    write_page(
        path, exam_page(told, answers, vars(config), environment or {"command": ["evaluate.py", "a b"]})
    )
    return report, Page(path)


def section(page, title):
    """The source between a heading and the next."""
    return page.source.partition(f"<h2>{title}</h2>")[2].partition("<h2>")[0]


def cells(page, title):
    (table,) = re.findall(r'<table class="wide">(.*?)</table>', section(page, title))
    return [re.findall(r"<t[hd]>([^<]*)</t[hd]>", row) for row in table.split("</tr>")[:-1]]


def thoughts(source):
    return re.findall(r"<pre>&lt;think&gt;([^<]*)&lt;/think&gt;</pre>", source)


def picked(page):
    told = {}
    for part in section(page, "Answers that stand out").split("<h3>")[1:]:
        title, _, shown = part.partition("</h3>")
        told[title] = thoughts(shown)
    return told


def test_the_page_has_the_figures_of_report_json(tmp_path):
    config, results, problems = two_models()
    report, page = page_of(tmp_path / "report.html", config, results, problems)
    head, *rows = cells(page, "Figures")
    assert head == ["", "sft", "grpo &lt;b&gt;"]
    told = {row[0]: row[1:] for row in rows if "interval" not in row[0]}
    assert told["accuracy, strict"] == ["33.3%", "58.3%"]
    assert told["best of k by reward"] == ["0.0% (k = 4)"] * 2
    assert told["pass@k"] == ["100.0% (k = 4)"] * 2
    low, high = report["ci95"]
    assert ["  95 % interval", "13.8% to 60.9%", f"{low:.1%} to {high:.1%}"] in rows
    assert sum("interval" in row[0] for row in rows) == 5
    text = spaced(page)
    assert f"strict accuracy 58.3% 95% interval {low:.1%} to {high:.1%}, n = 12" in text
    low, high = report["difference"]["ci95"]
    assert (
        f"difference to the baseline +25.0 points; 95% interval −{-100 * low:.1f} to +{100 * high:.1f}"
        in text
    )
    assert "arithmetic, test split · 12 problems · beside sft" in text
    assert "evaluate.py 'a b'" in text
    assert "samples 4" in text


def test_a_difference_that_chance_explains_is_said_to_be_one(tmp_path):
    config, results, problems = two_models()
    report, page = page_of(tmp_path / "a.html", config, results, problems)
    assert report["p_value"] == pytest.approx(0.375)
    told = spaced(page)
    assert "grpo &lt;b&gt; solves 4 problems that sft does not, and does not solve 1 that it does" in told
    assert "seen with probability 0.375 (McNemar's test, exact). That does not tell the two apart" in told
    config, results, problems = two_models(n=60)
    report, page = page_of(tmp_path / "b.html", config, results, problems)
    assert report["p_value"] < 0.05
    assert "does not tell the two apart" not in spaced(page)


def test_what_was_gained_and_lost_stands_side_by_side(tmp_path):
    _, page = page_of(tmp_path / "report.html", *two_models())
    gained, lost = section(page, "Gained"), section(page, "Lost")
    assert re.findall(r'class="question">([^<]*)<', gained) == ["question 4", "question 5", "question 6"]
    assert thoughts(gained)[:2] == ["before 4", "after 4"]
    assert "3 of 4." in gained
    assert thoughts(lost) == ["before 0", "after 0"]


def test_accuracy_by_level_is_drawn_and_told(tmp_path):
    report, page = page_of(tmp_path / "report.html", *two_models())
    head, *rows = cells(page, "By level")
    assert head == ["level", "problems", "sft", "grpo &lt;b&gt;"]
    assert [row[:2] for row in rows] == [[f"Level {level}", "4"] for level in (1, 2, 3)]
    assert rows[0][3] == "{:.1%} ({:.1%} to {:.1%})".format(0.5, *report["by"]["level"]["Level 1"]["ci95"])
    assert page.charts == ["Accuracy by level", "A right one among k samples (pass@k)"]
    assert "<title>level 2: 75%, " in page.source
    assert "<title>sample 2: 50%</title>" in page.source


@pytest.mark.parametrize("kind", ["level", "difficulty", "steps"])
def test_a_chart_names_what_is_counted_and_has_no_end(tmp_path, kind):
    config, results, problems = two_models()
    problems = [replace(problem, columns={kind: 1 + i % 3}) for i, problem in enumerate(problems)]
    _, page = page_of(tmp_path / "report.html", config, results, problems)
    chart = page.source.partition("<figure>")[2].partition("</figure>")[0]
    assert f"<title>{kind.removesuffix('s')} 2: 75%, " in chart
    assert f'aria-label="{page.charts[0]}"' in chart
    assert "<b>" not in chart  # a legend's figure is what a run came to; the hardest is nothing of the sort


def test_answers_that_stand_out_are_picked_one_a_problem(tmp_path):
    problems = [Problem(f"q{i}", "1") for i in range(6)]
    greedy = [
        answer("right, long", True, tokens=90),
        answer("right, short", True, tokens=9),
        answer("lenient", False, lenient=True, tokens=5, extracted=None),
        answer("undecided", None, tokens=5),
        answer("cut", False, tokens=64, truncated=True, well_formed=False),
        answer("wrong", False, tokens=5),
    ]
    _, page = page_of(tmp_path / "a.html", EvaluateConfig(model="m"), {"m": result(greedy)}, problems)
    assert picked(page) == {
        "Best": ["right, short", "right, long"],
        "Worst": ["cut", "lenient", "wrong"],
        "Right by the lenient judge alone": ["lenient"],
        "Undecided": ["undecided"],
        "Truncated": ["cut"],
    }
    assert "Of these there is none: rewarded, and wrong." in page.text
    told = spaced(page)
    assert "wrong answer cut · expected 1 · greedy · 64 tokens · not well formed · cut off" in told
    assert "wrong answer nothing · expected 1 · greedy · 5 tokens" in told
    assert not {"Beside the baseline", "Gained", "Lost", "By level"} & set(page.texts["h2"])
    # With samples: by what they earned, and those that were chosen though they are wrong.
    sampled = [[answer(f"{i}.{k}", k == 0 or i == 5) for k in range(2)] for i in range(6)]
    earned = [[0.1 * i, 0.3] for i in range(5)] + [[0.5, 0.45]]
    one = result(greedy, sampled, earned)
    _, page = page_of(tmp_path / "b.html", EvaluateConfig(model="m", samples=2), {"m": one}, problems)
    assert picked(page)["Best"] == ["5.0", "4.0", "3.0"]
    assert sorted(picked(page)["Rewarded, and wrong"]) == ["0.1", "1.1", "2.1"]
    assert "wrong answer 2.1 · expected 1 · sample 2 · reward 0.3 · chosen · 10 tokens" in spaced(page)


def test_contamination_is_told(tmp_path):
    for options, seen, told in [
        ({}, 3, "3 problems also in gsm8k"),
        ({"contaminated": "drop"}, 1, "1 problem also in gsm8k, left out"),
        ({}, 0, "no problem also in gsm8k"),
    ]:
        config, results, problems = two_models(train_data="gsm8k", **options)
        _, page = page_of(tmp_path / "report.html", config, results, problems, seen)
        assert f"beside sft · {told} " in spaced(page)


def test_nothing_that_a_model_or_the_data_says_becomes_html(tmp_path):
    problems = [Problem(HOSTILE, HOSTILE, None, {"level": level}) for level in (HOSTILE, "b", "c")]
    hostile = [
        answer(HOSTILE, correct, extracted=HOSTILE, truncated=True, well_formed=False)
        for correct in (True, False, None)
    ]
    config = EvaluateConfig(
        model=f"m{HOSTILE}", baseline=HOSTILE, data=HOSTILE, train_data=HOSTILE, samples=1
    )
    groups = [[one] for one in hostile]
    results = {
        config.model: result(hostile, groups, [[1.0]] * 3),
        config.baseline: result(hostile[::-1], groups, [[1.0]] * 3),
    }
    environment = {"command": [HOSTILE], HOSTILE: HOSTILE}
    _, page = page_of(tmp_path / "report.html", config, results, problems, 1, environment)
    assert {"script", "img", "iframe", "link", "object", "a"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.texts["pre"][0].startswith("<think></pre></article><script>alert('owned')</script>")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page.source)


def test_the_table_shows_what_every_model_has():
    plain, with_samples = two_models()[1].values(), result([answer("x", True)])
    rows = figure_rows({"a": next(iter(plain)).figures, "b": with_samples.figures})
    assert "pass@k" not in [row[0] for row in rows]
    helped = with_samples.figures | {"self_correction_rate": 0.25, "self_correction_accuracy": 0.5}
    assert ["corrects itself", "25.0% (right: 50%)"] in figure_rows({"b": helped})


def test_two_equal_models_differ_in_nothing(tmp_path):
    config, results, problems = two_models()
    results["grpo <b>"] = results["sft"]
    assert compare(*results.values())["p_value"] == 1.0
    _, page = page_of(tmp_path / "report.html", config, results, problems)
    assert not {"Gained", "Lost"} & set(page.texts["h2"])
