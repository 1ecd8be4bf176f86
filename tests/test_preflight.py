"""What every start looks at: each cause planted once, and a healthy start that says nothing."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML

import plan
import preflight
from data import Problem
from plan import MIB, Load
from preflight import check_memory, check_template, choose_problems, cut_question, grpo_load, turn_end
from prompts import encode_prompt, prepare_tokenizer, render_prompt
from rewards import parse_rewards
from tiny import TINY, build_tiny_tokenizer
from train_grpo import GRPOConfig
from train_sft import SFTConfig, encode_examples

LOAD = Load(prompt=20, completion=40, limit=40, group_size=4, rows=32, sampled=32)


def accelerator():
    said = []
    here = {"device": torch.device("cpu"), "num_processes": 1, "is_fsdp2": False}
    return SimpleNamespace(**here, print=lambda it: said.append(str(it))), said


@pytest.fixture
def data_file(tmp_path):
    def write(golds, questions=None):
        questions = questions or [f"Question {number}?" for number in range(len(golds))]
        rows = [{"question": q, "answer": gold} for q, gold in zip(questions, golds, strict=True)]
        # Named train, nothing is held out; the other file has what is.
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "validation.jsonl").write_text(json.dumps(rows[0]) + "\n")
        return str(tmp_path)

    return write


def choose(data, rewards=None, **changes):
    spec = rewards or {"correct": 1.0}
    config = GRPOConfig(data=data, rewards=spec, **changes)
    return choose_problems(config, build_tiny_tokenizer(), parse_rewards(spec))


# ------------------------------------------------------------------------------------------------------------
# Problems


def test_prompts_over_the_limit_are_left_out_and_counted(data_file):
    long = "How many apples? " * 9
    data = data_file(["1", "2", "3"], ["1 + 1 = ?", long, "2 + 1 = ?"])
    kept, told = choose(data, max_prompt_tokens=20)
    assert [problem.question for problem in kept] == ["1 + 1 = ?", "2 + 1 = ?"]
    assert told == "3 problems, 1 left out over max_prompt_tokens"
    kept, told = choose(data, max_prompt_tokens=200)
    assert kept[1].question == long.strip()
    assert told == "3 problems"
    assert (
        choose(data, max_prompt_tokens=200, dry_run=True)[1]
        == "3 problems, 0 left out over max_prompt_tokens"
    )
    with pytest.raises(ValueError, match="leaves nothing to train on.*raise --max_prompt_tokens"):
        choose(data, max_prompt_tokens=5)


STORY = "Tom has 12 apples, and buys 30 more at the market. " * 4 + "How many apples are there?"


@pytest.mark.parametrize("limit", [60, 75, 90, 100])
def test_prompts_over_the_limit_are_cut_to_their_end_where_that_is_asked_for(data_file, chat, limit):
    data = data_file(["1", "2", "3"], ["1 + 1 = ?", STORY, "2 + 1 = ?"])
    config = GRPOConfig(data=data, max_prompt_tokens=limit, on_long_prompt="cut", system_prompt="Think!")
    prepare_tokenizer(chat, system_prompt="Think!")
    kept, told = choose_problems(config, chat, parse_rewards({"correct": 1.0}))
    assert told == "3 problems, 1 cut to their end over max_prompt_tokens"
    assert [kept[0].question, kept[2].question] == ["1 + 1 = ?", "2 + 1 = ?"]
    cut = kept[1].question
    assert kept[1].gold == "2"
    assert STORY.endswith(" " + cut)  # a whole word begins
    whole, mine = (render_prompt(chat, question) for question in (STORY, cut))
    assert mine == whole.replace(STORY, cut)  # system prompt, template, and the words that open the turn
    assert len(encode_prompt(chat, cut)) <= limit
    word_more = STORY[: -len(cut)].split()[-1] + " " + cut
    assert len(encode_prompt(chat, word_more)) > limit


def test_a_word_that_is_longer_than_the_limit_is_cut_within(data_file):
    tokenizer = build_tiny_tokenizer()
    frame = len(encode_prompt(tokenizer, ""))
    assert cut_question(tokenizer, "What is 12345678901234567890", frame + 5) == "67890"
    with pytest.raises(ValueError, match=f"max_prompt_tokens must be > {frame}, .*got {frame}"):
        choose(data_file(["1"], ["1 + 1 = ?"]), max_prompt_tokens=frame, on_long_prompt="cut")


def test_prompts_over_the_limit_stop_the_run_where_that_is_asked_for(data_file):
    data = data_file(["1", "2"], ["1 + 1 = ?", STORY])
    with pytest.raises(ValueError, match=r"1 of 2 prompts are over max_prompt_tokens 40, the longest has"):
        choose(data, max_prompt_tokens=40, on_long_prompt="stop")
    assert choose(data, max_prompt_tokens=400, on_long_prompt="stop")[1] == "2 problems"


@pytest.mark.parametrize("choice", ["drop", "cut", "stop"])
def test_a_cold_start_does_with_long_prompts_as_it_is_told_to(choice):
    tokenizer = build_tiny_tokenizer()
    problems = [Problem("1 + 1 = ?", "2", "two"), Problem(STORY, "132", "many"), Problem("?", "2")]
    config = SFTConfig(max_prompt_tokens=40, on_long_prompt=choice)
    if choice == "stop":
        with pytest.raises(ValueError, match="1 of 2 prompts are over max_prompt_tokens 40"):
            encode_examples(problems, tokenizer, config)
        return
    examples, told = encode_examples(problems, tokenizer, config)
    done = {"drop": "1 left out", "cut": "1 cut to their end"}[choice]
    assert told.endswith(f"1 left out without a worked completion, {done} over max_prompt_tokens")
    assert len(examples) == {"drop": 1, "cut": 2}[choice]
    assert all(len(example.prompt_ids) <= 40 for example in examples)
    if choice == "cut":
        assert tokenizer.decode(examples[1].prompt_ids).endswith("are there?<|end|><|assistant|>")


BAD = ["\\frac{1", "May 5?", "2, or 3 if it rains", "x^", "see https://example.org"]


def test_golds_that_cannot_be_read_are_left_out_counted_and_listed(data_file):
    data = data_file(["18", *BAD, "\\frac12", "x + 1", "Paris", "(C)", "12 cm"])
    kept, told = choose(data)
    assert [problem.gold for problem in kept] == ["18", "\\frac12", "x + 1", "Paris", "(C)", "12 cm"]
    assert "11 problems, 5 left out with golds that the verifier cannot read" in told
    assert repr(BAD[0]) in told
    assert repr(BAD[3]) not in told  # a few are enough
    assert told.endswith(", ...)")


def test_the_user_may_want_to_stop_at_them(data_file):
    data = data_file(["18", "x^", "19", "20"])
    with pytest.raises(ValueError, match=r"cannot read 1 of 4 golds \('x\^'\).*--on_bad_gold skip"):
        choose(data, on_bad_gold="stop")


def test_where_most_golds_are_bad_the_column_is(data_file):
    with pytest.raises(ValueError, match=r"cannot read 5 of 6 golds.*another --answer_column"):
        choose(data_file([*BAD, "18"]))


def test_golds_are_nobodys_business_where_no_reward_reads_them(data_file):
    kept, told = choose(data_file(BAD), rewards={"format": 1.0}, on_bad_gold="stop")
    assert len(kept) == len(BAD)
    assert told == "5 problems"


@pytest.mark.parametrize("task", ["arithmetic", "word_problems", "countdown"])
def test_built_in_golds_are_good(task):
    kept, told = choose(task, limit=300, on_bad_gold="stop")
    assert (len(kept), told) == (300, "300 problems")


# ------------------------------------------------------------------------------------------------------------
# The template


def causes(tokenizer, *stops):
    return [finding.cause for finding in check_template(tokenizer, stops or [tokenizer.eos_token_id])]


@pytest.fixture
def chat(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    prepare_tokenizer(tokenizer)
    return tokenizer


def test_a_healthy_tokenizer_raises_nothing(chat):
    assert causes(build_tiny_tokenizer()) == []
    assert causes(chat) == []
    assert turn_end(chat) == "<|im_end|>\n"


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_a_template_of_ours_is_told(chat_tokenizer, is_asked_for):
    base = copy.deepcopy(chat_tokenizer)
    if not is_asked_for:
        base.chat_template = None
    prepare_tokenizer(base, plain_template=is_asked_for, prefill_think=is_asked_for)
    assert causes(base) == ["plain_template"] + ["prefilled_think"] * is_asked_for
    (finding, *_) = check_template(base, [base.eos_token_id])
    assert "asked as plain text, User: ... Assistant: ..." in finding.text


def test_a_template_that_opens_the_thought_is_told(chat):
    chat.chat_template = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    (finding,) = check_template(chat, [chat.eos_token_id])
    assert finding.cause == "prefilled_think"
    assert "opens <think> itself" in finding.text


def test_a_template_that_closes_the_thought_is_told(chat):
    chat.chat_template = CHATML.replace("assistant\n'", "assistant\n<think>\n\n</think>\n\n'")
    (finding,) = check_template(chat, [chat.eos_token_id])
    assert finding.cause == "closed_think"
    assert "--rewards" in finding.text


def test_padding_with_the_eos_is_told(chat):
    chat.pad_token = chat.eos_token
    assert causes(chat) == ["pad_is_eos"]


def test_an_eos_that_the_template_never_writes_is_told(chat):
    chat.eos_token = "<|endoftext|>"
    stop = chat.convert_tokens_to_ids("<|im_end|>")
    found = check_template(chat, [chat.eos_token_id])
    assert [finding.cause for finding in found] == ["pad_is_eos", "eos_unreachable"]
    assert "ends a turn with '<|im_end|>'" in found[1].text
    assert "<|endoftext|>" in found[1].text
    assert causes(chat, chat.eos_token_id, stop) == ["pad_is_eos"]  # the generation config knows better


def test_a_template_that_leaves_completions_out_says_nothing_of_their_end(chat):
    chat.chat_template = "{{ messages[0].content }} Assistant:"
    assert turn_end(chat) == ""
    assert causes(chat) == []


# ------------------------------------------------------------------------------------------------------------
# Memory


def test_a_load_is_what_a_step_puts_through_the_model():
    problems = [SimpleNamespace(question="1 + 1 = ?"), SimpleNamespace(question="1000 + 1000 = ?")]
    config = GRPOConfig(
        algo="dapo", prompts_per_step=32, group_size=8, max_completion_tokens=64, eval_limit=80
    )
    load = grpo_load(config, build_tiny_tokenizer(), problems, processes=2)
    longest = len("1000") + len(" + ") // 3 + len("1000") + len(" = ") // 3 + len("?") + 3  # turns' tokens
    assert load == Load(prompt=longest, completion=64, limit=64, group_size=8, rows=32, sampled=128)


def test_memory_is_told_where_it_does_not_suffice(monkeypatch):
    config = GRPOConfig(model=TINY, kl_coef=0.0, micro_batch_tokens=2000)
    made = plan.plan_memory(config, TINY, LOAD, torch.device("cpu"))
    for free, remedy in (
        (made.peak + 1, None),
        (made.peak - MIB, "--micro_batch"),
        (made.held - MIB, "--lora"),
    ):
        monkeypatch.setattr(plan, "free_memory", lambda device, free=free: int(free))
        here, said = accelerator()
        check_memory(config, TINY, LOAD, here)
        assert len(said) == (remedy is not None)
        if remedy:
            assert said[0].startswith("preflight: memory: a step takes")
            assert remedy in said[0]


def test_processes_that_share_the_model_are_told_of_their_part(monkeypatch):
    config = GRPOConfig(model=TINY, kl_coef=0.0, micro_batch_tokens=2000)
    whole = plan.plan_memory(config, TINY, LOAD, torch.device("cpu"))
    monkeypatch.setattr(plan, "free_memory", lambda device: int(whole.held / 8 - MIB))
    here, said = accelerator()
    here.num_processes, here.is_fsdp2 = 8, True
    here.state = SimpleNamespace(fsdp_plugin=SimpleNamespace(reshard_after_forward=True))
    check_memory(config, TINY, LOAD, here)
    assert said[0].endswith("free: --lora_rank 16, more processes, or a smaller model")
    assert f"a step takes {whole.held / 8 / MIB:,.0f} MiB" in said[0]


def test_a_dry_run_prints_the_table():
    here, said = accelerator()
    check_memory(GRPOConfig(model=TINY, dry_run=True), TINY, LOAD, here)
    (table,) = said
    for word in ("weights", "gradients", "optimizer", "reference", "cache", "activations", "logits", "free"):
        assert word in table


def test_the_longest_texts_are_found():
    texts = ["a" * n for n in (3, 9, 1)] + ["ä" * 5]
    assert preflight.longest(texts, 2) == ["a" * 9, "ä" * 5]
