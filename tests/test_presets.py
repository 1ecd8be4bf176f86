"""Every preset and every knob of the loss, from rewards to gradients, against the oracle's plain loops.

What runs is the step's own code: collate, credit, update. Only the policy is a stand-in, a table of numbers.
"""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from accelerate import Accelerator
from oracles import GROUP_SIZE, LIMIT, PROMPTS, ROWS, TOKENS, rollout
from torch import nn

from batches import MicroBatches
from credit import credit
from data import Problem
from inference import Completion
from rewards import Scores
from rollouts import Group, collate
from train_grpo import PRESETS, GRPOConfig
from updates import update

LEARNED = ("logprobs", "entropy", "values")


class Table(nn.Module):
    """A policy that says what the data says: a row for each completion, found by its first token."""

    def __init__(self, data, has_critic):
        super().__init__()
        self.logprobs, self.entropy, self.values = (nn.Parameter(torch.tensor(data[k])) for k in LEARNED)
        self.has_critic = has_critic

    def forward(self, input_ids, attention_mask, completion_mask, temperature):
        length = completion_mask.shape[1]
        rows = input_ids[:, -length] - 1
        values = self.values[rows, :length] if self.has_critic else None
        return self.logprobs[rows, :length], self.entropy[rows, :length], values


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def config(algo, **knobs):
    settings = {"group_size": GROUP_SIZE, "max_completion_tokens": LIMIT, "max_grad_norm": 1e9}
    return GRPOConfig(algo=algo, **settings | {"updates_per_rollout": 1, "prompts_per_step": PROMPTS} | knobs)


def collated(settings, data, order):
    """The batch of the data's groups, in the order of `order`."""
    lengths = data["completion_mask"].sum(1)
    groups = []
    for g in order:
        rows = range(g * GROUP_SIZE, (g + 1) * GROUP_SIZE)
        completions = [
            Completion([row + 1] * n, data["sampling_logprobs"][row, :n].tolist(), reason)
            for row in rows
            for n in [int(lengths[row])]
            for reason in ["length" if n == LIMIT else "stop"]
        ]
        correct = [bool(data["correct"][row]) for row in rows]
        totals = [float(data["rewards"][row]) for row in rows]
        scores = Scores(totals, {}, correct, [None] * len(rows), [False] * len(rows))
        groups.append(Group(g, Problem("q", "1"), [0], completions, [""] * len(rows), scores))
    batch = collate(groups, 0, settings.overlong == "mask")
    width = batch.tensors["completion_mask"].shape[1]
    rows = [row for g in order for row in range(g * GROUP_SIZE, (g + 1) * GROUP_SIZE)]
    for name, source in (("old_logprobs",) * 2, ("ref_logprobs",) * 2, ("values", "old_values")):
        batch.tensors[name] = torch.tensor(data[source][rows, :width])
    # In float64, so that rounding hides nothing.
    batch.tensors["sampling_logprobs"] = torch.tensor(data["sampling_logprobs"][rows, :width])
    return batch


def learn(accelerator, settings, data, order=range(PROMPTS)):
    """The loss of an update, and its gradient by what it was taken to."""
    batch = collated(settings, data, order)
    credit(batch, settings, accelerator, settings.kl_coef)
    table = Table(data, settings.baseline == "critic")
    taken = {}

    def step():
        for name, parameter in table.named_parameters():
            gradient = parameter.grad
            taken[name] = np.zeros(parameter.shape) if gradient is None else gradient.clone().numpy()

    movers = table, SimpleNamespace(step=step, zero_grad=table.zero_grad), SimpleNamespace(step=lambda: None)
    rows = list(range(len(batch.lengths)))
    told = update(*movers, MicroBatches(accelerator, 10_000), batch, rows, settings, settings.kl_coef)
    return told["loss"], taken


