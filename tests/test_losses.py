import math

import numpy as np
import oracles
import pytest
import torch
from oracles import GROUP_SIZE, LIMIT, ROWS, TOKENS, rollout

import losses


def tensor(array, dtype=torch.float64):
    return torch.as_tensor(np.asarray(array), dtype=dtype)


def leaf(array):
    return tensor(array).clone().requires_grad_()


# ----------------------------------------------------------------------------------------------------
# Credit


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_group_advantages_equal_oracle(baseline, scale):
    rewards = rollout()["rewards"]
    for group_size in (2, 4, 6):
        for eps in (1e-4, 0.5):
            got = losses.group_advantages(tensor(rewards), group_size, baseline, scale, eps)
            expected = oracles.group_advantages(rewards, group_size, baseline, scale, eps)
            np.testing.assert_allclose(got, expected, atol=1e-9)


def test_group_advantages_defaults_are_the_contract():
    rewards = tensor(rollout()["rewards"])
    expected = losses.group_advantages(rewards, GROUP_SIZE, "group", "group", 1e-4)
    assert torch.equal(losses.group_advantages(rewards, GROUP_SIZE), expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-9, 12345.678])
def test_all_equal_group_gives_exactly_zero(baseline, scale, value):
    rewards = torch.full((14,), value)
    rewards[7] += 1
    advantages = losses.group_advantages(rewards, 7, baseline, scale)
    assert (advantages[:7] == 0).all()
    assert (advantages[7:] != 0).all()


def test_nearly_equal_group_is_not_taken_for_equal():
    advantages = losses.group_advantages(torch.tensor([0.5, 0.5, 0.5, 0.50001]), 4, scale="none")
    assert advantages[3] > 0


def test_batch_scale_across_ranks_equals_one_process():
    rewards = tensor(rollout()["rewards"])
    together = losses.group_advantages(rewards, GROUP_SIZE, scale="batch")
    ranks = rewards[:4], rewards[4:]
    total = sum(losses.moments(rank) for rank in ranks)
    apart = [losses.group_advantages(r, GROUP_SIZE, scale="batch", batch_moments=total) for r in ranks]
    torch.testing.assert_close(torch.cat(apart), together, atol=1e-12, rtol=0)


def test_whiten_equals_oracle_and_is_the_same_across_ranks():
    data = rollout()
    values, mask = data["values"], data["completion_mask"]
    for eps in (1e-4, 0.5):
        got = losses.whiten(tensor(values), torch.as_tensor(mask), eps=eps)
        np.testing.assert_allclose(got, oracles.whiten(values, mask, eps), atol=1e-9)
    ranks = [(tensor(values[rows]), torch.as_tensor(mask[rows])) for rows in (slice(0, 5), slice(5, ROWS))]
    total = sum(losses.moments(*rank) for rank in ranks)
    apart = torch.cat([losses.whiten(*rank, batch_moments=total) for rank in ranks])
    np.testing.assert_allclose(apart, oracles.whiten(values, mask), atol=1e-9)


def test_whiten_survives_equal_advantages():
    whitened = losses.whiten(torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool))
    assert whitened.abs().max() < 1e-3


def test_difficulty_weight_equals_oracle():
    data = rollout()
    advantages = oracles.group_advantages(data["rewards"], GROUP_SIZE)
    for group_size in (4, 6):
        for options in ({}, {"a": 0.1}, {"b": 2.0}, {"x0": 0.5}, {"k": 3.0}):
            got = losses.difficulty_weight(
                tensor(advantages), torch.as_tensor(data["correct"]), group_size, **options
            )
            expected = oracles.difficulty_weight(advantages, data["correct"], group_size, **options)
            np.testing.assert_allclose(got, expected, atol=1e-9)


def test_difficulty_weight_favours_rare_success_and_rare_failure():
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -1.5])
    correct = advantages > 0
    hard_success, hard_failure, *_, easy_success, easy_failure = losses.difficulty_weight(
        advantages, correct, 4
    )
    assert hard_success > 1.49  # w(0.25) = 0.4 + 1.1 / (1 + e^-5)
    assert easy_failure > 1.49
    assert hard_failure == pytest.approx(0.95)  # w(0.75), the middle of the slope
    assert easy_success == pytest.approx(0.95)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.95), (1.0, 1.0), (0.97, 0.0)])
