"""The step of train_grpo: credit, the choice of groups, and a gradient that nothing but the data decides."""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import train_grpo
from batches import MicroBatches
from credit import credit
from data import Problem
from inference import Completion
from models import Policy
from rewards import Scores
from rollouts import Group, collate, rollout_rows
from runs.config import UserError
from train_grpo import PRESETS, GRPOConfig, choose_groups
from train_sft import SFTConfig
from updates import minibatches, update

LIMIT = 12


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def group(number, rewards, correct=None, lengths=None, prompt=5):
    generator = torch.Generator().manual_seed(number)
    lengths = lengths or [3 + (number + i) % 8 for i in range(len(rewards))]
    completions = []
    for length in lengths:
        ids = torch.randint(9, 200, (length,), generator=generator).tolist()
        reason = "length" if length == LIMIT else "stop"
        completions.append(Completion(ids, [-1.0] * length, reason))
    verdicts = correct if correct is not None else [None] * len(rewards)
    scores = Scores(rewards, {"toy": rewards}, verdicts, [None] * len(rewards), [False] * len(rewards))
    ids = torch.randint(9, 200, (prompt,), generator=generator).tolist()
    return Group(number, Problem("q", "1"), ids, completions, ["text"] * len(rewards), scores)


def config(**changes):
    settings = {"group_size": 4, "max_completion_tokens": LIMIT, "kl_coef": 0.0, "micro_batch_tokens": 10_000}
    return GRPOConfig(**settings | changes)


def make_batch(policy, accelerator, settings, groups):
    """A batch with credit, as a step has it before it learns; the reference is the policy, moved by 0.1."""
    batch = collate(groups, pad_token_id=0, drop_truncated=settings.overlong == "mask")
    inputs = {k: batch.tensors[k] for k in ("input_ids", "attention_mask", "completion_mask")}
    with torch.no_grad():
        batch.tensors["old_logprobs"] = policy(**inputs)[0]
    batch.tensors["sampling_logprobs"] = batch.tensors["old_logprobs"]
    batch.tensors["ref_logprobs"] = batch.tensors["old_logprobs"] - 0.1
    batch.tensors["values"] = torch.linspace(-1, 1, batch.tensors["old_logprobs"].numel()).view(
        batch.tensors["old_logprobs"].shape
    )
    credit(batch, settings, accelerator, settings.kl_coef)
    return batch


def gradient(policy, accelerator, settings, batch, rows=None):
    """The gradient of one update, and what it told."""
    policy = copy.deepcopy(policy)
    taken = []

    def step():
        taken.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters())

    optimizer = SimpleNamespace(step=step, zero_grad=policy.zero_grad)
    scheduler = SimpleNamespace(step=lambda: None)
    rows = rows or list(range(len(batch.lengths)))
    # A clipped gradient would hide a wrong scale.
    settings = replace(settings, max_grad_norm=1e9)
    micro_batches = MicroBatches(accelerator, settings.micro_batch_tokens)
    told = update(policy, optimizer, scheduler, micro_batches, batch, rows, settings, settings.kl_coef)
    return torch.cat([g.flatten() for g in taken]), told