def expect(settings, data):
    """What the oracle says: the loss, and its central differences."""
    knobs = asdict(settings)
    point = {name: data[name] for name in LEARNED}

    def loss(name, x):
        moved = point | {name: x}
        return oracles.objective(
            knobs, data, moved["logprobs"], moved["entropy"], moved["values"], data["logprobs"]
        )

    reads = ["logprobs", *["entropy"] * bool(settings.entropy_coef)]
    reads += ["values"] * (settings.baseline == "critic")
    gradients = {name: np.zeros(data[name].shape) for name in LEARNED}
    for name in reads:
        gradients[name] = oracles.numeric_gradient(lambda x, name=name: loss(name, x), data[name])
    return loss("logprobs", data["logprobs"]), gradients


def assert_as_expected(accelerator, settings, data):
    loss, gradients = learn(accelerator, settings, data)
    expected_loss, expected = expect(settings, data)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name in LEARNED:
        np.testing.assert_allclose(gradients[name], expected[name], atol=1e-5)
    assert np.abs(gradients["logprobs"]).max() > 1e-3
    return gradients


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("algo", PRESETS)
def test_a_preset_is_the_papers_formula_in_value_and_gradient(accelerator, algo, seed):
    gradients = assert_as_expected(accelerator, config(algo), rollout(seed))
    assert bool(gradients["values"].any()) == (algo == "ppo")


KNOBS = [
    ("grpo", {"baseline": "leave_one_out"}),
    ("grpo", {"scale": "batch"}),
    ("grpo", {"scale": "none"}),
    ("grpo", {"ratio_level": "sequence"}),
    ("grpo", {"surrogate": "cispo", "clip_high": 5.0}),
    ("cispo", {"clip_high": 1.1}),
    ("grpo", {"clip_low": 0.01}),
    ("grpo", {"clip_high": 0.01}),
    ("grpo", {"weighting": "token"}),
    ("grpo", {"weighting": "constant"}),
    ("grpo", {"kl_coef": 0.5}),
    ("grpo", {"kl_placement": "reward"}),
    ("grpo", {"kl_estimator": "k1"}),
    ("grpo", {"kl_estimator": "k2"}),
    ("grpo", {"kl_estimator": "k3"}),
    ("rloo", {"kl_coef": 0.2}),
    ("rloo", {"kl_coef": 0.2, "kl_estimator": "k2"}),
    ("grpo", {"overlong": "soft"}),
    ("grpo", {"overlong": "mask"}),
    ("grpo", {"wrong_reward": -1.0}),
    ("grpo", {"length_alpha": 0.5}),
    ("grpo_lead", {"length_min_tokens": 100}),
    ("grpo", {"difficulty": "logistic"}),
    ("grpo", {"entropy_coef": 0.1}),
    ("grpo", {"importance_cap": 0.5}),
    ("ppo", {"scale": "none"}),
    ("ppo", {"kl_coef": 0.5}),
    ("ppo", {"gamma": 0.9}),
    ("ppo", {"lam": 0.5}),
    ("ppo", {"value_coef": 0.1}),
    ("ppo", {"value_clip": 0.01}),
]


@pytest.mark.parametrize(("algo", "knobs"), KNOBS)
def test_a_knob_does_what_the_formula_says_and_something(accelerator, algo, knobs):
    data = rollout()
    before = learn(accelerator, config(algo), data)[1]
    after = assert_as_expected(accelerator, config(algo, **knobs), data)
    assert max(np.abs(after[name] - before[name]).max() for name in LEARNED) > 1e-4


@pytest.mark.parametrize("algo", PRESETS)
def test_what_was_sampled_by_another_policy_counts_by_its_probability(accelerator, algo):
    data = rollout()
    noise = np.random.default_rng(3).normal(size=data["old_logprobs"].shape)
    assert_as_expected(accelerator, config(algo), data | {"sampling_logprobs": data["old_logprobs"] - noise})


def distance(first, second):
    whole = [np.concatenate([taken[name].ravel() for name in LEARNED]) for taken in (first, second)]
    return np.linalg.norm(whole[0] - whole[1]) / np.linalg.norm(whole[0])


