"""The scripts, whole: learning, resuming, real data, mistakes, and what comes out."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from quick import lines, quick_grpo, quick_sft, same, weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import models as models_module
import runs.folder
from data import Problem
from evaluate import EvaluateConfig
from evaluate import main as evaluate
from models import add_adapter, load_reward_model, save_model
from runs.config import UserError, parse_config, run_script
from tiny import build_tiny_tokenizer
from train_grpo import GRPOConfig
from train_grpo import main as train_grpo
from train_sft import SFTConfig, encode_examples
from train_sft import main as train_sft

ROOT = Path(__file__).parent.parent
GSM8K = os.environ.get("GSM8K_DIR")
needs_gsm8k = pytest.mark.skipif(not GSM8K, reason="GSM8K_DIR is not set")

# Sums small enough to be learned in a minute.
SMALL = {"high": 29}


QLORA = {"quantize": "nf4", "optimizer": "adamw_8bit", "gradient_checkpointing": True, "lora_dropout": 0.1}


def test_a_thought_that_the_template_opens_is_not_opened_again():
    tokenizer = build_tiny_tokenizer()
    problem = Problem("1 + 1 = ?", "2", "<think>1 + 1 = 2</think><answer>2</answer>")
    for opens in (False, True):
        if opens:
            tokenizer.chat_template += "{%- if add_generation_prompt -%}<think>{%- endif -%}"
        (example,), _ = encode_examples([problem], tokenizer, SFTConfig())
        text = tokenizer.decode(example.prompt_ids) + tokenizer.decode(example.completion_ids)
        assert text.count("<think>") == 1
        assert text.endswith("<think>1 + 1 = 2</think><answer>2</answer><|end|>")


def test_examples_answer_in_the_style_that_their_prompt_asks_for():
    problem = Problem("1 + 1 = ?", "2", "<think>1 + 1 = 2</think><answer>2</answer>")
    config = SFTConfig(answer_style="boxed", prefill_think=True)
    tokenizer = config.load_tokenizer("tiny")
    (example,), _ = encode_examples([problem], tokenizer, config)
    assert tokenizer.decode(example.prompt_ids).endswith("1 + 1 = ?<|end|><|assistant|><think>")
    assert tokenizer.decode(example.completion_ids) == "1 + 1 = 2</think>\\boxed{2}<|end|>"


# ------------------------------------------------------------------------------------------------------------
# Learning


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cold start and a GRPO run on small sums, for the tests that need a model that learned something."""
    folder = tmp_path_factory.mktemp("trained")
    options = {"data_options": SMALL, "eval_every": 0}
    sft = SFTConfig(output=str(folder / "sft"), total_steps=300, save_every=300, **options)
    assert train_sft(sft) == 0
    grpo = GRPOConfig(
        model=str(folder / "sft" / "final"),
        output=str(folder / "grpo"),
        total_steps=60,
        kl_coef=0.0,
        save_every=60,
        **options,
    )
    assert train_grpo(grpo) == 0
    figures = folder / "evaluation.json"
    evaluate(
        EvaluateConfig(
            model=grpo.output + "/final",
            baseline=sft.output + "/final",
            split="validation",
            data_options=SMALL,
            max_completion_tokens=64,
            samples=2,
            json=str(figures),
            output=str(folder / "evaluation"),
        )
    )
    return folder, json.loads(figures.read_text())


@pytest.mark.slow
def test_grpo_raises_held_out_accuracy_by_twenty_points(trained):
    _, figures = trained
    before, after = figures["baseline"], figures
    assert before["format_rate"] > 0.9  # the cold start taught the form
    assert after["accuracy_strict"] >= before["accuracy_strict"] + 0.20
    assert after["accuracy_sampled"] >= before["accuracy_sampled"] + 0.20
    folder, _ = trained
    told = [line for stage in ("sft", "grpo") for line in lines(folder / stage / "metrics.jsonl")]
    assert not [line["watchdog"] for line in told if "watchdog" in line]  # a run that learns alarms nobody
    keys = {"model", "data", "n", "accuracy_strict", "accuracy_lenient", "ci95", "format_rate"}
    keys |= {"truncation_rate", "undecided_rate", "mean_tokens", "maj_at_k", "pass_at_k", "best_of_n"}
    assert keys | {"baseline", "difference", "p_value"} <= figures.keys()
    assert keys <= before.keys()
    assert json.loads((folder / "evaluation" / "report.json").read_text()) == figures
    page = (folder / "evaluation" / "report.html").read_text()
    assert f"{after['accuracy_strict']:.1%}" in page
    assert "Beside the baseline" in page


