"""One update of the policy: what it is compared with, its
minibatches, the loss, the gradient, and what to tell of it.

`config` is a `train_grpo.GRPOConfig`; the knobs of the loss are read nowhere else.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from batches import MicroBatches, averaged_gradients
from losses import kl_penalty, loss_weights, policy_loss, value_loss
from optimizers import take_step
from rollouts import RolloutBatch


@torch.no_grad()
def score_rollout(
    policy: Any, batch: RolloutBatch, micro_batches: MicroBatches, config: Any
) -> dict[str, Tensor]:
    """`old_logprobs` of the rollout's completions under a policy, and its critic's `values`, `[B, T]`."""
    accelerator = micro_batches.accelerator
    told: dict[str, Tensor] = {}

    def tell(chosen: list[int], scale: float) -> None:
        inputs = model_inputs(batch.select(chosen, accelerator.device))
        with accelerator.autocast():  # a reference is not prepared, and must compute as the policy does
            logprobs, _, values = policy(**inputs, temperature=config.temperature)
        for name, figures in (("old_logprobs", logprobs), ("values", values)):
            if figures is not None and scale:  # not a filler's
                whole = told.setdefault(name, torch.zeros(batch.tensors["completion_mask"].shape))
                whole[chosen, : figures.shape[1]] = figures.cpu()

    policy.eval()
    micro_batches.run(batch.lengths, range(len(batch.lengths)), tell)
    return told


def model_inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `Policy.forward` takes of a batch."""
    return {name: tensors[name] for name in ("input_ids", "attention_mask", "completion_mask")}


def minibatches(batch: RolloutBatch, config: Any) -> Iterator[list[int]]:
    """Rows of each update: the rollout dealt out by groups, and gone through `epochs_per_rollout` times.

    Dealt like cards, so that every process' share of a minibatch is what one process would have put there.
    """
    size, parts = config.group_size, config.updates_per_rollout
    for _ in range(config.epochs_per_rollout):
        for part in range(parts):
            groups = range(part, len(batch.groups), parts)
            yield [row for group in groups for row in range(group * size, (group + 1) * size)]


def update(
    policy: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    micro_batches: MicroBatches,
    batch: RolloutBatch,
    rows: list[int],
    config: Any,
    kl_coef: float,
    critic_only: bool = False,
) -> dict[str, Any]:
    """One optimizer step on a minibatch; the gradient depends neither on the micro-batches nor on the
    processes. With `critic_only` the policy stays as it is.

    Returns:
        Sums over the tokens, and `cause`: why there was no step, None where there was.
    """
    accelerator = micro_batches.accelerator
    mask = batch.tensors["completion_mask"][rows]
    totals = accelerator.reduce(
        torch.tensor([int(mask.any(1).sum()), int(mask.sum())], device=accelerator.device)
    ).tolist()
    # Fixed for the whole update before anything is split or left out.
    weights = torch.zeros(batch.tensors["completion_mask"].shape)
    weights[rows] = loss_weights(mask, config.weighting, config.max_completion_tokens, *totals)
    # Where nothing else is in the loss, rows of zero advantage have zero gradient: they cost nothing.
    needs_all = kl_coef or config.entropy_coef or config.baseline == "critic"
    learning = [row for row in rows if needs_all or batch.advantages[row].any()]
    sums: dict[str, float] = {}

    def restart() -> None:
        optimizer.zero_grad()
        sums.clear()
        sums.update(dict.fromkeys(("tokens", "loss", "logprobs", "value_loss", "ratio_max"), 0.0))

    def learn(chosen: list[int], scale: float) -> None:
        tensors = batch.select(chosen, accelerator.device)
        length = tensors["completion_mask"].shape[1]
        for name, values in (("advantages", batch.advantages), ("weights", weights * scale)):
            tensors[name] = values[chosen, :length].to(accelerator.device)
        loss, stats = micro_loss(policy, tensors, config, kl_coef)
        accelerator.backward(loss * accelerator.num_processes)
        sums["loss"] += float(loss.detach())
        sums["ratio_max"] = max(sums["ratio_max"], stats.pop("ratio_max"))
        sums["logprobs"] += stats.pop("logprobs")
        sums["value_loss"] += stats.pop("value_loss", 0.0)
        tokens = stats.pop("tokens") * scale
        sums["tokens"] += tokens
        for name, mean in stats.items():
            sums[name] = sums.get(name, 0.0) + mean * tokens

    policy.train()
    restart()
    with averaged_gradients(accelerator, policy):
        micro_batches.run(batch.lengths, learning, learn, restart)
    if critic_only:
        for parameter in accelerator.unwrap_model(policy).model.parameters():
            parameter.grad = None
    movers = (accelerator, policy, optimizer, scheduler)
    grad_norm, cause = take_step(*movers, sums["loss"], config.max_grad_norm, sums.pop("logprobs"))
    return {**sums, "grad_norm": grad_norm, "cause": cause}


