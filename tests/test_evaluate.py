"""What an evaluation tells of answers made by hand, and that it goes on where it was stopped."""

import json
import os
import resource
import signal
from concurrent.futures import wait
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

import evaluate
from answers import AnswerBook
from choice import parse_choosers
from data import Problem
from evaluate import (
    EvaluateConfig,
    Result,
    by_kind,
    compare,
    examine,
    figures_of,
    load_exam,
    majority_is_right,
)
from exam import Answer
from inference import Completion
from rewards.scorer import Scorer
from runs.config import RunStopped


def answer(correct, extracted="1", tokens=3):
    return Answer("text", tokens, False, True, correct, correct, extracted)


@pytest.mark.parametrize(
    ("told", "right"),
    [
        ([("7", True), ("8", False), ("8", False)], False),
        ([("7", True), ("8", False), ("7", True)], True),
        ([("0.5", True), ("1/2", True), ("8", False), ("8", False), (r"\frac{1}{2}", True)], True),
        ([("8", False), ("7", True)], False),  # the first of equals
        ([("7", True), (None, False), (None, False)], True),  # no answer is no vote
        ([(None, False)], False),
    ],
)
def test_a_majority_is_of_answers_that_say_the_same(told, right):
    assert majority_is_right([answer(correct, extracted) for extracted, correct in told]) == right


def test_figures_of_samples():
    greedy = [[answer(True)], [answer(False)]]
    sampled = [[answer(True, "7")] * 3 + [answer(False, "8")], [answer(False, "1"), answer(True, "2")] * 2]
    earned = [[0.1, 0.5, 0.5, 0.9], [0.5, 0.2, 0.5, 0.5]]  # the wrong one, and the first of equals: wrong
    figures = figures_of(greedy, sampled, earned)
    assert figures["accuracy_strict"] == 1 / 2
    assert figures["accuracy_sampled"] == 5 / 8
    assert figures["maj_at_k"] == 1 / 2
    assert figures["pass_at_k"] == 1.0
    assert figures["best_of_n"] == 0.0
    assert figures["pass_at"] == {"1": 5 / 8, "2": (1 + 5 / 6) / 2, "4": 1.0}
    assert figures["samples"] == 4
    assert figures_of(greedy, sampled, [[1, 0, 0, 0], [0, 0, 0, 1]])["best_of_n"] == 1.0
    assert figures["ci95_best_of_n"] == [0.0, 0.0]
    assert not {"pass_at_k", "best_of_n"} & figures_of(greedy, [], []).keys()


def test_two_models_are_compared_problem_by_problem():
    def result(verdicts):
        groups = [[answer(verdict)] for verdict in verdicts]
        return Result(figures_of(groups, [], []), [group[0] for group in groups], [], [])

    before, after = [False] * 30 + [True] * 20 + [None] * 2, [True] * 20 + [False] * 10 + [True] * 22
    told = compare(result(before), result(after))
    assert told["difference"]["accuracy_strict"] == pytest.approx(22 / 52)
    low, high = told["difference"]["ci95"]
    assert 0 < low < 22 / 52 < high
    assert told["p_value"] == pytest.approx(2 / 2**22)
    same = compare(result(before), result(before))
    assert same["p_value"] == 1.0


def test_accuracy_by_level_and_by_steps():
    problems = [
        Problem("a", "1", "<think>x\ny\n</think><answer>1</answer>", {"level": "Level 10"}),
        Problem("b", "1", "<think>x\ny</think><answer>1</answer>", {"level": "Level 2"}),
        Problem("c", "1", "<think>x</think><answer>1</answer>", {"level": "Level 2"}),
        Problem("d", "1", None, {"level": "Level 2"}),
    ]
    told = by_kind(problems, [answer(True), answer(True), answer(False), answer(None)])
    assert list(told["level"]) == ["Level 2", "Level 10"]
    assert told["level"]["Level 2"]["n"] == 3
    assert told["level"]["Level 2"]["accuracy_strict"] == 1 / 3
    assert {kind: figures["accuracy_strict"] for kind, figures in told["steps"].items()} == {"1": 0, "2": 1}
    assert by_kind(problems[1:3], [answer(True)] * 2).keys() == {"steps"}  # one level alone tells nothing


def test_problems_of_the_training_data_are_counted_or_left_out(tmp_path):
    rows = [{"question": f"{n} plus {n}?", "answer": str(2 * n)} for n in range(10)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = [{"question": " 3  PLUS 3 "}, {"question": "4 plus 4?!"}, {"question": "3 plus 33?"}]
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row | {"answer": "1"}) + "\n" for row in seen))
    (folder / "validation.jsonl").write_text('{"question": "?", "answer": "1"}\n')
    ask = {"model": "m", "data": str(tmp_path), "train_data": str(folder)}
    problems, found = load_exam(EvaluateConfig(**ask))
    assert (len(problems), found) == (10, 2)
    problems, found = load_exam(EvaluateConfig(**ask, contaminated="drop", limit=5))
    assert found == 2
    assert [problem.gold for problem in problems] == ["0", "2", "4", "10", "12"]
    shuffled, _ = load_exam(EvaluateConfig(**ask, shuffle_seed=1, limit=5))
    again, _ = load_exam(EvaluateConfig(**ask, shuffle_seed=1))
    assert shuffled == again[:5] != load_exam(EvaluateConfig(**ask))[0][:5]
    with pytest.raises(ValueError, match="--train_data"):
        EvaluateConfig(model="m", contaminated="drop")