@pytest.mark.slow
def test_the_trained_folder_loads_in_plain_transformers(trained):
    folder, _ = trained
    program = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
messages = [{"role": "user", "content": "12 + 5 + 20 = ?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))
print([name for name in sys.modules if name in ("models", "prompts", "train_grpo")])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder / "grpo" / "final")],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    text, ours = done.stdout.strip().rsplit("\n", 1)
    assert text.startswith("<think>")
    assert text.endswith("</answer><|end|>")  # it stops by itself
    assert ours == "[]"


@pytest.mark.slow
def test_a_finished_run_says_so_and_keeps_its_weights(trained, capsys):
    folder, _ = trained
    before = (folder / "grpo" / "final" / "model.safetensors").stat().st_mtime_ns
    config = GRPOConfig(
        model=str(folder / "sft" / "final"),
        output=str(folder / "grpo"),
        total_steps=60,
        kl_coef=0.0,
        save_every=60,
        data_options=SMALL,
        eval_every=0,
    )
    assert train_grpo(config) == 0
    assert "is finished" in capsys.readouterr().out
    assert (folder / "grpo" / "final" / "model.safetensors").stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------------------
# Resuming


class Crash(Exception):
    pass


def crash_after(monkeypatch, step):
    """Die as a killed process would: after a checkpoint, without a chance to tidy up."""
    checkpoint = runs.folder.Run.checkpoint

    def then_die(run):
        checkpoint(run)
        if run.step == step:
            raise Crash

    monkeypatch.setattr(runs.folder.Run, "checkpoint", then_die)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "quick", "changes"),
    [
        (train_sft, quick_sft, {"optimizer": "muon"}),
        (train_sft, quick_sft, {"optimizer": "adamw"}),
        (train_grpo, quick_grpo, {"kl_coef": 0.04}),
        (train_grpo, quick_grpo, {"kl_coef": 0.0, "updates_per_rollout": 2, "lr_schedule": "cosine"}),
        # Nothing is right, so every step refills as often as it may: the position is a number of its own.
        (train_grpo, quick_grpo, {"algo": "dapo", "max_refills": 1}),
        (train_grpo, quick_grpo, {"algo": "ppo", "updates_per_rollout": 2, "critic": "separate"}),
        (train_grpo, quick_grpo, {"kl_target": 0.01, "ref_sync_steps": 2, "replay_groups": 3}),
        (train_grpo, quick_grpo, {"model": "random_qwen", "lora_rank": 4, "kl_coef": 0.1}),
        (train_grpo, quick_grpo, {"model": "random_qwen", "lora_rank": 4, **QLORA}),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(train, quick, changes, tmp_path, monkeypatch, random_qwen):
    if changes.get("model") == "random_qwen":
        changes = changes | {"model": str(random_qwen)}
    assert train(quick(tmp_path / "whole", **changes)) == 0
    with monkeypatch.context() as patch:
        crash_after(patch, 2)
        with pytest.raises(Crash):
            train(quick(tmp_path / "killed", **changes))
    # What a dying process may leave behind the checkpoint: a line too many.
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3}\n')
    assert train(quick(tmp_path / "killed", **changes)) == 0
    whole, resumed = weights(tmp_path / "whole" / "final"), weights(tmp_path / "killed" / "final")
    start = weights(tmp_path / "whole" / "checkpoints" / "step-000002")
    assert same(whole, resumed)
    assert not same(whole, start)
    assert [line["step"] for line in lines(tmp_path / "killed" / "metrics.jsonl")] == [1, 2, 3, 4]


FRAGILE_REWARD = """
from pathlib import Path


def odd(completions, trainer_state):
    if trainer_state.global_step == 2 and Path(__file__).with_name("broken").exists():
        raise ZeroDivisionError(f"step 3 of {trainer_state.max_steps}")
    return [len(completion) % 7 for completion in completions]
"""


