"""The page's tabs without a browser: which models there are, what is kept and checked, what runs show."""

import json
import math
from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio", reason="the page needs gradio")

from scripted import scripted_model  # noqa: E402
from written import jsonl, rollout, write_run  # noqa: E402

from app import AppConfig  # noqa: E402 - after the check for gradio
from data import load_problems  # noqa: E402
from inference import SamplingParams  # noqa: E402
from inference.chat import InTurn, Turn  # noqa: E402
from page import feedback  # noqa: E402
from page.chat import ChatPage, Conversation, export_link  # noqa: E402
from page.checking import arithmetic, check  # noqa: E402
from page.compare import ComparePage  # noqa: E402
from page.runs import COLUMNS, RunsPage  # noqa: E402
from page.shelf import Shelf  # noqa: E402
from train_sft import SFTConfig  # noqa: E402
from train_sft import main as train_sft  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::gradio")


def test_only_models_of_the_shelf_are_loaded_once_and_the_unused_one_goes():
    loaded = []
    names = ["a", "b", "a", "c", "d"]
    shelf = Shelf(names, lambda name: loaded.append(name) or SimpleNamespace(name=name))
    assert shelf.names == ["a", "b", "c", "d"]
    assert [shelf.get(name).name for name in ("b", "c", "a", "b", "c")] == ["b", "c", "a", "b", "c"]
    assert loaded == ["a", "b", "c"]
    shelf.get("d")  # in the place of a
    shelf.get("b")
    shelf.get("a")
    assert loaded == ["a", "b", "c", "d", "a"]
    with pytest.raises(ValueError, match="not among those"):
        shelf.get("/etc/passwd")


def answered(question, reply, limit=500):
    *_, last = scripted_model(reply).stream([Turn(question)], SamplingParams(limit), (0,))
    return Turn(question, last)


def test_liked_answers_are_examples_that_the_cold_start_reads(tmp_path):
    good = answered("2 + 3 = ?", "<think>2 + 3</think><answer>5</answer>")
    bad = answered("2 + 2 = ?", "<answer>5</answer>")
    for _ in range(2):
        assert feedback.keep(tmp_path, True, good) == tmp_path / "liked.jsonl"
    assert feedback.keep(tmp_path, False, bad) == tmp_path / "disliked.jsonl"
    read = load_problems(str(tmp_path / "liked.jsonl"), "cold_start", require_gold=False)
    assert {(p.question, p.completion) for p in read} == {(good.question, good.reading.text)}
    rows = [json.loads(line) for line in feedback.lines([good, Turn("open"), bad]).splitlines()]
    assert [row["question"] for row in rows] == [good.question, bad.question]
    quick = {"data": str(tmp_path / "liked.jsonl"), "eval_every": 0, "total_steps": 1, "warmup_steps": 0}
    assert train_sft(SFTConfig(output=str(tmp_path / "run"), **quick)) == 0
    cut = answered("long", "<think>" + "x" * 50, limit=20)
    assert feedback.lines([cut]) == export_link([cut]) == export_link([]) == ""


@pytest.mark.parametrize(
    ("question", "expression"),
    [
        ("12 + 34 + 56 = ?", "12 + 34 + 56"),
        ("What is (7 − 2) × 3?", "(7 - 2) * 3"),
        ("calculate 10 ÷ 4", "10 / 4"),
        ("12 = ?", None),
        ("What is 12?", None),
        ("Mia has 3 + 4 apples", None),
        ("x + 1 = 2", None),
        ("1 + " * 100 + "1", None),  # longer than anyone types
    ],
)
def test_arithmetic_is_told_from_other_questions(question, expression):
    assert arithmetic(question) == expression


@pytest.mark.parametrize(
    ("question", "answer", "is_right"),
    [
        ("12 + 34 + 56 = ?", "102", True),
        ("12 + 34 + 56 = ?", "101", False),
        ("(7 - 2) * 3 = ?", "15", True),
        ("10 / 4 = ?", "2.5", True),
        ("10 / 4 = ?", "5/2", True),
        ("What is love?", "15", None),
    ],
)
def test_an_answer_to_arithmetic_is_checked(question, answer, is_right):
    assert check(question, f"<think>hm</think><answer>{answer}</answer>") is is_right