def micro_loss(
    policy: Any, tensors: dict[str, Tensor], config: Any, kl_coef: float
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a micro-batch, and what it tells: the number of tokens, means over them, the largest ratio,
    and the sum of the log-probabilities.
    """
    mask = tensors["completion_mask"]
    logprobs, entropy, values = policy(**model_inputs(tensors), temperature=config.temperature)
    # Where the sampler's arithmetic is not the trainer's, the trainer's own log-probabilities are the old
    # ones, and what was sampled too rarely or too often counts more or less for it.
    old_logprobs = tensors.get("old_logprobs", logprobs.detach())
    importance = (old_logprobs - tensors["sampling_logprobs"]).exp().clamp(max=config.importance_cap)
    weights = tensors["weights"] * importance
    loss, stats = policy_loss(
        logprobs,
        old_logprobs,
        tensors["advantages"],
        weights,
        mask,
        config.clip_low,
        config.clip_high,
        config.ratio_level,
        config.surrogate,
    )
    gap = logprobs.detach() - tensors["sampling_logprobs"]
    tells = {"entropy": entropy.detach(), "sampler_mismatch": gap.expm1() - gap}
    if kl_coef:
        kl = kl_penalty(logprobs, tensors["ref_logprobs"], old_logprobs, config.kl_estimator)
        tells["kl"] = kl.detach()
        if config.kl_placement == "loss":
            loss = loss + kl_coef * (weights * torch.where(mask, kl, 0)).sum()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (weights * torch.where(mask, entropy, 0)).sum()
    if values is not None:
        of_critic = value_loss(
            values, tensors["values"], tensors["returns"], tensors["weights"], config.value_clip
        )
        loss = loss + config.value_coef * of_critic
        stats["value_loss"] = of_critic.detach()
        moved = (values.detach() - tensors["values"]).abs() > config.value_clip
        tells["value_clip_fraction"] = moved.to(values.dtype)
    # Finite where all of them are; in the loss clipping may hide the one that is not.
    stats["logprobs"] = torch.where(mask, logprobs.detach() + old_logprobs, 0).sum()
    for name, figures in tells.items():
        stats[name] = torch.where(mask, figures, 0).sum() / stats["tokens"].clamp(min=1)
    return loss, {name: float(value) for name, value in stats.items()}


# ------------------------------------------------------------------------------------------------------------
# Telling


# Where the means over tokens that an update tells stand among the metrics.
TOKEN_MEANS = {
    "entropy": "policy/entropy",
    "approx_kl": "policy/approx_kl",
    "clip_fraction": "policy/clip_fraction",
    "kl": "policy/kl",
    "sampler_mismatch": "rollout/sampler_mismatch_kl",
    "value_clip_fraction": "critic/clip_fraction",
}


def update_metrics(updates: list[list[dict[str, Any]]]) -> dict[str, float]:
    """The updates' metrics from every process' list; means are over the tokens that were learned from."""
    every = [update for of_process in updates for update in of_process if update["cause"] is None]
    bad = sum(update["cause"] is not None for update in updates[0])
    if not every:
        return {"train/bad_updates": bad}
    good = len(updates[0]) - bad
    metrics = {
        "train/bad_updates": bad,
        "policy/loss": sum(update["loss"] for update in every) / good,
        "policy/grad_norm": max(update["grad_norm"] for update in every),
        "policy/ratio_max": max(update["ratio_max"] for update in every),
    }
    tokens = sum(update["tokens"] for update in every)
    for name, key in TOKEN_MEANS.items():
        if name in every[0]:
            metrics[key] = sum(update[name] for update in every) / tokens if tokens else 0.0
    if "value_clip_fraction" in every[0]:
        metrics["critic/value_loss"] = sum(update["value_loss"] for update in every) / good
    return metrics