@pytest.mark.parametrize("algo", PRESETS)
def test_micro_batches_padding_and_order_change_nothing(accelerator, algo):
    settings, data = config(algo), rollout()
    _, whole = learn(accelerator, settings, data)
    for budget in (1, 20):
        _, split = learn(accelerator, replace(settings, micro_batch_tokens=budget), data)
        assert distance(whole, split) <= 1e-6
    _, turned = learn(accelerator, settings, data, order=[2, 0, 1])
    assert distance(whole, turned) <= 1e-6
    wide = {k: np.pad(v, ((0, 0), (0, 3))) if np.ndim(v) == 2 else v for k, v in data.items()}
    _, padded = learn(accelerator, settings, wide)
    assert distance(whole, {name: value[:, :TOKENS] for name, value in padded.items()}) <= 1e-6


@pytest.mark.parametrize("algo", [algo for algo in PRESETS if algo != "ppo"])
def test_a_group_of_equal_rewards_has_exactly_zero_gradient(accelerator, algo):
    data = rollout()
    data["correct"][4:8] = False
    _, gradients = learn(accelerator, config(algo, kl_coef=0.0, overlong="none"), data)
    assert not gradients["logprobs"][4:8].any()
    assert gradients["logprobs"][:4].any()


def test_the_first_step_on_policy_has_no_loss_but_a_gradient(accelerator):
    loss, gradients = learn(accelerator, config("grpo", kl_coef=0.0), rollout(drift=0.0))
    assert loss == pytest.approx(0, abs=1e-6)
    assert np.abs(gradients["logprobs"]).max() > 1e-2


def test_dr_grpo_pushes_a_token_alike_whatever_its_completions_length(accelerator):
    data = rollout(drift=0.0)
    for algo, independent in (("dr_grpo", True), ("rloo", True), ("grpo", False)):
        settings = config(algo, kl_coef=0.0)
        batch = collated(settings, data, range(PROMPTS))
        credit(batch, settings, accelerator, 0.0)
        _, gradients = learn(accelerator, settings, data)
        advantages = batch.advantages.numpy()
        moved = data["completion_mask"] & (advantages != 0)
        push = gradients["logprobs"][moved] / advantages[moved]
        assert np.allclose(push, push[0]) is independent
        if algo == "dr_grpo":  # and it knows the limit, not the longest row
            assert push[0] == pytest.approx(-1 / (ROWS * LIMIT))


def test_gspo_has_one_ratio_a_completion_and_on_policy_grpos_gradient(accelerator):
    data = rollout(drift=0.0)
    on_policy = [learn(accelerator, config(algo, kl_coef=0.0), data)[1] for algo in ("gspo", "grpo")]
    assert distance(*on_policy) < 1e-6
    loose, data = {"clip_low": 50.0, "clip_high": 50.0, "kl_coef": 0.0}, rollout()
    gspo, grpo = (learn(accelerator, config(a, **loose), data)[1]["logprobs"] for a in ("gspo", "grpo"))
    kept = data["completion_mask"][0]
    assert np.allclose(gspo[0][kept], gspo[0, 0])
    assert not np.allclose(grpo[0][kept], grpo[0, 0])


@pytest.mark.parametrize("algo", PRESETS)
def test_the_eos_counts_and_what_comes_after_does_not(accelerator, algo):
    data = rollout(drift=0.0)
    _, gradients = learn(accelerator, config(algo), data)
    mask = data["completion_mask"]
    moved = [row for row in range(ROWS) if not 4 <= row < 8]
    assert gradients["logprobs"][moved, mask.sum(1)[moved] - 1].all()
    assert not gradients["logprobs"][~mask].any()


def test_float32_agrees_with_float64(accelerator):
    data = rollout()
    single = {k: v.astype(np.float32) if np.asarray(v).dtype == np.float64 else v for k, v in data.items()}
    for algo in PRESETS:
        exact = learn(accelerator, config(algo), data)[1]
        assert distance(exact, learn(accelerator, config(algo), single)[1]) < 1e-5