def test_gae_equals_oracle_and_reads_no_padding(gamma, lam):
    data = rollout()
    mask = data["completion_mask"].copy()
    mask[3] = False
    rewards = np.where(mask, np.random.default_rng(3).normal(size=mask.shape), np.nan)
    values = np.where(mask, data["old_values"], np.nan)
    got = losses.gae(tensor(rewards), leaf(values), torch.as_tensor(mask), gamma, lam)
    for ours, expected in zip(got, oracles.gae(rewards, values, mask, gamma, lam), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-9)
        assert not ours.requires_grad


def test_gae_with_lambda_one_is_return_minus_value():
    rewards, mask = torch.tensor([[0.0, 0.0, 2.0, 0.0]]), torch.tensor([[True, True, True, False]])
    values = torch.tensor([[0.5, 1.0, 1.5, 9.0]])
    advantages, returns = losses.gae(rewards, values, mask, lam=1.0)
    assert advantages.tolist() == [[1.5, 1.0, 0.5, 0.0]]
    assert returns.tolist() == [[2.0, 2.0, 2.0, 0.0]]


# ----------------------------------------------------------------------------------------------------
# Weights and objectives


@pytest.mark.parametrize("weighting", ["sequence", "token", "constant"])
def test_loss_weights_equal_oracle(weighting):
    mask = rollout()["completion_mask"].copy()
    mask[2] = False  # out of the loss and out of the divisor
    got = losses.loss_weights(torch.as_tensor(mask), weighting, LIMIT)
    np.testing.assert_allclose(got, oracles.loss_weights(mask, weighting, LIMIT), atol=1e-7)
    assert not got[2].any()
    if weighting != "constant":
        assert got.sum().item() == pytest.approx(1, abs=1e-6)


def test_constant_weights_follow_the_generation_limit():
    mask = torch.as_tensor(rollout()["completion_mask"])
    short, long = (losses.loss_weights(mask, "constant", limit) for limit in (LIMIT, 2 * LIMIT))
    torch.testing.assert_close(short, 2 * long)


@pytest.mark.parametrize("as_type", [int, torch.tensor])
def test_totals_of_the_whole_update_replace_those_of_the_mask(as_type):
    mask = torch.as_tensor(rollout()["completion_mask"])
    sequences, tokens = mask.any(1).sum().item(), mask.sum().item()
    totals = {"total_sequences": as_type(sequences), "total_tokens": as_type(tokens)}
    for weighting in ("sequence", "token", "constant"):
        whole = losses.loss_weights(mask, weighting, LIMIT)
        parts = [losses.loss_weights(part, weighting, LIMIT, **totals) for part in mask.split(5)]
        torch.testing.assert_close(torch.cat(parts), whole)
        assert not torch.allclose(losses.loss_weights(mask[:5], weighting, LIMIT), whole[:5])


@pytest.mark.parametrize("weighting", ["sequence", "token", "constant"])
def test_empty_mask_has_zero_weights(weighting):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert losses.loss_weights(mask, weighting, LIMIT).tolist() == [[0.0] * 3] * 2
    totals = {"total_sequences": 0, "total_tokens": 0}
    assert losses.loss_weights(mask, weighting, LIMIT, **totals).tolist() == [[0.0] * 3] * 2


def policy_case(seed=0):
    data = rollout(seed)
    rng = np.random.default_rng(seed + 100)
    advantages = rng.normal(size=(ROWS, TOKENS))
    advantages[::2, 1:4] = 0.0
    weights = rng.random((ROWS, TOKENS))
    return data["logprobs"], data["old_logprobs"], advantages, weights, data["completion_mask"]


POLICY_KNOBS = [
    (0.2, 0.2, "token", "clip"),
    (0.2, 0.4, "token", "clip"),
    (0.4, 0.2, "token", "clip"),
    (0.2, 1.0, "token", "cispo"),
    (0.2, 0.5, "token", "cispo"),
    (None, 1.1, "sequence", "cispo"),
]


