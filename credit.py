"""Credit: who did better than expected, and by how much. From a
rollout's rewards to the advantages that its update pushes along.

`config` is a `train_grpo.GRPOConfig`; every knob named here is read nowhere else.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from losses import difficulty_weight, gae, group_advantages, kl_penalty, mean_and_std, moments, whiten
from rewards.shaping import length_factors, soft_overlong
from rollouts import RolloutBatch


def shaped_rewards(batch: RolloutBatch, config: Any) -> Tensor:
    """What each completion earned `[B]`: the rewards' total, and what the algorithm adds to it."""
    totals = torch.tensor([total for group in batch.groups for total in group.scores.total])
    correct = [verdict for group in batch.groups for verdict in group.scores.correct]
    undecided = [flag for group in batch.groups for flag in group.scores.undecided]
    token_ids = [completion.token_ids for group in batch.groups for completion in group.completions]
    if config.overlong == "soft":
        totals += torch.tensor(soft_overlong([], token_ids, config.max_completion_tokens))
    if config.wrong_reward:
        wrong = [verdict is False or flag for verdict, flag in zip(correct, undecided, strict=True)]
        totals += config.wrong_reward * torch.tensor(wrong)
    if config.length_alpha:
        factors = length_factors(
            token_ids, correct, config.group_size, config.length_alpha, config.length_min_tokens
        )
        totals += torch.tensor([0.0 if factor is None else factor - 1 for factor in factors])
    return totals


def credit(batch: RolloutBatch, config: Any, accelerator: Accelerator, kl_coef: float) -> None:
    """Turn rewards into the batch's advantages `[B, T]`, and with a critic into what it has to learn.

    Args:
        batch: with `old_logprobs`, `ref_logprobs` and `values` where the knobs below read them.
        config: of the run.
        accelerator: statistics of the batch are those of all processes.
        kl_coef: as it is at this step.
    """
    rewards = shaped_rewards(batch, config)
    tensors, mask = batch.tensors, batch.tensors["completion_mask"]
    cost = torch.zeros(mask.shape)
    if config.kl_placement == "reward" and kl_coef:
        old = tensors["old_logprobs"]
        kl = kl_penalty(old, tensors["ref_logprobs"], old, config.kl_estimator)
        cost = torch.where(mask, kl_coef * kl, 0)
    if config.baseline == "critic":
        # A truncated completion ends like any other: with what it earned.
        is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        advantages, tensors["returns"] = gae(
            is_last * rewards[:, None] - cost, tensors["values"], mask, config.gamma, config.lam
        )
        if config.scale == "batch":
            advantages = whiten(advantages, mask, sum(gather_object([moments(advantages, mask)])))
    else:
        rewards = rewards - cost.sum(1)
        everyone = sum(gather_object([moments(rewards)]))
        of_rows = group_advantages(
            rewards, config.group_size, config.baseline, config.scale, batch_moments=everyone
        )
        if config.difficulty == "logistic":
            correct = torch.tensor([bool(verdict) for g in batch.groups for verdict in g.scores.correct])
            judged = torch.tensor([g.is_judged for g in batch.groups for _ in g.texts])
            weight = difficulty_weight(of_rows, correct, config.group_size)
            of_rows = of_rows * torch.where(judged, weight, 1)  # nobody knows how hard the others are
        advantages = of_rows[:, None] * mask
    batch.advantages = advantages


def explained_variance(batch: RolloutBatch) -> float:
    """How much of the returns' variance the critic foresaw:
    1 all, 0 nothing; less is worse than their mean.
    """
    returns, values, mask = (batch.tensors[name] for name in ("returns", "values", "completion_mask"))
    missed = moments(returns - values, mask)
    _, spread = mean_and_std(sum(gather_object([moments(returns, mask)])))
    _, error = mean_and_std(sum(gather_object([missed])))
    return 1 - (error / spread) ** 2 if spread else 0.0