def test_two_models_answer_one_question_side_by_side():
    models = {"a": scripted_model("<think>t</think><answer>3</answer>"), "b": scripted_model("4")}
    page = ComparePage(Shelf(list(models), models.get), InTurn())
    *_, (left, right, *told) = page.answer("1 + 2 = ?", 0.0, 1.0, 100, 0, 0, "b", "a")
    assert [message.content[0]["text"] for message in left] == ["1 + 2 = ?", "4"]
    assert [message.content[0]["text"] for message in right] == ["1 + 2 = ?", "t", "3"]
    assert told[0].endswith("checked: wrong")
    assert told[1].endswith("checked: right")
    with pytest.raises(gr.Error, match="Type a question"):
        next(page.answer(" ", 0.0, 1.0, 100, 0, 0, "b", "a"))


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "first")
    folder = tmp_path / "first"
    rows = [
        rollout(step=1, group=0, correct=False, reward=0.1, completion="<b>wrong</b> " * 50),
        rollout(step=2, group=0, correct=True, reward=1.0, completion="right"),
        rollout(step=2, group=0, correct=None, reward=0.0, completion="who knows"),
        rollout(step=2, group=1, correct=False, reward=0.0, completion="cut", finish_reason="length"),
    ]
    jsonl(folder / "rollouts.jsonl", rows)
    canaries = [
        {
            "step": step,
            "question": q,
            "gold": "1",
            "completion": f"{q} at {step}",
            "correct": step > 0,
            "tokens": 2,
        }
        for step in (0, 5)
        for q in ("b?", "a?")
    ]
    jsonl(folder / "canaries.jsonl", canaries)
    return RunsPage(tmp_path)


def test_runs_are_found_and_nothing_else_is_read(runs, tmp_path):
    assert runs.names() == ["first"]
    assert "srcdoc=" in runs.report("first")
    assert 'sandbox=""' in runs.report("first")
    for other in ("../first", "/etc", None, "second"):
        assert runs.run(other) is None
        assert "No run under" in runs.report(other)
        assert runs.rollouts(other, "all") == ([], [])
    assert RunsPage(tmp_path / "nowhere").names() == []


@pytest.mark.parametrize(
    ("which", "step", "group", "completions"),
    [
        ("all", "", "", 4),
        ("all", "2", "", 3),
        ("all", "2", "0", 2),
        ("all", "0", "", 0),
        ("all", "", "1", 1),
        ("rewarded but strictly wrong", "", "", 1),
        ("truncated", "", "", 1),
        ("undecided", "", "", 1),
        ("undecided", "1", "", 0),
    ],
)
def test_rollouts_are_filtered(runs, which, step, group, completions):
    table, rows = runs.rollouts("first", which, step, group)
    assert len(table) == len(rows) == completions


def test_rollouts_stand_with_their_rewards_by_part_and_the_answer_beside_gold(runs):
    table, _ = runs.rollouts("first", "all", "2", "0")
    cells = dict(zip(COLUMNS, table[0], strict=True))
    assert (cells["step"], cells["group"], cells["reward"]) == (2, 0, 1.0)
    assert cells["by part"] == "correct 1"  # the other part did not apply
    assert table[0][COLUMNS.index("extracted") :][:2] == ["3", "3"]


def test_what_is_clicked_is_shown_whole_though_the_table_is_sorted_and_the_run_goes_on(runs, tmp_path):
    table, rows = runs.rollouts("first", "all")
    assert table[0][-1].endswith("…")
    with open(tmp_path / "first" / "rollouts.jsonl", "a") as file:
        file.write(json.dumps(rollout(step=3, group=0, completion="another")) + "\n")
    for place, row in enumerate(rows):
        clicked = SimpleNamespace(index=[len(rows) - 1 - place, 3], row_value=table[place])
        assert runs.whole(rows, clicked).endswith(row["completion"])


def test_canaries_are_shown_step_by_step(runs):
    assert [(row[0], row[1]) for row in runs.canaries("first")] == [
        ("b?", 0),
        ("b?", 5),
        ("a?", 0),
        ("a?", 5),
    ]


@pytest.fixture
def laid_out(runs):
    """The page of runs as it is sent to a browser, and its parts by their names there."""
    with gr.Blocks() as page:
        runs.build()
    return page, {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}


def test_whatever_happens_a_run_is_read_once_for_each_part(runs, laid_out):
    page, parts = laid_out
    read = [(fn.fn.__name__, target) for fn in page.fns.values() for target in fn.targets]
    assert len(read) == len(set(read))
    seen = {name: {event for reader, (_, event) in read if reader == name} for name, _ in read}
    assert seen["report"] == seen["canaries"] == {"load", "change", "tick"}
    assert seen["rollouts"] == {"load", "change"}
    for part in ("run", "which", "step", "group"):
        assert ("rollouts", (parts[part]._id, "change")) in read
    assert [fn.trigger_mode for fn in page.fns.values() if fn.fn.__name__ == "rollouts"] == ["always_last"]