@pytest.mark.slow
def test_a_broken_reward_stops_the_run_with_a_checkpoint_that_goes_on_once_it_is_mended(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(FRAGILE_REWARD)
    changes = {"rewards": {f"{tmp_path}/mine.py:odd": 1.0}, "eval_every": 0, "save_every": 4}
    assert train_grpo(quick_grpo(tmp_path / "whole", **changes)) == 0
    (tmp_path / "broken").touch()
    with pytest.raises(SystemExit) as exit_:
        run_script(train_grpo, lambda: quick_grpo(tmp_path / "stopped", **changes))
    assert exit_.value.code == 1
    (message,) = capsys.readouterr().err.strip().splitlines()
    for word in ("mine.py:odd", "ZeroDivisionError: step 3 of 4", "mine.py, line 7", "2 steps are saved"):
        assert word in message
    (tmp_path / "broken").unlink()
    assert train_grpo(quick_grpo(tmp_path / "stopped", **changes)) == 0
    assert same(weights(tmp_path / "whole" / "final"), weights(tmp_path / "stopped" / "final"))
    assert len(lines(tmp_path / "stopped" / "rollouts.jsonl")) == 4 * 16


@pytest.mark.slow
def test_a_model_rewards_what_the_policy_says(tmp_path, reward_folder):
    name = f"model:{reward_folder}(batch_size=3)"
    changes = {"rewards": {name: 0.5, "unique_characters": 1.0}, "total_steps": 1, "eval_every": 0}
    assert train_grpo(quick_grpo(tmp_path, **changes)) == 0
    reward = load_reward_model(str(reward_folder), "cpu")
    rows = lines(tmp_path / "rollouts.jsonl")
    told = [row["rewards"][name] for row in rows]
    expected = reward([row["completion"] for row in rows], [row["question"] for row in rows])
    assert told == pytest.approx(expected, abs=1e-5)
    assert len(set(told)) > 1
    assert [row["reward"] for row in rows] == pytest.approx(
        [0.5 * value + row["rewards"]["unique_characters"] for value, row in zip(told, rows, strict=True)]
    )


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output '.*file/run' cannot be written: .*file is no folder"):
        train_sft(quick_sft(tmp_path / "file" / "run"))


# ------------------------------------------------------------------------------------------------------------
# What a step hands to the next


def metrics_of(tmp_path, name, **changes):
    changes = {"total_steps": 3, "eval_every": 0, "learning_rate": 3e-3, "warmup_steps": 0} | changes
    assert train_grpo(quick_grpo(tmp_path / name, **changes)) == 0
    return lines(tmp_path / name / "metrics.jsonl")


@pytest.mark.slow
def test_the_coefficient_goes_after_its_target_and_the_reference_follows(tmp_path):
    fixed = metrics_of(tmp_path, "fixed", kl_coef=0.1)
    assert [step["policy/kl_coef"] for step in fixed] == [0.1] * 3
    assert abs(fixed[0]["policy/kl"]) < 1e-6 < fixed[2]["policy/kl"]
    below = metrics_of(tmp_path, "below", kl_coef=0.1, kl_target=100.0)
    assert [step["policy/kl_coef"] for step in below] == pytest.approx([0.1, 0.098, 0.09604])
    above = metrics_of(tmp_path, "above", kl_coef=0.1, kl_target=1e-9)
    assert above[2]["policy/kl_coef"] == pytest.approx(0.1 * 0.98 * 1.02)  # at first there is none
    following = metrics_of(tmp_path, "following", kl_coef=0.1, ref_sync_steps=1)
    assert all(abs(step["policy/kl"]) < 1e-6 for step in following)


@pytest.mark.slow
def test_replayed_groups_are_learned_from_again_by_their_probability_now(tmp_path):
    without = metrics_of(tmp_path, "without", kl_coef=0.0)
    replayed = metrics_of(tmp_path, "with", kl_coef=0.0, replay_groups=3)
    assert [step["rollout/replayed_groups"] for step in replayed] == [0, 3, 3]
    assert [step["rollout/completions"] for step in replayed] == [16, 16, 16]
    # The policy as it is when the update begins is what it is compared with, not the one that sampled.
    assert all(step["policy/ratio_max"] == pytest.approx(1, abs=1e-5) for step in replayed)
    assert without[0]["policy/grad_norm"] == pytest.approx(replayed[0]["policy/grad_norm"], rel=1e-4)
    assert without[1]["policy/grad_norm"] != pytest.approx(replayed[1]["policy/grad_norm"], rel=1e-2)


@pytest.mark.slow
def test_a_lora_policy_is_its_own_reference_and_is_saved_as_an_adapter(random_qwen, tmp_path, monkeypatch):
    loaded = []
    load = models_module.load_model
    monkeypatch.setattr(
        "runs.training.load_model", lambda *args, **how: loaded.append(args) or load(*args, **how)
    )
    changes = {"model": str(random_qwen), "lora_rank": 4, "kl_coef": 0.1}
    steps = metrics_of(tmp_path, "run", **changes)
    assert len(loaded) == 1  # no second model for the reference
    assert abs(steps[0]["policy/kl"]) < 1e-6 < steps[2]["policy/kl"]
    base, tuned = (load(str(folder)) for folder in (random_qwen, tmp_path / "run" / "final"))
    with tuned.disable_adapter():
        for name, weight in base.named_parameters():
            held = tuned.base_model.model.get_parameter(name.replace("proj.", "proj.base_layer."))
            assert torch.equal(held, weight)
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.allclose(base(ids).logits, tuned(ids).logits)
    with pytest.raises(ValueError, match="lora_rank must be 4, the rank of the adapter"):
        add_adapter(tuned, 8, seed=0)
    # Going on from the adapter, the reference is what the run begins with: the adapter included.
    again = metrics_of(tmp_path, "again", **changes | {"model": str(tmp_path / "run" / "final")})
    assert len(loaded) == 3
    assert abs(again[0]["policy/kl"]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_critic_learns_alone_at_first(tmp_path, critic):
    changes = {"algo": "ppo", "critic": critic, "save_every": 1, "keep_checkpoints": 3, "kl_coef": 0.0}
    steps = metrics_of(tmp_path, "run", critic_warmup_steps=2, updates_per_rollout=2, **changes)
    saved = [tmp_path / "run" / "checkpoints" / f"step-{n:06d}" for n in (1, 2, 3)]
    assert same(weights(saved[0]), weights(saved[1]))
    assert not same(weights(saved[1]), weights(saved[2]))
    critics = [
        torch.load(folder / "trainer_state.pt", weights_only=True)["memory"]["critic"] for folder in saved
    ]
    assert critics[0]["head.weight"].any()
    assert not torch.equal(critics[0]["head.weight"], critics[1]["head.weight"])
    assert any(key.startswith("trunk.") for key in critics[0]) == (critic == "separate")
    for name in ("value_loss", "explained_variance", "clip_fraction"):
        assert all(f"critic/{name}" in step for step in steps)
    # Rewards are counts of characters, far above the first values of 0.
    assert steps[0]["critic/value_loss"] > steps[2]["critic/value_loss"] > 0


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "train_sft.py", "--output", str(tmp_path / "run"), "--total_steps", "40"]
    command += ["--examples_per_step", "4", "--limit", "64", "--eval_every", "0", "--lr_schedule", "constant"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    done = len(lines(metrics))
    assert done < 40
    saved = tmp_path / "run" / "checkpoints" / f"step-{done:06d}"
    assert str(saved) in output
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"going on from {saved}" in again.stdout
    assert [line["step"] for line in lines(metrics)] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [{}, {"algo": "ppo", "updates_per_rollout": 2, "kl_coef": 0.1}],
    ids=["grpo", "ppo with minibatches"],
)
def test_two_processes_train_as_one(tmp_path, knobs):
    """The same prompts, the same completions, the same gradient: weights agree to float32 rounding."""
    train_grpo(quick_grpo(tmp_path / "one", total_steps=2, eval_every=0, **knobs))
    flags = [word for name, value in knobs.items() for word in (f"--{name}", str(value))]
    flags += ["--model", "tiny", "--total_steps", "2", "--eval_every", "0", "--output", str(tmp_path / "two")]
    flags += ["--prompts_per_step", "4", "--group_size", "4", "--max_completion_tokens", "12"]
    flags += ["--rewards", "{unique_characters: 1.0}"]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
        + ["train_grpo.py", *flags],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=240,
    )
    one, two = lines(tmp_path / "one" / "rollouts.jsonl"), lines(tmp_path / "two" / "rollouts.jsonl")
    assert [row["completion"] for row in one] == [row["completion"] for row in two]
    before = torch.cat([value.flatten() for value in weights(tmp_path / "one" / "final").values()])
    after = torch.cat([value.flatten() for value in weights(tmp_path / "two" / "final").values()])
    assert (before - after).norm() / before.norm() < 1e-6


