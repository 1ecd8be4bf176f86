import numpy as np
import oracles
import pytest
import torch
from oracles import GROUP_SIZE, LIMIT, PROMPTS, ROWS, TOKENS, rollout

import losses

# The rows of the preset table, as far as the maths reads them.
PRESETS = {
    "ppo": {
        "baseline": "critic",
        "weighting": "token",
        "kl_coef": 0.01,
        "kl_placement": "reward",
        "kl_estimator": "k1",
        "gamma": 1.0,
        "lam": 0.95,
    },
    "grpo": {"kl_coef": 0.04, "kl_placement": "loss", "kl_estimator": "k3_corrected"},
    "dr_grpo": {"scale": "none", "weighting": "constant"},
    "dapo": {"clip": (0.2, 0.28), "weighting": "token"},
    "gspo": {"clip": (3e-4, 4e-4), "ratio_level": "sequence"},
    "grpo_lead": {"weighting": "token", "difficulty": "logistic"},
    "rloo": {"baseline": "leave_one_out", "scale": "none", "weighting": "constant"},
    "cispo": {"clip": (None, 5.0), "surrogate": "cispo", "weighting": "token"},
}
GRPO = {
    "baseline": "group",
    "scale": "group",
    "weighting": "sequence",
    "clip": (0.2, 0.2),
    "ratio_level": "token",
    "surrogate": "clip",
}
PRESETS = {name: GRPO | row for name, row in PRESETS.items()}


def tensor(array, dtype=torch.float64):
    return torch.as_tensor(np.asarray(array), dtype=dtype)


def leaf(array):
    return tensor(array).clone().requires_grad_()


def credit(knobs, data):
    """What the training step does before it learns: advantages [B, T], and returns for a critic."""
    mask = torch.as_tensor(data["completion_mask"])
    if knobs["baseline"] == "critic":
        penalty = losses.kl_penalty(tensor(data["old_logprobs"]), tensor(data["ref_logprobs"]), None, "k1")
        rewards = -knobs["kl_coef"] * penalty
        rewards[torch.arange(ROWS), mask.sum(1) - 1] += tensor(data["rewards"])
        advantages, returns = losses.gae(
            rewards, tensor(data["old_values"]), mask, knobs["gamma"], knobs["lam"]
        )
        return losses.whiten(advantages, mask), returns
    advantages = losses.group_advantages(
        tensor(data["rewards"]), GROUP_SIZE, knobs["baseline"], knobs["scale"]
    )
    if knobs.get("difficulty") == "logistic":
        correct = torch.as_tensor(data["correct"])
        advantages = advantages * losses.difficulty_weight(advantages, correct, GROUP_SIZE)
    return advantages[:, None].expand(mask.shape), None


def whole_loss(knobs, data, logprobs, values, rows=None):
    """The objective of a preset on the chosen rows, with the credit and weights of the whole batch."""
    rows = torch.arange(ROWS) if rows is None else rows
    mask = torch.as_tensor(data["completion_mask"])
    weights = losses.loss_weights(mask, knobs["weighting"], LIMIT)
    advantages, returns = credit(knobs, data)
    mask, weights = mask[rows], weights[rows]
    old, ref = tensor(data["old_logprobs"])[rows], tensor(data["ref_logprobs"])[rows]
    loss, _ = losses.policy_loss(
        logprobs[rows],
        old,
        advantages[rows],
        weights,
        mask,
        *knobs["clip"],
        knobs["ratio_level"],
        knobs["surrogate"],
    )
    if knobs.get("kl_placement") == "loss":
        penalty = losses.kl_penalty(logprobs[rows], ref, old, knobs["kl_estimator"])
        loss = loss + knobs["kl_coef"] * (weights * penalty).sum()
    if returns is not None:
        old_values = tensor(data["old_values"])[rows]
        loss = loss + 0.5 * losses.value_loss(values[rows], old_values, returns[rows], weights)
    return loss


