"""What of the benchmarks can be tested without their peers and without training."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import cross_check
from data import Problem
from exam import hold_exam
from inference import SamplingParams
from prompts import parse_completion, prepare_tokenizer
from tiny import build_tiny_tokenizer

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