@pytest.mark.slow
def test_two_processes_evaluate_as_one_and_one_goes_on_where_they_were(tmp_path):
    asked = {"model": "tiny", "limit": 7, "samples": 2, "max_completion_tokens": 12}
    evaluate(EvaluateConfig(**asked, json=str(tmp_path / "one.json")))
    flags = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    flags += ["--output", str(tmp_path / "two")]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29519"]
        + ["evaluate.py", *flags],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=240,
    )
    files = sorted((tmp_path / "two").glob("samples*.jsonl"))
    assert [len(lines(file)) for file in files] == [2 * 3, 2 * 4]  # samples-1.jsonl stands first
    kept = [file.read_bytes() for file in files]
    evaluate(EvaluateConfig(**asked, output=str(tmp_path / "two"), json=str(tmp_path / "again.json")))
    assert [file.read_bytes() for file in files] == kept  # nothing was asked again
    told = [(tmp_path / name).read_text() for name in ("one.json", "two/report.json", "again.json")]
    assert told[0] == told[1] == told[2]


# ------------------------------------------------------------------------------------------------------------
# Real data


@pytest.fixture(scope="module")
def random_qwen(tmp_path_factory):
    """A folder with a random two-layer Qwen2 and a byte-level BPE tokenizer with a ChatML template."""
    folder = tmp_path_factory.mktemp("qwen")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(["How many apples does she have?", "The answer is 72."] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    save_model(folder, Qwen2ForCausalLM(config), tokenizer)
    return str(folder)


@pytest.mark.slow
@needs_gsm8k
def test_gsm8k_runs_end_to_end_and_counts_its_problems(random_qwen, tmp_path, capsys):
    sizes = {"max_prompt_tokens": 600, "total_steps": 2, "eval_every": 0}
    sft = SFTConfig(
        model=random_qwen,
        data=GSM8K,
        output=str(tmp_path / "sft"),
        examples_per_step=4,
        max_completion_tokens=300,
        optimizer="adamw",
        **sizes,
    )
    assert train_sft(sft) == 0
    told = capsys.readouterr().out
    assert "6973 problems" in told  # 7,473 less the 500 of the validation split
    assert "left out over max_completion_tokens" in told
    grpo = GRPOConfig(
        model=sft.output + "/final",
        data=GSM8K,
        output=str(tmp_path / "grpo"),
        prompts_per_step=2,
        group_size=2,
        max_completion_tokens=16,
        **sizes,
    )
    assert train_grpo(grpo) == 0
    told = capsys.readouterr().out
    assert "6973 problems" in told
    assert "left out over max_prompt_tokens" in told
    assert (
        evaluate(EvaluateConfig(model=grpo.output + "/final", data=GSM8K, limit=8, max_completion_tokens=16))
        == 0
    )
    assert "8 problems" in capsys.readouterr().out
    rows = lines(tmp_path / "grpo" / "rollouts.jsonl")
    assert len(rows) == 2 * 2 * 2
    assert all(row["gold"] for row in rows)


# ------------------------------------------------------------------------------------------------------------
# Mistakes


def exit_of(config_class, train, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(train, lambda: parse_config(config_class, argv))
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return stopped.value.code, error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "--learning_rate"]),
        (["--model", "not/a/folder"], ["not/a/folder", "Hub name"]),
        (["--model", "tiny", "--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--group_size", "1"], ["group_size", "baseline", "got 1"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--learning_rate", "fast"], ["learning_rate", "fast"]),
        (["--temperature", "0"], ["temperature", "> 0", "got 0"]),
        (["--ratio_level", "sequence", "--weighting", "token"], ["ratio_level", "weighting"]),
        (["--baseline", "critic"], ["scale", "group", "baseline", "critic"]),
        (["--algo", "ppo", "--difficulty", "logistic"], ["difficulty", "baseline"]),
        (["--gamma", "0.9"], ["gamma", "baseline"]),
        (["--top_k", "20"], ["top_k", "got 20", "temperature"]),
        (["--top_p", "0.9"], ["top_p", "got 0.9", "temperature"]),
        (["--kl_coef", "0", "--kl_target", "0.1"], ["kl_target", "kl_coef"]),
        (["--kl_coef", "0", "--ref_sync_steps", "5"], ["ref_sync_steps", "kl_coef"]),
        (
            ["--algo", "ppo", "--group_size", "1", "--length_alpha", "0.1"],
            ["group_size", "length_alpha", "got 1"],
        ),
        (
            ["--prompts_per_step", "10", "--updates_per_rollout", "4"],
            ["prompts_per_step", "updates_per_rollout"],
        ),
        (["--model", "tiny", "--rewards", "{corect: 1.0}"], ["corect", "correct"]),
        (["--model", "tiny", "--data", "arithmetik"], ["arithmetik", "arithmetic"]),
        (["--model", "tiny", "--lora_rank", "4"], ["lora_rank", "--model"]),
        (["--lora_rank", "4", "--ref_sync_steps", "5"], ["lora_rank", "ref_sync_steps"]),
        (["--lora_alpha", "4"], ["lora_alpha", "lora_rank", "--lora_rank 16"]),
        (["--quantize", "nf4"], ["quantize", "--lora_rank 16"]),
        (["--model", "tiny", "--quantize", "nf4", "--lora_rank", "4"], ["quantize", "--model"]),
        (["--model", "tiny", "--optimizer", "paged_adamw_8bit"], ["paged_adamw_8bit", "GPU", "adamw_8bit"]),
        (["--target_accuracy", "80"], ["target_accuracy", "[0, 1]", "got 80"]),
        (["--patience", "3", "--eval_every", "0"], ["patience", "--eval_every 25"]),
        (["--model", "tiny", "--answer_style", "boxed", "--system_prompt", "!"], ["answer_style", "system"]),
        (["--surrogate", "cispo"], ["clip_high=0.2", "surrogate", "--clip_high 5"]),
        (["--overlong", "soft", "--rewards", "{soft_overlong(cache=5): 1.0}"], ["soft_overlong", "overlong"]),
        (["--algo", "grpo_lead", "--rewards", "{lead: 1.0}"], ["lead", "--length_alpha 0"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, words, capsys, tmp_path):
    argv = [*argv, "--output", str(tmp_path / "run")]
    code, error = exit_of(GRPOConfig, train_grpo, argv, capsys)
    assert code == 2
    for word in words:
        assert word in error
    assert not (tmp_path / "run").exists()


def test_a_missing_column_names_those_that_exist(capsys, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"frage": "1 + 1?", "antwort": "2"}\n' * 40)
    argv = ["--model", "tiny", "--data", str(file), "--output", str(tmp_path / "run")]
    code, error = exit_of(GRPOConfig, train_grpo, argv, capsys)
    assert code == 2
    assert "frage" in error
    assert "question_column" in error


def test_a_model_folder_without_a_tokenizer_is_named(random_qwen, capsys, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(random_qwen) / name).read_bytes())
    code, error = exit_of(EvaluateConfig, evaluate, ["--model", str(tmp_path)], capsys)
    assert code == 2
    assert "tokenizer" in error


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    train_sft(quick_sft(tmp_path / "run", total_steps=2, eval_every=0))
    changed = dataclasses.replace(quick_sft(tmp_path / "run", eval_every=0), learning_rate=1.0)
    with pytest.raises(UserError, match="learning_rate: 0.005 -> 1.0"):
        train_sft(changed)