def gradients(knobs, data, **kwargs):
    logprobs, values = leaf(data["logprobs"]), leaf(data["values"])
    loss = whole_loss(knobs, data, logprobs, values, **kwargs)
    loss.backward()
    return loss.item(), logprobs.grad, values.grad


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PRESETS)
def test_preset_equals_numpy_oracle_in_value_and_gradient(name, seed):
    knobs, data = PRESETS[name], rollout(seed)
    logp, values = data["logprobs"], data["values"]
    loss, logprob_grad, value_grad = gradients(knobs, data)
    assert loss == pytest.approx(oracles.preset_loss(knobs, data, logp, values, logp), abs=1e-5)
    expected = oracles.numeric_gradient(lambda x: oracles.preset_loss(knobs, data, x, values, logp), logp)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(logprob_grad, expected, atol=1e-5)
    if knobs["baseline"] == "critic":
        expected = oracles.numeric_gradient(lambda x: oracles.preset_loss(knobs, data, logp, x, logp), values)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(value_grad, expected, atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_float32_agrees_with_float64(name):
    data = rollout()
    logprobs = tensor(data["logprobs"], torch.float32).requires_grad_()
    advantages, _ = credit(PRESETS[name], data)
    mask = torch.as_tensor(data["completion_mask"])
    weights = losses.loss_weights(mask, PRESETS[name]["weighting"], LIMIT)
    args = (weights, mask, *PRESETS[name]["clip"], PRESETS[name]["ratio_level"], PRESETS[name]["surrogate"])
    loss, _ = losses.policy_loss(
        logprobs, tensor(data["old_logprobs"], torch.float32), advantages.float(), *args
    )
    exact, _ = losses.policy_loss(tensor(data["logprobs"]), tensor(data["old_logprobs"]), advantages, *args)
    assert loss.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert loss.item() == pytest.approx(exact.item(), abs=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_split_into_micro_batches_changes_nothing(name):
    data = rollout()
    loss, logprob_grad, value_grad = gradients(PRESETS[name], data)
    logprobs, values = leaf(data["logprobs"]), leaf(data["values"])
    parts = [whole_loss(PRESETS[name], data, logprobs, values, rows) for rows in torch.arange(ROWS).split(5)]
    for part in parts:
        part.backward()
    assert sum(parts).item() == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(logprobs.grad, logprob_grad, atol=1e-12, rtol=0)
    if value_grad is not None:
        torch.testing.assert_close(values.grad, value_grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_more_padding_changes_nothing(name):
    data = rollout()
    padded = dict(data)
    for key in ("logprobs", "old_logprobs", "ref_logprobs", "values", "old_values"):
        padded[key] = np.pad(data[key], ((0, 0), (0, 3)), constant_values=-7.7)
    padded["completion_mask"] = np.pad(data["completion_mask"], ((0, 0), (0, 3)))
    loss, logprob_grad, _ = gradients(PRESETS[name], data)
    padded_loss, padded_grad, _ = gradients(PRESETS[name], padded)
    assert padded_loss == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(padded_grad[:, :TOKENS], logprob_grad, atol=1e-12, rtol=0)
    assert not padded_grad[:, TOKENS:].any()


@pytest.mark.parametrize("name", PRESETS)
def test_order_of_groups_and_within_groups_changes_nothing(name):
    data = rollout()
    rng = np.random.default_rng(5)
    order = np.concatenate([g * GROUP_SIZE + rng.permutation(GROUP_SIZE) for g in rng.permutation(PROMPTS)])
    shuffled = {k: v[order] if isinstance(v, np.ndarray) else v for k, v in data.items()}
    loss, logprob_grad, _ = gradients(PRESETS[name], data)
    shuffled_loss, shuffled_grad, _ = gradients(PRESETS[name], shuffled)
    assert shuffled_loss == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(shuffled_grad, logprob_grad[order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("ppo", "grpo")])
def test_all_equal_group_has_exactly_zero_gradient(name):
    _, logprob_grad, _ = gradients(PRESETS[name], rollout())
    assert not logprob_grad[4:8].any()
    assert logprob_grad[:4].any()


def test_first_on_policy_step_has_zero_loss_but_a_gradient():
    data = rollout(drift=0.0)
    loss, logprob_grad, _ = gradients(GRPO, data)
    assert loss == pytest.approx(0, abs=1e-6)
    assert logprob_grad.abs().max() > 1e-2


def test_dr_grpo_token_gradient_does_not_depend_on_length():
    data = rollout(drift=0.0)
    for name, independent in (("dr_grpo", True), ("grpo_lead", True), ("gspo", False)):
        knobs = PRESETS[name] | {"difficulty": None}
        _, logprob_grad, _ = gradients(knobs, data)
        advantages, _ = credit(knobs, data)
        mask = torch.as_tensor(data["completion_mask"]) & (advantages != 0)
        per_advantage = (logprob_grad / advantages)[mask]
        assert torch.allclose(per_advantage, per_advantage[0]) is independent
    # and it knows the generation limit, not the longest row
    _, logprob_grad, _ = gradients(PRESETS["dr_grpo"], data)
    advantages, _ = credit(PRESETS["dr_grpo"], data)
    assert logprob_grad[0, 0].item() == pytest.approx(-advantages[0, 0].item() / (ROWS * LIMIT))


def test_gspo_equals_sequence_weighted_grpo_on_policy():
    data = rollout(drift=0.0)
    _, gspo, _ = gradients(PRESETS["gspo"], data)
    _, grpo, _ = gradients(GRPO, data)
    torch.testing.assert_close(gspo, grpo, atol=1e-12, rtol=0)


def test_gspo_has_one_ratio_a_completion():
    data = rollout()
    _, gspo, _ = gradients(PRESETS["gspo"] | {"clip": (50.0, 50.0)}, data)
    _, grpo, _ = gradients(GRPO | {"clip": (50.0, 50.0)}, data)
    for row in (0, 2, 3):
        kept = torch.as_tensor(data["completion_mask"])[row]
        assert torch.allclose(gspo[row][kept], gspo[row, 0])
    assert not torch.allclose(grpo[0], grpo[0, 0].expand(TOKENS))


def test_eos_counts_and_tokens_after_it_do_not():
    data = rollout(drift=0.0)
    mask = torch.as_tensor(data["completion_mask"])
    for name in PRESETS:
        _, logprob_grad, _ = gradients(PRESETS[name], data)
        eos = mask.sum(1) - 1
        informative = torch.tensor([row for row in range(ROWS) if not 4 <= row < 8])
        assert logprob_grad[informative, eos[informative]].all()
        assert not logprob_grad[~mask].any()
