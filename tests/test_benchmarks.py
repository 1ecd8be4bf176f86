"""What of the benchmarks can be tested without their peers and without training."""

import copy
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import evaluate
from benchmarks import algorithms, cross_check, growth, samples, search
from benchmarks.algorithms import examine
from benchmarks.results import in_turn
from data import Problem
from exam import hold_exam
from inference import SamplingParams
from prompts import parse_completion, prepare_tokenizer
from tiny import build_tiny_tokenizer


def test_what_is_measured_in_turn_is_compared_with_its_neighbour():
    # While the machine was half as fast, twice; and once for one side alone.
    told = in_turn([3.0, 3.0, 6.0, 6.0, 9.0], [1.0, 1.0, 2.0, 2.0, 1.0])
    assert told == {"ratio": 3.0, "ratios": [3.0, 9.0]}


# ------------------------------------------------------------------------------------------------------------
# cross_check.py

PROBLEMS = [
    Problem("8 + 41 + 80 = ?", "129"),
    Problem("  'Ünïcode', {{ braces }} {% raw %}\n\\boxed{1}?\n", r"\frac{1}{2}"),
]
ASKING = [{}, {"system_prompt": ""}, {"answer_style": "boxed", "prefill_think": True}]


@pytest.fixture(params=[None, *ASKING], ids=str)
def tokenizer(request, chat_tokenizer):
    """The built-in one, and one that asks with our system prompts."""
    if request.param is None:
        return build_tiny_tokenizer()
    tokenizer = copy.deepcopy(chat_tokenizer)
    prepare_tokenizer(tokenizer, **request.param)
    return tokenizer


def test_the_task_for_lm_eval_asks_what_evaluate_asks(tokenizer, tmp_path):
    cross_check.write_task(tmp_path, PROBLEMS, tokenizer.eos_token, 77)
    task = yaml.safe_load((tmp_path / "ponder.yaml").read_text())
    data = task["dataset_kwargs"]["data_files"][task["test_split"]]
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row[task["doc_to_target"]] for row in rows] == [problem.gold for problem in PROBLEMS]
    # lm-eval's way from a row to token ids, with --apply_chat_template and add_bos_token=False.
    chats = [[{"role": "user", "content": row[task["doc_to_text"]]}] for row in rows]
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    theirs = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    asked = []
    engine = SimpleNamespace(generate=lambda prompts, *rest: asked.extend(prompts))
    hold_exam(engine, tokenizer, PROBLEMS, SamplingParams(77, temperature=0.0))
    assert theirs == asked
    assert len(asked) == len(PROBLEMS)
    how = task["generation_kwargs"]
    assert (how["do_sample"], how["max_gen_toks"], how["until"]) == (False, 77, [tokenizer.eos_token])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>1 + 2 = 3</think><answer>3</answer>", "3"),
        ("<think>a</think><answer> 3\n</answer>", "3"),
        ("<think><answer>1</answer></think> so <answer>2</answer>, no: <answer>3</answer>.", "3"),
        ("<think><answer>1</answer></think>", None),
        ("<think>1 + 2 = 3 <answer>3</answer>", None),
        ("<think>a</think><answer>3", None),
        (r"<think>a</think>It is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"<think>\boxed{1}</think>\boxed{2}, or \boxed{3}", "3"),
        ("", None),
    ],
)
def test_the_expression_finds_the_answer_that_our_reader_finds(text, answer):
    # As lm-eval's `regex` filter takes the first match's group that holds something.
    found = next(
        (next(filter(None, groups)).strip() for groups in re.findall(cross_check.ANSWER, text)), None
    )
    style = "boxed" if "boxed" in text else "tags"
    assert found == answer == parse_completion(text, style).answer


def test_two_judges_may_be_one_problem_apart(capsys):
    right, wrong = (cross_check.Judged("text", "3", is_right) for is_right in (True, False))
    problems = [Problem(f"{n} = ?", "3") for n in range(3)]
    row, agree = cross_check.compare("m", "d", problems, [right] * 3, [right, right, wrong])
    assert agree
    assert (row["ours"], row["peer_value"], row["ratio"]) == (1.0, 2 / 3, 1.5)
    assert "2 = ?" in capsys.readouterr().out
    assert not cross_check.compare("m", "d", problems, [right] * 3, [right, wrong, wrong])[1]


# ------------------------------------------------------------------------------------------------------------
# What draws


@pytest.mark.parametrize(
    ("script", "first", "flags"),
    [
        (algorithms, "run", []),
        (growth, "measure", ["--plot", "a.svg"]),
        (samples, "measure", ["--plot", "a.svg"]),
        (search, "load_chat_model", ["--plot", "a.svg", "--model", "m"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_plot_that_cannot_be_drawn_is_told_before_anything_is_measured(monkeypatch, script, first, flags):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    monkeypatch.setattr(script, first, lambda *how: pytest.fail("it was begun"))
    with pytest.raises(ImportError, match="matplotlib"):
        script.main()


# ------------------------------------------------------------------------------------------------------------
# samples.py


def point(curve, number, seed, before, after):
    ends = {"peer_value": before, "peer_ci95": [0, 1], "ours": after, "ours_ci95": [0.25, 1]}
    return {"curve": curve, "number": number, "seed": seed, "peer_pass_at_8": before, **ends}


def test_the_table_has_a_line_a_number_and_a_column_a_seed():
    rows = [point(samples.OF_EXAMPLES, n, seed, 0.1 * seed, 0.5) for seed in (2, 1) for n in (500, 100)]
    rows += [point(samples.OF_PROMPTS, n, 1, 0.1, 0.5) for n in (10, 1600)]
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in samples.table(rows).splitlines()]
    assert told[0] == ["Worked examples", "", "Seed 1", "Seed 2", "Mean", "pass@8"]
    assert told[2] == ["100", "cold start", "10.0% (0.0%–100.0%)", "20.0% (0.0%–100.0%)", "15.0%", "15.0%"]
    assert [line[:2] for line in told[3:6]] == [
        ["100", "after GRPO"],
        ["500", "cold start"],
        ["500", "after GRPO"],
    ]
    # The prompts' curve begins at the one cold start.
    assert [line[:2] for line in told[-3:]] == [
        ["0", "cold start"],
        ["10", "after GRPO"],
        ["1,600", "after GRPO"],
    ]


def test_what_was_answered_is_not_asked_again_and_what_is_asked_anew_is(tmp_path, monkeypatch, tiny):
    for part in tiny:
        part.save_pretrained(tmp_path / "final")
    asked = []

    def count(*how, **on):
        asked.append(len(how[2]))
        return hold_exam(*how, **on)

    monkeypatch.setattr(evaluate, "hold_exam", count)
    ask = {"max_completion_tokens": 4}
    first = examine(tmp_path, limit=2, **ask)
    assert examine(tmp_path, limit=2, **ask) == first
    assert asked == [2]
    assert examine(tmp_path, limit=5, **ask)["n"] == 5
    assert asked == [2, 3]
    # The same folder, trained further.
    tiny[0].save_pretrained(tmp_path / "final")
    examine(tmp_path, limit=2, **ask)
    assert asked == [2, 3, 2]
