"""Best of N by rewards: what they choose, and that none of them can see the answer."""

import ast
from dataclasses import replace

import pytest
from scripted import ByteTokenizer

from choice import TOLD, choose, hand_in, parse_choosers
from data import Problem
from exam import Answer
from rewards import fill_slots, judge_problem
from rewards.scorer import Scorer

GOLD = "the gold 4711"

FUNCTIONS = """
def spy(completions, **columns):
    with open(FILE, "a") as file:
        file.write(repr({key: value for key, value in columns.items() if "log" not in key}) + "\\n")
    return [0.0 for _ in completions]

def by_topic(completions, topic):
    return [0.0 for _ in completions]

def verdict(completions, correct=None):
    return [float(bool(c)) for c in correct or [None] * len(completions)]

def first(completions, questions, completion_ids):
    return [float(len(q) + len(ids)) for q, ids in zip(questions, completion_ids)]
"""


def answer(text, correct=False):
    return Answer(text, len(text), False, True, correct, correct, "the judge's")


def rated(spec, problems, groups):
    return rated_by(parse_choosers(spec), problems, groups)


def rated_by(choosers, problems, groups):
    with Scorer(choosers) as scorer:
        for problem, answers in zip(problems, groups, strict=True):
            hand_in(scorer, ByteTokenizer(), problem, answers, 64)
        return [scores.total for scores in scorer.results()]


@pytest.fixture
def functions(tmp_path):
    """A file of rewards, and where its spy writes down what it was told."""
    told = tmp_path / "told"
    (tmp_path / "rewards.py").write_text(f"FILE = {str(told)!r}\n{FUNCTIONS}")
    return tmp_path / "rewards.py", told


def test_what_chooses_is_not_told_the_answer(functions):
    file, told = functions
    columns = {"answer": GOLD, "solution": GOLD, "numbers": [1, 2], "target": 3, "topic": "sums"}
    problem = Problem("1 + 2 = ?", GOLD, f"<think>{GOLD}</think>", columns)
    groups = [[answer("<answer>1</answer>", True), answer("<answer>2</answer>")]]
    rated({f"{file}:spy": 1.0}, [problem], groups)
    (row,) = told.read_text().splitlines()
    seen = ast.literal_eval(row)
    verdicts = seen.pop("correct")
    assert seen.keys() == set(TOLD)
    assert verdicts == [None, None]
    assert "4711" not in row
    assert seen["questions"] == ["1 + 2 = ?"] * 2
    assert (seen["group_size"], seen["max_completion_tokens"]) == (2, 64)
    assert bytes(seen["completion_ids"][0]).decode() == "<answer>1</answer>"


@pytest.mark.parametrize("told", [("<answer>3</answer>", "7"), ("7", "<answer>3</answer>")])
def test_the_choice_does_not_depend_on_the_gold(functions, told):
    file, _ = functions
    spec = {"format": 1.0, f"{file}:verdict": 5.0, f"{file}:first": 0.01}
    groups = [[answer(text) for text in told]]
    rows = [rated(spec, [Problem("1 + 2 = ?", gold)], groups) for gold in ("3", "7", None)]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("correct", "gold and correct"),
        ("lead", "gold and correct"),
        ("countdown", "numbers and target"),
        ("length_penalty(only_correct=true)", "correct"),
        ("FILE:by_topic", "topic"),
        ("nonsense", "unknown reward"),
    ],
)
def test_a_reward_that_needs_the_answer_or_the_data_is_refused(functions, name, told):
    with pytest.raises(ValueError, match=told):
        parse_choosers({"format": 1.0, name.replace("FILE", str(functions[0])): 1.0})


def test_the_best_paid_answer_is_chosen_among_those_that_say_something():
    says, says_not = answer("<answer>3</answer>"), replace(answer("I see 42 birds"), extracted=None)
    assert choose([says, says, says], [0.1, 0.3, 0.2]) == 1
    assert choose([says, says, says], [0.3, 0.3, 0.3]) == 0
    assert choose([says_not, says], [9.0, -9.0]) == 1
    assert choose([says_not, says_not], [1.0, 2.0]) == 1


@pytest.mark.parametrize(
    ("text", "extracted"), [("<answer>3</answer>", "3"), ("I see 42 birds", None), ("<think>", None)]
)
@pytest.mark.parametrize("columns", [{}, {"numbers": [1, 2], "target": 3}], ids=["gold", "countdown"])
def test_whether_a_completion_gives_an_answer_does_not_depend_on_the_gold(text, extracted, columns):
    assert {judge_problem(text, gold, columns).extracted for gold in ("3", "42", "x")} == {extracted}


def test_rewards_of_every_kind_are_asked(functions):
    file, _ = functions
    groups = [
        [answer("<think>t</think><answer>3</answer>"), answer("7")],
        [answer("7"), answer("<think>t</think><answer>3</answer>")],
    ]
    problems = [Problem("a", "3"), Problem("bb", "3")]
    assert rated({"format": 2.0, f"{file}:first": 0.5}, problems, groups) == [[19.5, 1.0], [1.5, 20.0]]
    choosers = parse_choosers({"model:m": 1.0})
    asked = []

    def load(name, device, *, batch_size=1):
        asked.append((name, device))
        return lambda completions, questions: [float(len(q)) for q in questions]

    fill_slots(choosers, load, "cpu")
    assert rated_by(choosers, problems, groups) == [[1.0, 1.0], [2.0, 2.0]]
    assert asked == [("m", "cpu")]
