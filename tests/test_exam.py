from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from scripted import ByteTokenizer

import evaluate
import exam
from data import Problem, load_problems
from exam import Answer, canary_rows, hold_exam, hold_shared_exam, summarise, worth_imitating
from figures import wilson_interval
from inference import Completion, SamplingParams

# ------------------------------------------------------------------------------------------------------------
# Rejection sampling


def said(text, tokens, correct=True, truncated=False, well_formed=True):
    return Answer(text, tokens, truncated, well_formed, correct, correct, "1")


SAID = [
    said("a b c d e", 5),
    said("a b c d f", 5),
    said("a b c d e", 5),
    said("one two three four five six", 9),
    said("wrong", 1, correct=False),
    said("undecided", 1, correct=None),
    said("cut", 1, truncated=True),
    said("no form", 1, well_formed=False),
]


def test_right_and_well_formed_answers_are_worth_imitating_once():
    texts = [answer.completion for answer in worth_imitating(SAID, 9)]
    assert texts == ["a b c d e", "a b c d f", "one two three four five six"]
    assert worth_imitating(SAID, 2) == [SAID[0], SAID[1]]
    assert worth_imitating([], 2) == []
    assert {answer.completion for answer in worth_imitating(SAID, 9, keep="all")} == {
        *texts,
        "wrong",
        "undecided",
    }


def test_diverse_answers_share_few_words():
    assert worth_imitating(SAID, 2, "diverse") == [SAID[0], SAID[3]]
    assert worth_imitating(SAID, 9, "diverse") == [SAID[0], SAID[3], SAID[1]]


def test_kept_answers_are_examples_that_the_cold_start_reads(tmp_path):
    file = tmp_path / "kept.jsonl"
    options = {"model": "m", "split": "train", "samples": 8, "write_sft": str(file)}
    right = said("<think>2 + 2 = 4</think><answer>4</answer>", 9)
    problems = [Problem("2 + 2 = ?", "4"), Problem("3 + 3 = ?", "6")]
    evaluate.write_examples(evaluate.EvaluateConfig(**options), problems, [[*SAID[4:], right], SAID[4:]])
    (read,) = load_problems(str(file), "cold_start")
    assert (read.question, read.gold, read.completion) == ("2 + 2 = ?", "4", right.completion)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": 0}, "samples 0"),
        ({"split": "test"}, "--split train"),
        ({"write_sft": "no/such/folder/file.jsonl"}, "write_sft.*cannot be written"),
        ({"write_sft": "/"}, "write_sft.*cannot be written"),
        ({"keep_per_problem": 0}, "keep_per_problem must be >= 1"),
    ],
)
def test_examples_come_from_samples_of_training_problems(changes, told):
    options = {"model": "m", "split": "train", "samples": 8, "write_sft": "file.jsonl"}
    with pytest.raises(ValueError, match=told):
        evaluate.EvaluateConfig(**options | changes)


# ------------------------------------------------------------------------------------------------------------
# Figures


def answer(correct, lenient=None, tokens=10, truncated=False, well_formed=True):
    return Answer(
        "text", tokens, truncated, well_formed, correct, correct if lenient is None else lenient, "1"
    )


def test_figures_of_answers_made_by_hand():
    groups = [
        [answer(True, tokens=1), answer(True, tokens=2)],
        [answer(False, lenient=True, tokens=3), answer(False, tokens=4, truncated=True, well_formed=False)],
        [answer(None, tokens=5, well_formed=False), answer(True, tokens=6)],
        [answer(False, tokens=7), answer(False, tokens=8)],
    ]
    figures = summarise(groups)
    # The interval is that of 1.5 of 4 problems, not of 3 of 8 answers.
    assert figures.pop("ci95") == list(wilson_interval(1.5, 4))
    assert figures == {
        "n": 4,
        "accuracy_strict": 3 / 8,
        "accuracy_lenient": 4 / 8,
        "format_rate": 6 / 8,
        "truncation_rate": 1 / 8,
        "undecided_rate": 1 / 8,
        "mean_tokens": 4.5,
        "median_tokens": 4.5,
        "thinking_rate": 0.0,
        "thought_tokens": 0.0,
        "verification_rate": 0.0,
        "self_correction_rate": 0.0,
        "self_correction_accuracy": None,
    }


def test_what_emerges_is_counted():
    thinking = replace(answer(True), thought_tokens=6, verifies=True)
    helped, in_vain = (
        replace(answer(right), thought_tokens=3, corrects_itself=True) for right in (True, False)
    )
    figures = summarise([[thinking], [helped], [in_vain], [answer(False)]])
    assert figures["thinking_rate"] == 3 / 4
    assert figures["thought_tokens"] == 12 / 4
    assert figures["verification_rate"] == 1 / 4
    assert figures["self_correction_rate"] == 2 / 4
    assert figures["self_correction_accuracy"] == 1 / 2


