"""The maths of every preset: credit, weights, surrogate, KL, value loss and log-probabilities. No I/O.

Shapes are `[B, T]` unless said, with B = prompts x group_size in prompt order and completions right-padded.
`completion_mask` is True where a token counts, the EOS included. Everything is computed in float32 whatever
comes in (float64 stays float64). A policy loss is a plain weighted sum: `loss_weights` fixes the normaliser
of the whole update, so splitting that update into micro-batches changes nothing.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A larger log ratio says nothing more about the policy, and its exp() comes close to overflow.
MAX_LOG_RATIO = 20.0

# Logits that `token_logprobs` holds at once: 256 MB in float32, and still a matrix product that fills a GPU.
MAX_CHUNK_LOGITS = 2**26


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_choice(field: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {got!r}; choose one of these")


def _check_shapes(**tensors: Tensor) -> None:
    """Refuse to broadcast: `[B]` against `[B, T]` is silent nonsense whenever B equals T."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"all of these must have one shape [B, T], got {shapes}; expand [B] with [:, None]")


# ----------------------------------------------------------------------------------------------------
# Credit


def group_advantages(
    rewards: Tensor,
    group_size: int,
    baseline: Literal["group", "leave_one_out"] = "group",
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    batch_moments: Tensor | None = None,
) -> Tensor:
    """Compare every completion with the others of its prompt.

    Args:
        rewards: `[B]`, groups of `group_size` neighbours.
        group_size: completions a prompt, >= 2.
        baseline: "group" subtracts the group's mean; "leave_one_out" the mean of the other completions.
        scale: divide by the sample std (ddof=1) of the rewards of the "group", of the "batch", or by nothing.
        eps: added to the std.
        batch_moments: `moments(rewards)` summed over all ranks, for `scale="batch"`; None: this batch is all.

    Returns:
        `[B]`; a group of equal rewards gives exactly 0.

    Raises:
        ValueError: group_size below 2 or not a divisor of B, or an unknown baseline or scale.

    Source: GRPO 2402.03300 section 4.1.2; Dr.GRPO 2503.20783; RLOO 2402.14740.
    """
    _check_choice("baseline", baseline, ("group", "leave_one_out"))
    _check_choice("scale", scale, ("group", "batch", "none"))
    if group_size < 2:
        raise ValueError(
            f'group_size must be >= 2 with baseline="{baseline}", got {group_size}; use baseline="critic"'
        )
    if rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards must be [B] with B a multiple of group_size={group_size}, got {list(rewards.shape)}; "
            "keep groups whole"
        )
    groups = rewards.to(_compute_dtype(rewards)).reshape(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        advantages = advantages * (group_size / (group_size - 1))
    if scale == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    elif scale == "batch":
        batch_std = mean_and_std(moments(rewards) if batch_moments is None else batch_moments)[1]
        advantages = advantages / (batch_std + eps)
    # By the range and not by the std: the mean of equal floats may be off by a rounding, and so not cancel.
    all_equal = groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True) == 0
    return advantages.masked_fill(all_equal, 0.0).view(-1)