@pytest.mark.parametrize("knobs", POLICY_KNOBS)
def test_policy_loss_equals_oracle_in_value_gradient_and_stats(knobs):
    logp, old, advantages, weights, mask = policy_case()
    logprobs = leaf(logp)
    loss, stats = losses.policy_loss(
        logprobs, tensor(old), tensor(advantages), tensor(weights), torch.as_tensor(mask), *knobs
    )
    loss.backward()
    assert loss.item() == pytest.approx(
        oracles.policy_loss(logp, old, advantages, weights, mask, *knobs), abs=1e-5
    )
    expected = oracles.numeric_gradient(
        lambda x: oracles.policy_loss(x, old, advantages, weights, mask, *knobs, frozen=logp), logp
    )
    np.testing.assert_allclose(logprobs.grad, expected, atol=1e-5)
    expected_stats = oracles.policy_stats(logp, old, advantages, mask, *knobs)
    assert {key: value.item() for key, value in stats.items()} == pytest.approx(expected_stats, abs=1e-9)
    assert 0 < stats["clip_fraction"] < 1
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_gspo_with_equal_credit_equals_oracle(ratio_level):
    """GSPO-token has the sequence ratio's gradient where a completion has one advantage and weight."""
    logp, old, advantages, weights, mask = policy_case()
    advantages, weights = advantages[:, :1].repeat(TOKENS, 1), weights[:, :1].repeat(TOKENS, 1)
    logp = old + 0.05 * (logp - old)
    for clip in ((0.01, 0.3), (0.3, 0.01)):
        logprobs = leaf(logp)
        loss, stats = losses.policy_loss(
            logprobs,
            tensor(old),
            tensor(advantages),
            tensor(weights),
            torch.as_tensor(mask),
            *clip,
            ratio_level,
        )
        loss.backward()
        args = (old, advantages, weights, mask, *clip, ratio_level)
        assert loss.item() == pytest.approx(oracles.policy_loss(logp, *args), abs=1e-9)
        expected = oracles.numeric_gradient(lambda x, args=args: oracles.policy_loss(x, *args), logp)
        np.testing.assert_allclose(logprobs.grad, expected, atol=1e-5)
        expected_stats = oracles.policy_stats(logp, old, advantages, mask, *clip, ratio_level)
        assert {key: value.item() for key, value in stats.items()} == pytest.approx(expected_stats, abs=1e-9)


def test_policy_loss_defaults_are_token_ratios_and_the_clip():
    args = [tensor(x) for x in policy_case()[:4]]
    mask = torch.as_tensor(policy_case()[4])
    expected, _ = losses.policy_loss(*args, mask, 0.2, 0.2, "token", "clip")
    assert losses.policy_loss(*args, mask, 0.2, 0.2)[0] == expected


@pytest.mark.parametrize("knobs", POLICY_KNOBS + [(0.2, 0.2, "sequence", "clip")])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_padding_contributes_nothing_even_if_not_finite(knobs, junk):
    arrays = policy_case()
    mask = torch.as_tensor(arrays[4])
    clean, dirty = [], []
    for arrays_of, fill in ((clean, 0.0), (dirty, junk)):
        tensors = [torch.where(mask, tensor(x), fill) for x in arrays[:4]]
        tensors[0].requires_grad_()
        loss, stats = losses.policy_loss(*tensors, mask, *knobs)
        loss.backward()
        arrays_of += [loss.detach(), tensors[0].grad, *stats.values()]
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert not dirty[1][~mask].any()


def test_not_finite_logprob_that_counts_is_seen():
    tensors = [tensor(x) for x in policy_case()[:4]]
    mask = torch.as_tensor(policy_case()[4])
    tensors[0][0, 0] = math.nan
    assert losses.policy_loss(*tensors, mask, 0.2, 0.2)[0].isnan()


