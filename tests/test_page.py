"""The pages that reports are written on, in a real browser: nothing is asked for, nothing goes wrong."""

import json
from html import escape

import pytest
from written import jsonl, metrics_row, rollout, write_run

from data import Problem
from evaluate import EvaluateConfig, Result, answers_of, figures_of, report_of
from exam import Answer
from runs.comparison import comparison_page, name_all
from runs.exam_report import exam_page
from runs.page import write_page
from runs.records import read_run
from runs.report import write_report

HOSTILE = "</pre></style><script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x.png'>\u202e"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report with everything in it, a comparison of two runs, and the report in a frame."""
    folder = tmp_path_factory.mktemp("runs")
    grpo = write_run(folder / "grpo", rewards={"correct": 1.0})
    finding = {"cause": "no_signal", "text": HOSTILE}
    rows = [metrics_row(step) for step in range(1, 61)]
    for row in rows:
        row |= {f"rewards/correct/{figure}": 0.5 for figure in ("min", "max", "std")}
    rows[30]["watchdog"] = [finding]
    jsonl(grpo / "metrics.jsonl", rows)
    long = "a" * 2000  # without a place to break
    wrong = {"correct": False, "question": long, "gold": HOSTILE}
    jsonl(
        grpo / "rollouts.jsonl",
        [rollout(s, g, f"{HOSTILE}{long}", **wrong) for s in (1, 60) for g in range(5)],
    )
    canary = {"question": long, "gold": "3", "completion": f"{HOSTILE}{long}", "correct": True}
    jsonl(grpo / "canaries.jsonl", [canary | {"step": step} for step in range(0, 60, 5)])
    (grpo / "incidents").mkdir()
    incident = {"step": 9, "causes": ["the loss is nan"], "rows": []}
    (grpo / "incidents" / "step-000009.json").write_text(json.dumps(incident))
    write_exam(folder / "exam.html", long)
    runs = [read_run(run) for run in (grpo, write_run(folder / ("b" * 100), seed=8))]
    write_page(folder / "comparison.html", comparison_page(name_all(runs)))
    report = write_report(grpo)
    (folder / "frame.html").write_text(f'<p>log</p><iframe srcdoc="{escape(report.read_text())}"></iframe>')
    return {
        "exam": folder / "exam.html",
        "report": report,
        "comparison": folder / "comparison.html",
        "frame": folder / "frame.html",
    }


def write_exam(path, long):
    """The report of an evaluation beside a baseline, in which everything is long and hostile."""

    def said(correct):
        return Answer(f"{HOSTILE}{long}", 9, True, False, correct, correct, long)

    problems = [Problem(f"{HOSTILE}{long}", HOSTILE, None, {"level": f"Level {i % 3}"}) for i in range(9)]
    results = {}
    for name, offset in (("b" * 150, 0), ("m" * 100, 1)):
        groups = [[said((i + offset) % 3 == 0)] * 2 for i in range(9)]
        earned = [[1.0, 0.5]] * 9
        figures = figures_of([group[:1] for group in groups], groups, earned)
        results[name] = Result(figures, [group[0] for group in groups], groups, earned)
    config = EvaluateConfig(model="m" * 100, baseline="b" * 150, data=HOSTILE, samples=2)
    report = report_of(config, results, problems, None)
    answers = {name: answers_of(problems, result) for name, result in results.items()}
    write_page(path, exam_page(report, answers, vars(config), {"command": [long]}))


@pytest.fixture
def visit(browser):
    """Opens a page; at the end of the test nothing may have been asked for or gone wrong."""
    context = browser.new_context()
    asked, wrong = [], []

    def open_page(path, width, colours="light"):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=colours)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.as_uri())
        asked.remove(path.as_uri())
        return page

    yield open_page
    context.close()
    assert [url for url in asked if url != "about:srcdoc"] == []
    assert wrong == []


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize(("name", "charts"), [("report", 7), ("comparison", 7), ("exam", 2)])
def test_a_page_fits_its_window_and_every_curve_is_seen(visit, pages, name, charts, width, tmp_path):
    page = visit(pages[name], width)
    page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() != "owned"
    drawings = page.locator("svg").all()
    assert len(drawings) >= charts
    for drawing in drawings:
        box = drawing.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100
        lines = drawing.locator("polyline.line, circle").all()
        assert lines
        colours = {
            line.evaluate("e => getComputedStyle(e)[e.tagName == 'circle' ? 'fill' : 'stroke']")
            for line in lines
        }
        assert "none" not in colours


def test_what_stands_beside_each_other_on_a_wide_page(visit, pages):
    page = visit(pages["report"], 1200)
    tops = {tile.bounding_box()["y"] for tile in page.locator(".tile").all()}
    assert len(tops) == 1
    large = [figure.bounding_box() for figure in page.locator(".large figure").all()]
    assert len(large) == 2
    assert large[0]["y"] == large[1]["y"]


def test_answers_to_one_problem_stand_in_one_row(visit, pages):
    for width in (1200, 400):
        page = visit(pages["report"], width)
        cards = [card.bounding_box() for card in page.locator(".beside article").all()]
        assert len(cards) == 12
        assert len({card["y"] for card in cards}) == 1
        assert min(card["width"] for card in cards) >= 290
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_is_dark_where_the_reader_is(visit, pages):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (visit(pages["report"], 800, colours).evaluate(ground) for colours in ("light", "dark"))
    assert light == "rgb(251, 251, 249)"
    assert dark == "rgb(21, 23, 26)"


def test_a_notebook_can_show_the_report_in_a_frame(visit, pages):
    page = visit(pages["frame"], 1200)
    frame = page.frame_locator("iframe")
    frame.locator("h1").wait_for()
    assert frame.locator("h1").inner_text() == "grpo"
    assert frame.locator("svg").count() >= 7