MIXED = [[1.0, 0.0, 0.0, 1.0], [0.1, 1.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]


@pytest.fixture(scope="module")
def policy(tiny):
    return Policy(copy.deepcopy(tiny[0]))


@pytest.mark.parametrize("algo", PRESETS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_micro_batches_leave_the_gradient_the_same(policy, critical, accelerator, algo, kl_coef):
    policy = critical if algo == "ppo" else policy
    settings = config(algo=algo, kl_coef=kl_coef, updates_per_rollout=1)
    groups = [group(i, rewards, prompt=3 + 4 * i) for i, rewards in enumerate(MIXED)]
    batch = make_batch(policy, accelerator, settings, groups)
    whole, _ = gradient(policy, accelerator, settings, batch)
    assert whole.norm() > 1e-3
    for budget in (1, 40, 80):
        split, _ = gradient(policy, accelerator, replace(settings, micro_batch_tokens=budget), batch)
        assert (split - whole).norm() / whole.norm() <= 1e-6


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_out_of_memory_in_the_backward_pass_leaves_the_gradient_and_what_is_told_the_same(
    policy, critical, accelerator, algo, monkeypatch
):
    policy = critical if algo == "ppo" else policy
    settings = config(algo=algo, updates_per_rollout=1)
    batch = make_batch(policy, accelerator, settings, [group(i, rewards) for i, rewards in enumerate(MIXED)])
    whole, told = gradient(policy, accelerator, settings, batch)
    backward, calls = accelerator.backward, []

    def failing(loss):
        calls.append(loss)
        backward(loss)  # a partial gradient is there
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(accelerator, "backward", failing)
    halved, told_again = gradient(policy, accelerator, settings, batch)
    assert len(calls) >= 3 + 3
    assert (halved - whole).norm() / whole.norm() <= 1e-6
    assert told.pop("cause") is told_again.pop("cause") is None
    assert told_again == pytest.approx(told, rel=1e-5, abs=1e-6)


def test_the_first_update_has_ratio_one_no_loss_and_a_gradient(policy, accelerator):
    settings = config()
    groups = [group(i, rewards) for i, rewards in enumerate(MIXED)]
    batch = make_batch(policy, accelerator, settings, groups)
    got, told = gradient(policy, accelerator, settings, batch)
    assert abs(told["loss"]) < 1e-6
    assert told["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert got.norm() > 1e-3


def test_a_group_without_a_difference_teaches_nothing_but_keeps_its_share_of_the_divisor(policy, accelerator):
    settings = config()
    alone = make_batch(policy, accelerator, settings, [group(2, MIXED[2])])
    nothing, _ = gradient(policy, accelerator, settings, alone)
    assert torch.equal(nothing, torch.zeros_like(nothing))
    one = make_batch(policy, accelerator, settings, [group(0, MIXED[0])])
    two = make_batch(policy, accelerator, settings, [group(0, MIXED[0]), group(2, MIXED[2])])
    first, _ = gradient(policy, accelerator, settings, one)
    half, _ = gradient(policy, accelerator, settings, two)
    assert (2 * half - first).norm() / first.norm() < 1e-5


@pytest.mark.parametrize("of", ["the sampler's", "the policy's"])
def test_a_log_probability_that_is_not_finite_keeps_the_weights_also_where_clipping_hides_it(
    policy, accelerator, monkeypatch, of
):
    settings = config(updates_per_rollout=1)
    batch = make_batch(policy, accelerator, settings, [group(0, [1.0, 0.0, 0.0, 0.0])])
    if of == "the sampler's":  # a ratio without end, which is clipped where the advantage is positive
        batch.tensors["old_logprobs"] = batch.tensors["old_logprobs"].clone()  # apart from what was sampled
        batch.tensors["old_logprobs"][0, 0] = -torch.inf
    else:
        forward = Policy.forward

        def forbid(self, *arguments, **named):
            logprobs, *rest = forward(self, *arguments, **named)
            return logprobs.index_fill(1, torch.tensor([0]), -torch.inf), *rest

        monkeypatch.setattr(Policy, "forward", forbid)
    optimizer = SimpleNamespace(step=lambda: pytest.fail("it moved"), zero_grad=policy.zero_grad)
    scheduler = SimpleNamespace(step=lambda: None)
    micro_batches = MicroBatches(accelerator, 10_000)
    rows = list(range(4))
    told = update(policy, optimizer, scheduler, micro_batches, batch, rows, settings, 0.0)
    assert math.isfinite(told["loss"])
    assert math.isfinite(told["grad_norm"])
    assert told["cause"].endswith("log-probabilities -inf")


@pytest.fixture(scope="module")
def critical(tiny):
    return Policy(copy.deepcopy(tiny[0]), "shared")


def test_minibatches_cover_every_row_once_an_epoch(policy, accelerator):
    settings = config(updates_per_rollout=2, epochs_per_rollout=3, prompts_per_step=2)
    batch = make_batch(policy, accelerator, settings, [group(i, MIXED[0]) for i in range(2)])
    assert list(minibatches(batch, settings)) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3
    # Two processes with two groups each put into a minibatch what one process with four does.
    settings = config(updates_per_rollout=2, prompts_per_step=4)
    every = make_batch(policy, accelerator, settings, [group(i, MIXED[0]) for i in range(4)])
    halves = [make_batch(policy, accelerator, settings, every.groups[i : i + 2]) for i in (0, 2)]
    numbers = [
        [{batch.groups[row // 4].number for row in rows} for rows in minibatches(batch, settings)]
        for batch in (every, *halves)
    ]
    assert numbers[0] == [first | second for first, second in zip(*numbers[1:], strict=True)]


def test_dynamic_sampling_takes_groups_that_are_neither_all_right_nor_all_wrong():
    groups = [
        group(0, [1.0, 1.1, 1.0, 1.0], correct=[True] * 4),  # the form differs, the answers do not
        group(1, [0.1] * 4, correct=[False, None, False, None]),
        group(2, [0.0, 1.0, 0.0, 0.0], correct=[False, True, False, False]),
        group(3, [0.0, 0.5, 0.0, 0.0]),  # nothing is judged: what is earned decides
    ]
    assert [g.is_informative for g in groups] == [False, False, True, True]
    on, off = config(dynamic_sampling=True), config(dynamic_sampling=False)
    assert [g.number for g in choose_groups(groups, 3, on)] == [2, 3, 0]
    assert [g.number for g in choose_groups(groups, 3, off)] == [0, 1, 2]


def test_difficulty_is_known_only_where_answers_are_judged(policy, accelerator):
    rewards = [1.0, 0.0, 0.0, 0.0]
    groups = [group(0, rewards), group(1, rewards, correct=[True, False, False, False])]
    plain = make_batch(policy, accelerator, config(), groups).advantages
    weighed = make_batch(policy, accelerator, config(difficulty="logistic"), groups).advantages
    assert torch.equal(weighed[:4], plain[:4])
    assert weighed[4, 0] > 1.4 * plain[4, 0] > 0


def test_a_separate_critic_learns_at_the_policys_rate_and_a_head_at_its_own():
    assert GRPOConfig(algo="ppo").critic_learning_rate == 1e-3
    assert GRPOConfig(algo="ppo", critic="separate", learning_rate=1e-6).critic_learning_rate == 1e-6
    assert GRPOConfig(algo="ppo", critic="separate", critic_learning_rate=0.5).critic_learning_rate == 0.5


def test_overlong_completions_are_punished_or_left_out(policy, accelerator):
    rewards, lengths = [1.0, 0.0, 1.0, 0.0], [LIMIT, 4, 4, 4]
    groups = [group(0, rewards, lengths=lengths)]
    plain = make_batch(policy, accelerator, config(overlong="none"), groups).advantages
    soft = make_batch(policy, accelerator, config(overlong="soft"), groups)
    assert plain[0, 0] == plain[2, 0] > 0
    assert soft.advantages[0, 0] < 0 < soft.advantages[2, 0]  # a right answer earns what a wrong one does
    assert soft.tensors["completion_mask"].any(1).all()
    settings = config(overlong="mask", weighting="token")
    batch = make_batch(policy, accelerator, settings, groups)
    assert batch.tensors["completion_mask"].any(1).tolist() == [False, True, True, True]
    assert not batch.advantages[0].any()
    _, told = gradient(policy, accelerator, settings, batch)
    assert told["tokens"] == 12


def test_rows_tell_every_completion_also_of_groups_left_out():
    groups = [group(0, [0.1] * 4, correct=[False] * 4), group(1, [0.0, 1.0, 0.0, 0.0])]
    chosen = choose_groups(groups, 1, config(dynamic_sampling=True))
    batch = collate(chosen, 0)
    batch.advantages = torch.tensor([-1.0, 3.0, -1.0, -1.0])[:, None] * batch.tensors["completion_mask"]
    rows = rollout_rows(groups, batch, step=7)
    assert [row["advantage"] for row in rows] == [None] * 4 + [-1.0, 3.0, -1.0, -1.0]
    assert {row["group"] for row in rows} == {0, 1}


def test_no_line_but_the_table_asks_for_an_algorithms_name():
    root = Path(__file__).parent.parent
    source = "".join((root / f"{name}.py").read_text() for name in ("train_grpo", "credit", "updates"))
    assert not re.search(r"algo\b\s*(==|!=|in\b)", source)


def test_presets_fill_what_is_unset_and_flags_win():
    assert GRPOConfig(algo="dapo").clip_high == 0.28
    assert GRPOConfig(algo="dapo", clip_high=0.3).clip_high == 0.3
    assert GRPOConfig(algo="gspo").ratio_level == "sequence"
    assert all(row.keys() == PRESETS["grpo"].keys() for row in PRESETS.values())


def test_the_cold_start_is_of_the_same_task_and_asks_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(train_grpo, "cold_start", lambda config, accelerator: begun.append(config) or 130)
    asked = {"seed": 3, "data": "countdown", "answer_style": "boxed", "prefill_think": True}
    accelerator = SimpleNamespace(print=lambda text: None, free_memory=lambda: None, is_fsdp2=False)
    assert train_grpo.ensure_cold_start(GRPOConfig(**asked), accelerator) == 130
    assert begun == [SFTConfig(**asked)]
    accelerator.is_fsdp2 = True  # Muon needs whole matrices
    with pytest.raises(UserError, match="is not there yet, .* not sharded: run python train_sft.py first"):
        train_grpo.ensure_cold_start(GRPOConfig(**asked), accelerator)