# ------------------------------------------------------------------------------------------------------------
# At the door


@pytest.mark.parametrize("other", ["m", "./m/", "ABSOLUTE"])
def test_a_model_is_not_measured_beside_itself(tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    with pytest.raises(ValueError, match="baseline 'm' is the model itself; give another"):
        EvaluateConfig(model=other.replace("ABSOLUTE", str(tmp_path / "m")), baseline="m")
    EvaluateConfig(model="m", baseline="m2")


def test_a_run_keeps_its_report(tmp_path):
    (tmp_path / "config.yaml").write_text("model: m\n")
    with pytest.raises(ValueError, match="output .* holds a run, whose report.html .* another --output"):
        EvaluateConfig(model="m", output=str(tmp_path))
    EvaluateConfig(model="m", output=str(tmp_path / "exam"))


@pytest.mark.parametrize("name", ["json", "write_sft"])
def test_a_file_in_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # nobody's modes keep root out
    with pytest.raises(ValueError, match=f"{name} .* cannot be written: .* not yours to write; give another"):
        EvaluateConfig(model="m", split="train", samples=1, **{name: str(tmp_path / "file")})


def test_rewards_that_would_rate_nothing_are_refused():
    with pytest.raises(ValueError, match="rewards choose among sampled answers, got samples 0"):
        EvaluateConfig(model="m", rewards={"model:judge": 1.0})
    EvaluateConfig(model="m", rewards={"model:judge": 1.0}, samples=2)


class Dies(Exception):
    pass


class Engine:
    """Answers in an order of its own, and dies after so many completions."""

    def __init__(self, tokenizer, lives):
        self.tokenizer, self.lives, self.asked = tokenizer, lives, []

    def generate(self, prompts, n, params, seed, first_prompt, on_completion):
        for prompt in reversed(range(len(prompts))):
            for sample in range(n):
                if not self.lives:
                    raise Dies
                self.lives -= 1
                number = first_prompt + prompt
                self.asked.append((number, sample, params.temperature))
                ids = self.tokenizer.encode(f"<think>.</think><answer>{number + sample % 2}</answer>")
                on_completion(prompt, sample, Completion(ids, [0.0] * len(ids), "stop"))


@pytest.fixture
def ask(monkeypatch, tiny):
    """Lets an engine answer six problems, as one process; takes the book's folder and changed settings."""
    monkeypatch.setattr(evaluate, "gather_object", lambda told: told)
    problems = [Problem(f"{n}?", str(n)) for n in range(6)]
    alone = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, autocast=nullcontext)

    def ask(engine, folder, **changes):
        config = EvaluateConfig(model="m", samples=2, **changes)
        with Scorer(parse_choosers(config.rewards)) as scorer:
            return examine(config, "m", engine, tiny[1], problems, alone, AnswerBook(folder), scorer)

    return ask


def test_an_evaluation_that_was_stopped_goes_on_and_tells_the_same(tmp_path, tiny, ask):
    tokenizer = tiny[1]
    whole = Engine(tokenizer, 99)
    expected = ask(whole, None)
    first, second = Engine(tokenizer, 6 + 5), Engine(tokenizer, 99)
    with pytest.raises(Dies):
        ask(first, tmp_path)
    assert ask(second, tmp_path) == expected
    # What was whole is not asked again; the problem of which one sample was missing is.
    assert sorted({*first.asked, *second.asked}) == sorted(whole.asked)
    assert len(first.asked) + len(second.asked) == len(whole.asked) + 1
    third = Engine(tokenizer, 0)
    assert ask(third, tmp_path) == expected
    assert expected.figures["accuracy_strict"] == 1.0
    assert expected.figures["accuracy_sampled"] == 0.5
    assert expected.earned == [[1.0, 1.0]] * 6  # both are well formed, so it is the first, which is right
    assert expected.figures["best_of_n"] == 1.0


def test_a_full_disk_ends_an_evaluation_with_what_to_do(tmp_path, tiny, ask):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(RunStopped, match=r"samples.jsonl .*File too large.*; free some space, the same"):
            ask(Engine(tiny[1], 99), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    kept = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert 1 <= len(kept) < 6
    second = Engine(tiny[1], 99)
    ask(second, tmp_path)
    assert len(second.asked) == (6 - len(kept)) + 6 * 2


def test_a_judge_that_is_down_ends_an_evaluation_with_the_first_samples(tmp_path, monkeypatch, tiny, ask):
    submit = Scorer.submit
    monkeypatch.setattr(
        Scorer, "submit", lambda scorer, *group: (submit(scorer, *group), wait(scorer._pending))
    )
    judge = {"judge:http://127.0.0.1:9/v1(attempts=1, timeout_s=1)": 1.0}
    engine = Engine(tiny[1], 99)
    with pytest.raises(
        RunStopped, match=r"http://127.0.0.1:9/v1 gave .*Start its server again; the same"
    ) as e:
        ask(engine, tmp_path, rewards=judge, output=str(tmp_path))
    assert "Mend" not in str(e.value)
    assert (
        len(engine.asked) == 6 + 2 * 2
    )  # nothing failed yet when the first problem's samples were handed in
    again = Engine(tiny[1], 99)
    assert ask(again, tmp_path).earned == [[1.0, 1.0]] * 6
    assert len(again.asked) == 4 * 2