def test_the_first_problems_are_the_canaries():
    problems = [Problem(f"{n} + 1 = ?", str(n + 1)) for n in range(20)]
    rows = canary_rows(problems, [[answer(n % 2 == 0, tokens=n)] for n in range(20)])
    assert [row["question"] for row in rows] == [problem.question for problem in problems[:8]]
    assert rows[3] == {
        "question": "3 + 1 = ?",
        "gold": "4",
        "completion": "text",
        "correct": False,
        "tokens": 3,
    }


# ------------------------------------------------------------------------------------------------------------
# The exam


class ScriptedGroups:
    """An engine that answers every prompt with the next texts of its script; a text that is cut ends in …"""

    def __init__(self, script):
        self.script = script
        self.asked = []

    def generate(self, prompts, n, params, seed, first_prompt=0, on_completion=None):
        self.asked.append(([bytes(prompt).decode() for prompt in prompts], n, params, seed, first_prompt))
        groups = []
        for number, texts in enumerate(self.script[first_prompt : first_prompt + len(prompts)]):
            assert len(texts) == n
            groups.append([self.complete(text) for text in texts])
            for sample, completion in enumerate(groups[-1]):
                on_completion(number, sample, completion)
        return groups

    def complete(self, text):
        ids = [*text.rstrip("…").encode()] + [256] * (not text.endswith("…"))
        return Completion(ids, [0.0] * len(ids), "length" if text.endswith("…") else "stop")


PROBLEMS = [Problem("3 + 4", "7"), Problem("2 * 3", "6"), Problem("9 - 4", "5")]
GOOD = "<think>t</think><answer>7</answer>"
SCRIPT = [
    [GOOD, "so it is 7"],
    ["<think>t</think><answer>7</answer>", "<think>on and on 6…"],
    ["<think>t</think><answer>five</answer>", "<answer>5</answer>"],
]


def test_an_exam_asks_and_judges_every_sample():
    engine, params, ended = ScriptedGroups(SCRIPT), SamplingParams(50, temperature=0.5), []
    groups = hold_exam(
        engine, ByteTokenizer(), PROBLEMS, params, 2, (3, 4), on_answer=lambda: ended.append(1)
    )
    texts = [f"[user] {problem.question}\n[assistant] " for problem in PROBLEMS]
    assert engine.asked == [(texts, 2, params, (3, 4), 0)]
    assert len(ended) == 6
    assert groups[0][0] == Answer(GOOD, len(GOOD) + 1, False, True, True, True, "7", thought_tokens=1)
    assert [[a.correct for a in group] for group in groups] == [[True, False], [False, False], [False, True]]
    assert [[a.correct_lenient for a in group] for group in groups] == [
        [True, True],  # the last number, where no answer was marked
        [False, False],
        [False, True],
    ]
    assert [[a.truncated for a in group] for group in groups] == [
        [False, False],
        [False, True],
        [False, False],
    ]
    assert [[a.well_formed for a in group] for group in groups] == [
        [True, False],
        [True, False],
        [True, False],
    ]


def test_a_thought_that_the_template_opened_belongs_to_the_completion():
    engine = ScriptedGroups([["t</think><answer>7</answer>"]])
    [[judged]] = hold_exam(engine, ByteTokenizer(opens_thought=True), PROBLEMS[:1], SamplingParams())
    assert judged.completion == GOOD
    assert judged.well_formed
    assert judged.tokens == len("t</think><answer>7</answer>") + 1  # the prefix was not sampled


def test_an_answer_has_the_form_that_its_prompt_asks_for():
    problem = Problem(r"3 + 4 = ? Put it in \boxed{}.", "7")
    engine = ScriptedGroups([[r"<think>t</think>\boxed{7}", GOOD]])
    [judged] = hold_exam(engine, ByteTokenizer(), [problem], SamplingParams(), 2)
    assert [answer.well_formed for answer in judged] == [True, False]
    assert [answer.correct for answer in judged] == [True, True]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_an_exam_and_all_learn_its_figures(monkeypatch, processes):
    script, params = [texts[:1] for texts in SCRIPT], SamplingParams(temperature=0.0)
    whole = hold_exam(ScriptedGroups(script), ByteTokenizer(), PROBLEMS, params)
    shares, firsts = [], []
    for index in range(processes):
        engine = ScriptedGroups(script)
        accelerator = SimpleNamespace(num_processes=processes, process_index=index, autocast=nullcontext)
        # Every process gets what all of them have sent.
        monkeypatch.setattr(exam, "gather_object", lambda told: shares.extend(told) or [whole])
        groups = hold_shared_exam(accelerator, engine, ByteTokenizer(), PROBLEMS, params, (9,))
        assert groups == whole
        firsts += [(len(asked), first) for asked, n, _, seed, first in engine.asked if (n, seed) == (1, (9,))]
    assert [group for share in shares for group in share] == whole
    assert firsts == {1: [(3, 0)], 2: [(2, 0), (1, 2)], 3: [(1, 0), (1, 1), (1, 2)]}[processes]