def test_no_step_or_group_is_too_long_to_be_read_as_a_number(runs, laid_out):
    longest = {part: "9" * (laid_out[1][part].max_length or 5000) for part in ("step", "group")}
    assert runs.rollouts("first", "all", **longest) == ([], [])


def test_the_answer_that_most_votes_give_wins_and_the_others_are_one_click_away():
    replies = iter(
        f"<think>chain {n}</think><answer>{a}</answer>"
        for n, a in enumerate(["4", "1/2", "4.0", "0.5", "0.50"])
    )
    model = scripted_model(lambda prompt: next(replies))
    page = ChatPage(Shelf(["m"], {"m": model}.get), AppConfig(model="m"), InTurn())
    conversation = Conversation()
    conversation.ask("half?")
    *_, (messages, status) = page.answer(conversation, "m", 1.0, 1.0, 100, 0, 0, 5)
    assert conversation.turns[-1].reading.answer == "1/2"
    texts = [message.content[0]["text"] for message in messages]
    assert texts[:3] == ["half?", "chain 1", "1/2"]
    assert messages[-1].metadata["title"] == "Votes: 1/2 × 3 · 4 × 2"
    assert "chain 0" in texts[-1]
    assert "vote" not in status
    assert conversation.turns[-1].model == "m"
    conversation.ask("again?")
    with pytest.raises(gr.Error, match="temperature 0"):
        next(page.answer(conversation, "m", 0.0, 1.0, 100, 0, 0, 5))


def test_a_thought_is_closed_where_the_visitor_says():
    def reply(prompt):
        return "<answer>7</answer>" if prompt.endswith("</think>") else "<think>" + "on and on " * 50

    page = ChatPage(Shelf(["m"], {"m": scripted_model(reply)}.get), AppConfig(model="m"), InTurn())
    conversation = Conversation()
    conversation.ask("think")
    *_, (messages, _) = page.answer(conversation, "m", 0.0, 1.0, 500, 0, 20)
    reading = conversation.turns[-1].reading
    assert reading.thought == ("on and on " * 50)[:20]
    assert reading.answer == "7"


def test_while_votes_are_awaited_nothing_else_is_taken_and_after_a_stop_those_that_are_in_count(monkeypatch):
    monkeypatch.setattr("inference.chat.READINGS_PER_SECOND", math.inf)
    lengths = iter([1, 40, 2, 40])
    model = scripted_model(lambda prompt: f"<think>{'t' * next(lengths)}</think><answer>3</answer>")
    page = ChatPage(Shelf(["m"], {"m": model}.get), AppConfig(model="m"), InTurn())
    conversation = Conversation()
    conversation.ask("1 + 2 = ?")
    answer = page.answer(conversation, "m", 1.0, 1.0, 100, 0, 0, 4)
    while not next(answer)[1].startswith("2 of 4 votes are in"):
        pass
    assert conversation.turns[-1].reading.finish_reason == "stop"  # what is seen is whole, others are to come
    for act in (lambda: conversation.ask("more?"), lambda: page.undo(conversation)):
        with pytest.raises(gr.Error, match="being written"):
            act()
    computed = model.engine.tokens
    answer.close()
    assert model.engine.tokens == computed
    assert len(model.engine.closed) == 2
    messages = page.settle(conversation)[0]
    assert not conversation.is_answering
    assert messages[-1].metadata["title"] == "Votes: 3 × 2"


def test_an_answer_that_was_stopped_is_not_liked(tmp_path):
    config = AppConfig(model="m", feedback=str(tmp_path))
    page = ChatPage(Shelf(["m"], {"m": scripted_model("<think>on and on")}.get), config, InTurn())
    for votes in (1, 2):
        conversation = Conversation()
        conversation.ask("1 + 2 = ?")
        answer = page.answer(conversation, "m", 1.0, 1.0, 100, 0, 0, votes)
        next(answer)
        answer.close()
        page.settle(conversation)
        assert conversation.turns[-1].reading.finish_reason == "cancelled"
        with pytest.raises(gr.Error, match="no example"):
            page.like(conversation, SimpleNamespace(liked=True, index=1))
    assert not list(tmp_path.iterdir())