def difficulty_weight(
    advantages: Tensor,
    correct: Tensor,
    group_size: int,
    a: float = 0.4,
    b: float = 1.5,
    x0: float = 0.75,
    k: float = 10.0,
) -> Tensor:
    """Weigh rare successes of hard prompts and rare failures of easy ones up.

    Args:
        advantages: `[B]`, of which only the sign is read.
        correct: `[B]`, bool.
        group_size: completions a prompt.
        a: weight as the prompt gets easy.
        b: weight as the prompt gets hard.
        x0: pass rate in the middle of the slope.
        k: steepness of the slope.

    Returns:
        `[B]` factors for `advantages`: w(pass rate) where positive, w(1 - pass rate) elsewhere.

    Source: GRPO-LEAD 2504.09696 and its official code.
    """
    dtype = _compute_dtype(advantages)
    pass_rate = correct.to(dtype).reshape(-1, group_size).mean(1).repeat_interleave(group_size)
    ease = torch.where(advantages > 0, pass_rate, 1 - pass_rate)
    return a + (b - a) * torch.sigmoid(k * (x0 - ease))


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over right-padded completions, each ending in a terminal state.

    Args:
        rewards: `[B, T]`, per token (the outcome on the last counted one).
        values: `[B, T]`, V of the state before the token is emitted.
        completion_mask: `[B, T]`, True on a prefix of each row.
        gamma: discount a token.
        lam: bias against variance; 1 is the Monte Carlo return.

    Returns:
        `(advantages, returns)`, both `[B, T]`, without gradient, zero where `completion_mask` is False.

    Source: 1506.02438 equations 11-16.
    """
    _check_shapes(rewards=rewards, values=values, completion_mask=completion_mask)
    mask, dtype = completion_mask.bool(), _compute_dtype(rewards, values)
    rewards = torch.where(mask, rewards.to(dtype), 0)
    values = torch.where(mask, values.to(dtype), 0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))  # zero after the last counted token
    deltas = torch.where(mask, rewards + gamma * next_values - values, 0)
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


@torch.no_grad()
def whiten(
    advantages: Tensor, completion_mask: Tensor, batch_moments: Tensor | None = None, eps: float = 1e-4
) -> Tensor:
    """Give the counted tokens of the batch mean 0 and std 1.

    Args:
        advantages: `[B, T]`.
        completion_mask: `[B, T]`.
        batch_moments: `moments(advantages, completion_mask)` summed over all ranks; None: this batch is all.
        eps: added to the std.

    Returns:
        `[B, T]`, zero where `completion_mask` is False.
    """
    _check_shapes(advantages=advantages, completion_mask=completion_mask)
    if batch_moments is None:
        batch_moments = moments(advantages, completion_mask)
    mean, std = mean_and_std(batch_moments)
    advantages = advantages.to(_compute_dtype(advantages))
    return torch.where(completion_mask.bool(), (advantages - mean) / (std + eps), 0)


@torch.no_grad()
def moments(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Count, sum and sum of squares: what ranks add up to get a mean and std of the whole batch.

    Args:
        values: any shape.
        mask: same shape, True counts; None counts all.

    Returns:
        `[3]` float64 on the CPU, so that squares lose nothing and MPS, which has no float64, can use it.
    """
    kept = (values if mask is None else values[mask.bool()]).cpu().double()
    return torch.stack(
        [torch.tensor(float(kept.numel()), dtype=torch.float64), kept.sum(), kept.square().sum()]
    )


def mean_and_std(batch_moments: Tensor) -> tuple[float, float]:
    """Mean and sample std (ddof=1) from `moments`, of one rank or summed over all."""
    count, total, squares = batch_moments.tolist()
    mean = total / max(count, 1)
    return mean, (max(squares - total * mean, 0.0) / max(count - 1, 1)) ** 0.5


# ----------------------------------------------------------------------------------------------------
# Weights and objectives