def test_enormous_ratio_stays_finite():
    logprobs = torch.tensor([[-1.0, -400.0]], requires_grad=True)
    ones, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for sign in (1, -1):
        loss, stats = losses.policy_loss(
            logprobs, torch.tensor([[-400.0, -1.0]]), sign * ones, ones, mask, 0.2, 0.2
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert gradient.isfinite().all()
        assert all(value.isfinite() for value in stats.values())


def test_policy_stats_combine_over_micro_batches():
    *arrays, mask = (torch.as_tensor(x) for x in policy_case())
    _, whole = losses.policy_loss(*arrays, mask, 0.2, 0.3)
    parts = [
        losses.policy_loss(*(x[rows] for x in arrays), mask[rows], 0.2, 0.3)[1]
        for rows in torch.arange(ROWS).split(5)
    ]
    tokens = sum(part["tokens"] for part in parts)
    assert tokens == whole["tokens"] == mask.sum()
    for key in ("approx_kl", "clip_fraction", "ratio_mean"):
        torch.testing.assert_close(sum(part["tokens"] * part[key] for part in parts) / tokens, whole[key])
    assert max(part["ratio_max"] for part in parts) == whole["ratio_max"]


def test_micro_batch_without_a_token_is_zero():
    logprobs = torch.full((2, 3), math.nan, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for ratio_level in ("token", "sequence"):
        loss, stats = losses.policy_loss(
            logprobs, logprobs, logprobs, mask.float(), mask, 0.2, 0.2, ratio_level
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss == 0
        assert not gradient.any()
        assert all(value == 0 for value in stats.values())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_corrected"])
def test_kl_penalty_equals_oracle_in_value_and_gradient(estimator):
    data = rollout()
    logp, old, ref = data["logprobs"], data["old_logprobs"], data["ref_logprobs"]
    logprobs = leaf(logp)
    penalty = losses.kl_penalty(logprobs, tensor(ref), tensor(old), estimator)
    np.testing.assert_allclose(penalty.detach(), oracles.kl_penalty(logp, ref, old, estimator), rtol=1e-9)
    scale = np.random.default_rng(1).random(logp.shape)
    (penalty * tensor(scale)).sum().backward()
    expected = oracles.numeric_gradient(
        lambda x: (scale * oracles.kl_penalty(x, ref, old, estimator)).sum(), logp
    )
    np.testing.assert_allclose(logprobs.grad, expected, atol=1e-5, rtol=1e-6)


def test_kl_penalty_default_is_k1():
    logp, ref = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    assert losses.kl_penalty(logp, ref).item() == pytest.approx(0.5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_corrected"])
def test_kl_penalty_clamps_the_log_ratio(estimator):
    low, high = torch.tensor([[-500.0]]), torch.tensor([[-1.0]])
    for policy, reference in ((low, high), (high, low)):
        penalty = losses.kl_penalty(policy, reference, policy, estimator)
        np.testing.assert_allclose(
            penalty,
            oracles.kl_penalty(policy.numpy(), reference.numpy(), policy.numpy(), estimator),
            rtol=1e-6,
        )
        assert penalty.isfinite().all()


def test_k3_is_precise_for_a_small_ratio():
    reference = torch.tensor([[1e-4]])
    assert losses.kl_penalty(torch.zeros(1, 1), reference, None, "k3").item() == pytest.approx(5e-9, rel=0.02)


# softmax((.2, -.5, 1, .3)) against softmax((0, .1, .4, -.2)): KL = 0.081685, with these gradients
POLICY_LOGITS, REFERENCE_LOGITS = tensor([0.2, -0.5, 1.0, 0.3]), tensor([0.0, 0.1, 0.4, -0.2])
EXACT_KL_GRADIENT = [-0.035382, -0.099866, 0.105669, 0.029579]
K3_GRADIENT = [-0.019308, -0.147410, 0.123189, 0.043530]


def expected_kl(estimator):
    """The average over samples, of the estimator and its gradient: each action weighed by its probability."""
    logits = POLICY_LOGITS.clone().requires_grad_()
    logp, reference = logits.log_softmax(0)[None], REFERENCE_LOGITS.log_softmax(0)[None]
    mean = (logp.detach().exp() * losses.kl_penalty(logp, reference, logp.detach(), estimator)).sum()
    mean.backward()
    return mean.item(), logits.grad


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [("k1", [0.0] * 4), ("k2", EXACT_KL_GRADIENT), ("k3", K3_GRADIENT), ("k3_corrected", EXACT_KL_GRADIENT)],
)
def test_expected_kl_and_its_gradient_on_a_categorical(estimator, gradient):
    value, got = expected_kl(estimator)
    np.testing.assert_allclose(got, gradient, atol=1e-6)
    if estimator != "k2":
        assert value == pytest.approx(0.081685, abs=1e-6)


def test_value_loss_equals_oracle_in_value_and_gradient():
    data = rollout()
    returns = data["old_values"] + np.random.default_rng(2).normal(size=(ROWS, TOKENS))
    weights = np.where(data["completion_mask"], np.random.default_rng(3).random((ROWS, TOKENS)), 0)
    for clip in (0.2, 0.05, 9.0):
        values = leaf(data["values"])
        loss = losses.value_loss(values, tensor(data["old_values"]), tensor(returns), tensor(weights), clip)
        loss.backward()
        args = (data["old_values"], returns, weights, clip)
        assert loss.item() == pytest.approx(oracles.value_loss(data["values"], *args), abs=1e-9)
        expected = oracles.numeric_gradient(lambda x, args=args: oracles.value_loss(x, *args), data["values"])
        np.testing.assert_allclose(values.grad, expected, atol=1e-5)


def test_value_loss_by_hand_with_the_default_clip():
    # moved 0.5 up from 1.0 towards the return 2.0: the clip at 1.2 is worse, 0.5 * 3 * 0.8^2, and flat
    values = torch.tensor([[1.5, math.nan]], requires_grad=True)
    old_values, returns = torch.tensor([[1.0, math.nan]]), torch.tensor([[2.0, math.nan]])
    loss = losses.value_loss(values, old_values, returns, torch.tensor([[3.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.96)
    assert values.grad.tolist() == [[0.0, 0.0]]


def test_policy_loss_and_value_loss_pass_gradcheck():
    logp, old, advantages, weights, mask = (torch.as_tensor(x) for x in policy_case())
    logp = logp.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: losses.policy_loss(x, old, advantages, weights, mask, 0.2, 0.3)[0], (logp,)
    )
    data = rollout()
    values, old_values = leaf(data["values"]), tensor(data["old_values"])
    assert torch.autograd.gradcheck(
        lambda x: losses.value_loss(x, old_values, advantages, weights, 0.2), (values,)
    )


# ----------------------------------------------------------------------------------------------------
# Doors


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: losses.group_advantages(x[:, 0], 1), ["group_size", "baseline", "got 1", "critic"]),
        (lambda x: losses.group_advantages(x[:, 0], 3), ["multiple of group_size=3", "[4]"]),
        (lambda x: losses.group_advantages(x[:, 0], 2, "critic"), ["baseline", "leave_one_out", "'critic'"]),
        (lambda x: losses.group_advantages(x[:, 0], 2, "group", "row"), ["scale", "batch", "'row'"]),
        (lambda x: losses.loss_weights(x, "mean"), ["weighting", "constant", "'mean'"]),
        (lambda x: losses.loss_weights(x, "constant"), ["max_completion_tokens", "weighting", "None"]),
        (lambda x: losses.policy_loss(x, x, x[:, 0], x, x, 0.2, 0.2), ["advantages [4]", "[:, None]"]),
        (lambda x: losses.policy_loss(x, x, x, x, x, 0.2, 0.2, "row"), ["ratio_level", "sequence", "'row'"]),
        (
            lambda x: losses.policy_loss(x, x, x, x, x, 0.2, 0.2, "token", "tv"),
            ["surrogate", "cispo", "'tv'"],
        ),
        (lambda x: losses.kl_penalty(x, x[:, 0]), ["ref_logprobs [4]"]),
        (lambda x: losses.kl_penalty(x, x, x[:, 0], "k3_corrected"), ["old_logprobs [4]"]),
        (lambda x: losses.kl_penalty(x, x, None, "k4"), ["estimator", "k3_corrected", "'k4'"]),
        (lambda x: losses.kl_penalty(x, x, None, "k3_corrected"), ["old_logprobs", "k3_corrected", "None"]),
        (lambda x: losses.gae(x, x[:, 0], x), ["values [4]"]),
        (lambda x: losses.value_loss(x, x, x[:, 0], x), ["returns [4]"]),
        (lambda x: losses.whiten(x[:, 0], x), ["advantages [4]"]),
    ],
)
def test_wrong_argument_is_named_with_what_was_got_and_what_is_allowed(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below, in any order
        call(torch.ones(4, 4))
    for word in words:
        assert word in str(error.value)