@torch.no_grad()
def loss_weights(
    completion_mask: Tensor,
    weighting: Literal["sequence", "token", "constant"] = "sequence",
    max_completion_tokens: int | None = None,
    total_sequences: int | Tensor | None = None,
    total_tokens: int | Tensor | None = None,
) -> Tensor:
    """Say how much each token counts, once for the whole update, before it is split.

    Args:
        completion_mask: `[B, T]`; a row without a True gets zeros and is not a sequence.
        weighting: "sequence" 1/(total_sequences x own length), "token" 1/total_tokens,
            "constant" 1/(total_sequences x max_completion_tokens).
        max_completion_tokens: for "constant": the generation limit, not the longest row.
        total_sequences: rows with a True over all ranks and the whole update; None counts this mask's.
        total_tokens: True entries over all ranks and the whole update; None counts this mask's.

    Returns:
        `[B, T]`, zero where `completion_mask` is False; over the update "sequence" and "token" sum to 1.

    Raises:
        ValueError: unknown weighting, or "constant" without max_completion_tokens.

    Source: GRPO 2402.03300 eq. 3; DAPO 2503.14476 eq. 12; Dr.GRPO 2503.20783 section 3.2.
    """
    _check_choice("weighting", weighting, ("sequence", "token", "constant"))
    if weighting == "constant" and not max_completion_tokens:
        raise ValueError(
            f'max_completion_tokens must be a positive integer with weighting="constant", '
            f"got {max_completion_tokens}; pass the generation limit"
        )
    dtype, mask = _compute_dtype(completion_mask), completion_mask.bool()
    lengths = mask.sum(1, keepdim=True).to(dtype)
    if total_sequences is None:
        total_sequences = mask.any(1).sum()
    if total_tokens is None:
        total_tokens = mask.sum()
    if weighting == "sequence":
        divisor = lengths * total_sequences
    elif weighting == "token":
        divisor = torch.ones_like(lengths) * total_tokens
    else:
        divisor = torch.ones_like(lengths) * total_sequences * max_completion_tokens
    return torch.where(mask, 1 / divisor, 0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    completion_mask: Tensor,
    clip_low: float | None,
    clip_high: float,
    ratio_level: Literal["token", "sequence"] = "token",
    surrogate: Literal["clip", "cispo"] = "clip",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the weighted surrogate; only `logprobs` gets a gradient.

    Args:
        logprobs: `[B, T]`, of the policy being trained.
        old_logprobs: `[B, T]`, of the policy that sampled.
        advantages: `[B, T]`.
        weights: `[B, T]`, from `loss_weights`, times importance weights if any: nothing else normalises.
        completion_mask: `[B, T]`; elsewhere nothing is read, be it NaN.
        clip_low: "clip": ratios below 1 - clip_low stop pushing down. "cispo" ignores it.
        clip_high: "clip": ratios above 1 + clip_high stop pushing up. "cispo": the absolute cap on the ratio.
        ratio_level: a ratio for each "token", or the geometric mean of a completion for all its tokens.
        surrogate: "clip" is min(ratio x A, clip(ratio) x A); "cispo" is sg(min(ratio, cap)) x A x logprob.

    Returns:
        `(loss, stats)`, scalars. `stats` is detached: `tokens` (the count), `approx_kl` (k3 of old to new),
        `clip_fraction` (where the clip or cap changed the gradient) and `ratio_mean` are means over `tokens`;
        micro-batches combine as sum(tokens x mean) / sum(tokens), and `ratio_max` by the maximum.

    Raises:
        ValueError: shapes differ, or an unknown ratio_level or surrogate.

    Source: PPO 1707.06347 eq. 7; GSPO 2507.18071 (GSPO-token); CISPO 2506.13585.
    """
    _check_choice("ratio_level", ratio_level, ("token", "sequence"))
    _check_choice("surrogate", surrogate, ("clip", "cispo"))
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs.detach(),
        "advantages": advantages.detach(),
        "weights": weights.detach(),
    }
    _check_shapes(**tensors, completion_mask=completion_mask)
    mask, dtype = completion_mask.bool(), _compute_dtype(*tensors.values())
    # Before the maths: a NaN multiplied by 0 afterwards would still be NaN, in the value and in the gradient.
    logprobs, old_logprobs, advantages, weights = (
        torch.where(mask, tensor.to(dtype), 0) for tensor in tensors.values()
    )
    token_log_ratio = log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if ratio_level == "sequence":
        mean = log_ratio.detach().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        # The value of the sequence with the gradient of each token.
        log_ratio = mean + logprobs - logprobs.detach()
    ratio = log_ratio.exp()
    if surrogate == "cispo":
        objective = ratio.detach().clamp(max=clip_high) * advantages * logprobs
        clipped = (ratio > clip_high) & (advantages != 0)
    else:
        low, high = 1 - clip_low, 1 + clip_high
        objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    return -(weights * objective).sum(), _policy_stats(token_log_ratio, ratio, clipped, mask)


@torch.no_grad()
def _policy_stats(token_log_ratio: Tensor, ratio: Tensor, clipped: Tensor, mask: Tensor) -> dict[str, Tensor]:
    tokens = mask.sum().to(ratio.dtype)
    ratio = torch.where(mask, ratio, 0)  # the others are 0 there already

    def mean(values: Tensor) -> Tensor:
        return values.sum() / tokens.clamp(min=1)

    return {
        "tokens": tokens,
        "approx_kl": mean(token_log_ratio.expm1() - token_log_ratio),
        "clip_fraction": mean(clipped.to(ratio.dtype)),
        "ratio_mean": mean(ratio),
        "ratio_max": ratio.max(),
    }


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    old_logprobs: Tensor | None = None,
    estimator: Literal["k1", "k2", "k3", "k3_corrected"] = "k1",
) -> Tensor:
    """Estimate KL(policy || reference) at every token from the sampled one alone.

    A good value is not yet a good gradient. Averaged over samples of the policy, the gradient of k1 is 0 and
    that of k3 is not the KL's, while those of k2 and k3_corrected are.

    Args:
        logprobs: `[B, T]`, of the policy; the only one with a gradient.
        ref_logprobs: `[B, T]`, of the reference.
        old_logprobs: `[B, T]`, of the policy that sampled; needed by "k3_corrected" only.
        estimator: with x = log(reference / policy), clamped to +-20: "k1" -x, "k2" x^2 / 2,
            "k3" exp(x) - 1 - x, "k3_corrected" k3 times policy / old, with the gradient of both factors.

    Returns:
        `[B, T]`. There is no mask here: NaN in padding comes out as NaN, which a weight of 0 does not cancel.

    Raises:
        ValueError: shapes differ, unknown estimator, or "k3_corrected" without old_logprobs.

    Source: Schulman, "Approximating KL divergence" (2020); the correction as in DeepSeek-V3.2.
    """
    _check_choice("estimator", estimator, ("k1", "k2", "k3", "k3_corrected"))
    _check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    dtype = _compute_dtype(logprobs, ref_logprobs)
    logprobs = logprobs.to(dtype)
    log_ratio = (ref_logprobs.detach().to(dtype) - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    k3 = log_ratio.expm1() - log_ratio
    if estimator == "k3":
        return k3
    if old_logprobs is None:
        raise ValueError(
            'old_logprobs must be given with estimator="k3_corrected", got None; pass it or use "k3"'
        )
    _check_shapes(logprobs=logprobs, old_logprobs=old_logprobs)
    drift = (logprobs - old_logprobs.detach().to(dtype)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return drift.exp() * k3


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float = 0.2
) -> Tensor:
    """Half the weighted squared error of the critic, the worse of the free and the clipped prediction.

    Args:
        values: `[B, T]`, of the critic being trained; the only one with a gradient.
        old_values: `[B, T]`, as they were at the rollout.
        returns: `[B, T]`, from `gae`.
        weights: `[B, T]`, from `loss_weights`; where 0 nothing is read.
        clip: how far a prediction may move from `old_values` and still be rewarded for it.

    Returns:
        A scalar, the plain weighted sum.

    Source: PPO 1707.06347; the clipped value as in the PPO of 2005.12729 section 2.
    """
    tensors = {"values": values, "old_values": old_values, "returns": returns, "weights": weights}
    _check_shapes(**tensors)
    dtype, counts = _compute_dtype(*tensors.values()), weights != 0
    values = torch.where(counts, values.to(dtype), 0)
    old_values, returns, weights = (
        torch.where(counts, tensor.detach().to(dtype), 0) for tensor in (old_values, returns, weights)
    )
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * (weights * torch.maximum((values - returns).square(), (near - returns).square())).sum()


# ----------------------------------------------------------------------------------------------------
# Log-probabilities without the logits of a whole batch


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    kernels: Any = None,
) -> tuple[Tensor, Tensor]:
    """Score `targets` under softmax(hidden @ head_weight.T / temperature), a chunk of tokens at a time.

    The backward pass computes the logits again, so that memory is a chunk's and not `[B, T, V]`. Matrix
    products run in the inputs' dtype (autocast's where it is on), softmax and the head's gradient in float32.

    Args:
        hidden: `[B, T, H]`, the state *before* each target: `hidden[:, t]` predicts `targets[:, t]`.
        head_weight: `[V, H]`; costs nothing in the backward pass when frozen.
        targets: `[B, T]`, int64 in [0, V), valid ids at padding too.
        temperature: the sampling temperature, > 0.
        chunk_tokens: tokens whose logits exist at once; None: as many as make 2^26 logits.
        kernels: `fused_kernels.kernels_for` hidden, which compute all but the products where these are in
            float32; None for torch.

    Returns:
        `(logprobs, entropy)`, both `[B, T]` float32 (float64 for float64), in nats, both differentiable.

    Raises:
        ValueError: temperature or chunk_tokens not positive, or shapes that do not match.
        IndexError: a target outside the vocabulary.
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature must be > 0, got {temperature}; use the one that completions are sampled at"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}; leave it out to have it chosen")
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != head_weight.shape[-1]:
        raise ValueError(
            f"hidden must be [B, T, H] for targets [B, T] and head_weight [V, H], got {list(hidden.shape)}, "
            f"{list(targets.shape)} and {list(head_weight.shape)}; shift by one before the call"
        )
    if chunk_tokens is None:
        chunk_tokens = max(1, MAX_CHUNK_LOGITS // head_weight.shape[0])
    dtype = torch.promote_types(hidden.dtype, head_weight.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    # Autocast would take the entropy's sum to half precision as well; the one cast that we want is `dtype`.
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropy = _TokenLogprobs.apply(
            hidden.reshape(-1, hidden.shape[-1]),
            head_weight,
            targets.reshape(-1),
            temperature,
            chunk_tokens,
            dtype,
            kernels if dtype == torch.float32 else None,
        )
    return logprobs.view(targets.shape), entropy.view(targets.shape)


class _TokenLogprobs(torch.autograd.Function):
    """Keeps two numbers a token between the passes; everything `[B, T, V]` is computed twice."""

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, temperature, chunk_tokens, dtype, kernels):
        weight = head_weight.to(dtype)
        logprobs = hidden.new_empty(len(hidden), dtype=torch.promote_types(torch.float32, dtype))
        entropy, log_sums = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            states = hidden[rows].to(dtype)
            if kernels:
                told = kernels.score(_logits(states, weight), targets[rows], temperature)
                logprobs[rows], entropy[rows], log_sums[rows] = told
            else:
                all_logprobs = _log_softmax(states, weight, temperature)
                logprobs[rows] = all_logprobs.gather(1, targets[rows, None])[:, 0]
                entropy[rows] = -torch.linalg.vecdot(all_logprobs.exp(), all_logprobs)
        ctx.save_for_backward(hidden, head_weight, targets, entropy, log_sums)
        ctx.temperature, ctx.chunk_tokens, ctx.dtype, ctx.kernels = temperature, chunk_tokens, dtype, kernels
        # The gradient of an unused output then arrives as None instead of zeros, and its terms are left out.
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, head_weight, targets, entropy, log_sums = ctx.saved_tensors
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 7
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        weight = head_weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head_weight, dtype=entropy.dtype) if needs_head else None
        # d logprob / d logit_v = [v = target] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy)
        pull = grad_logprobs * (1 / ctx.temperature)
        spread = None if grad_entropy is None else grad_entropy * (1 / ctx.temperature)
        for start in range(0, len(hidden), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            states = hidden[rows].to(ctx.dtype)
            if ctx.kernels:
                given = (targets[rows], ctx.temperature, entropy[rows], log_sums[rows], pull[rows])
                of_entropy = None if spread is None else spread[rows]
                grad_logits = ctx.kernels.score_backward(_logits(states, weight), *given, of_entropy)
            else:
                grad_logits = _log_softmax(states, weight, ctx.temperature)
                if spread is None:
                    grad_logits.exp_().mul_(-pull[rows, None])
                else:
                    probabilities = grad_logits.exp()
                    grad_logits.add_(entropy[rows, None]).mul_(-spread[rows, None]).sub_(pull[rows, None])
                    grad_logits.mul_(probabilities)
                    del probabilities
                grad_logits.scatter_add_(1, targets[rows, None], pull[rows, None])
                grad_logits = grad_logits.to(ctx.dtype)
            if needs_hidden:
                grad_hidden[rows] = (grad_logits @ weight).to(hidden.dtype)
            if needs_head:
                grad_head += grad_logits.T @ states
            del grad_logits  # before there are the next chunk's
        return grad_hidden, grad_head, None, None, None, None, None


def _log_softmax(states: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = _logits(states, weight)
    if temperature != 1:
        logits = logits.to(torch.promote_types(torch.float32, logits.dtype)).div_(temperature)
    return logits.log_softmax(1, dtype=torch.promote_types(torch.float32, logits.dtype))


def _logits(states: Tensor, weight: Tensor) -> Tensor:
    return states @ weight.T
