"""The papers' formulas in NumPy float64 and plain loops, sharing nothing with losses.py; and a batch."""

import math

import numpy as np

PROMPTS, GROUP_SIZE, TOKENS, LIMIT = 3, 4, 7, 7
ROWS = PROMPTS * GROUP_SIZE


def group_advantages(rewards, group_size, baseline="group", scale="group", eps=1e-4):
    out = []
    for start in range(0, len(rewards), group_size):
        group = [float(r) for r in rewards[start : start + group_size]]
        for i, reward in enumerate(group):
            others = group if baseline == "group" else group[:i] + group[i + 1 :]
            advantage = reward - sum(others) / len(others)
            if scale == "group":
                advantage /= sample_std(group) + eps
            if scale == "batch":
                advantage /= sample_std([float(r) for r in rewards]) + eps
            out.append(0.0 if all(r == group[0] for r in group) else advantage)
    return np.array(out)


def sample_std(numbers):
    mean = sum(numbers) / len(numbers)
    return math.sqrt(sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))


def difficulty_weight(advantages, correct, group_size, a=0.4, b=1.5, x0=0.75, k=10.0):
    out = []
    for i, advantage in enumerate(advantages):
        start = i - i % group_size
        rate = sum(bool(c) for c in correct[start : start + group_size]) / group_size
        x = rate if advantage > 0 else 1 - rate
        out.append(a + (b - a) / (1 + math.exp(k * (x - x0))))
    return np.array(out)


def loss_weights(mask, weighting, limit=None):
    lengths = [sum(bool(m) for m in row) for row in mask]
    sequences = sum(n > 0 for n in lengths)
    out = np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        out[i, t] = {
            "sequence": lambda i=i: 1 / sequences / lengths[i],
            "token": lambda: 1 / sum(lengths),
            "constant": lambda: 1 / sequences / limit,
        }[weighting]()
    return out


def policy_loss(logp, old, adv, weights, mask, low, high, ratio_level="token", surrogate="clip", frozen=None):
    """The loss; `frozen` holds the log-probabilities that a stop-gradient sees (for central differences)."""
    frozen = logp if frozen is None else frozen
    loss = 0.0
    for i in range(len(logp)):
        tokens = [t for t in range(logp.shape[1]) if mask[i, t]]
        for t in tokens:
            source = frozen if surrogate == "cispo" else logp
            log_ratio = source[i, t] - old[i, t]
            if ratio_level == "sequence":  # GSPO-token: the completion's ratio, with the token's gradient
                log_ratio = sum(frozen[i, u] - old[i, u] for u in tokens) / len(tokens)
                log_ratio += source[i, t] - frozen[i, t]
            ratio = math.exp(log_ratio)
            if surrogate == "cispo":
                gain = min(ratio, high) * adv[i, t] * logp[i, t]
            else:
                gain = min(ratio * adv[i, t], min(max(ratio, 1 - low), 1 + high) * adv[i, t])
            loss -= weights[i, t] * gain
    return loss


def policy_stats(logp, old, adv, mask, low, high, ratio_level="token", surrogate="clip"):
    kl, clipped, ratios = [], [], []
    for i in range(len(logp)):
        tokens = [t for t in range(logp.shape[1]) if mask[i, t]]
        for t in tokens:
            span = tokens if ratio_level == "sequence" else [t]
            ratio = math.exp(sum(logp[i, u] - old[i, u] for u in span) / len(span))
            x = logp[i, t] - old[i, t]
            kl.append(math.exp(x) - 1 - x)
            if surrogate == "cispo":
                clipped.append(ratio > high and adv[i, t] != 0)
            else:
                clipped.append(ratio > 1 + high and adv[i, t] > 0 or ratio < 1 - low and adv[i, t] < 0)
            ratios.append(ratio)
    n = len(ratios)
    return {
        "tokens": n,
        "approx_kl": sum(kl) / n,
        "clip_fraction": sum(clipped) / n,
        "ratio_mean": sum(ratios) / n,
        "ratio_max": max(ratios),
    }


def kl_penalty(logp, ref, old=None, estimator="k1"):
    out = np.zeros(logp.shape)
    for index in np.ndindex(logp.shape):
        x = min(max(ref[index] - logp[index], -20.0), 20.0)
        k3 = math.exp(x) - 1 - x
        out[index] = {"k1": -x, "k2": x * x / 2, "k3": k3}.get(estimator, k3)
        if estimator == "k3_corrected":
            out[index] *= math.exp(min(max(logp[index] - old[index], -20.0), 20.0))
    return out


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for i in range(len(rewards)):
        n = int(sum(bool(m) for m in mask[i]))
        delta = [
            rewards[i, t] + gamma * (values[i, t + 1] if t + 1 < n else 0.0) - values[i, t] for t in range(n)
        ]
        for t in range(n):
            advantages[i, t] = sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n))
            returns[i, t] = advantages[i, t] + values[i, t]
    return advantages, returns


def whiten(advantages, mask, eps=1e-4):
    kept = [float(advantages[i, t]) for i, t in zip(*np.nonzero(mask), strict=True)]
    mean, std = sum(kept) / len(kept), sample_std(kept)
    out = np.zeros(advantages.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        out[i, t] = (advantages[i, t] - mean) / (std + eps)
    return out


def value_loss(values, old_values, returns, weights, clip=0.2):
    loss = 0.0
    for index in np.ndindex(values.shape):
        near = min(max(values[index], old_values[index] - clip), old_values[index] + clip)
        worst = max((values[index] - returns[index]) ** 2, (near - returns[index]) ** 2)
        loss += 0.5 * weights[index] * worst
    return loss


def token_logprobs(hidden, head, targets, temperature=1.0):
    logprobs, entropy = np.zeros(targets.shape), np.zeros(targets.shape)
    for i, t in np.ndindex(targets.shape):
        logits = [float(np.dot(row, hidden[i, t])) / temperature for row in head]
        normaliser = math.log(sum(math.exp(x - max(logits)) for x in logits)) + max(logits)
        logprobs[i, t] = logits[targets[i, t]] - normaliser
        entropy[i, t] = -sum(math.exp(x - normaliser) * (x - normaliser) for x in logits)
    return logprobs, entropy


def numeric_gradient(function, point, step=1e-6):
    """Central differences, one entry at a time."""
    gradient = np.zeros(point.shape)
    for index in np.ndindex(point.shape):
        up, down = point.copy(), point.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def shaped_rewards(knobs, data):
    """The rewards with what the algorithm adds to them."""
    n, size, limit = mask_lengths(data["completion_mask"]), data["group_size"], data["limit"]
    out = [float(reward) for reward in data["rewards"]]
    for i in range(len(out)):
        right = bool(data["correct"][i])
        if knobs["overlong"] == "soft":
            free = limit - max(1, limit // 5)
            out[i] += max(-1.0, min(0.0, (free - n[i]) / (limit - free)))
        if not right:
            out[i] += knobs["wrong_reward"]
        start = i - i % size
        lengths = sorted(n[start : start + size])
        if right and knobs["length_alpha"] and sum(lengths[:3]) / 3 >= knobs["length_min_tokens"]:
            others = [n[j] for j in range(start, start + size) if data["correct"][j]]
            spread = sample_std(others) if len(others) > 1 else 1.0
            z = (n[i] - sum(others) / len(others)) / (spread + 1e-6)
            out[i] += math.exp(-knobs["length_alpha"] * z) - 1
    return out


def objective(knobs, data, logp, entropy, values, frozen):
    """The whole loss under a configuration, from rewards to a number; `frozen` as in `policy_loss`."""
    mask, n = data["completion_mask"], mask_lengths(data["completion_mask"])
    old, ref, old_values = data["old_logprobs"], data["ref_logprobs"], data["old_values"]
    counted = mask.copy()
    if knobs["overlong"] == "mask":
        counted[[i for i in range(len(n)) if n[i] == data["limit"]]] = False
    rewards = shaped_rewards(knobs, data)
    cost = np.zeros(mask.shape)
    if knobs["kl_placement"] == "reward":
        cost = knobs["kl_coef"] * kl_penalty(old, ref, old, knobs["kl_estimator"])
    if knobs["baseline"] == "critic":
        token_rewards = np.zeros(mask.shape)
        for i, t in zip(*np.nonzero(mask), strict=True):
            token_rewards[i, t] = (rewards[i] if t == n[i] - 1 else 0.0) - cost[i, t]
        advantages, returns = gae(token_rewards, old_values, mask, knobs["gamma"], knobs["lam"])
        if knobs["scale"] == "batch":
            advantages = whiten(advantages, mask)
    else:
        rewards = [r - sum(cost[i, t] for t in range(n[i])) for i, r in enumerate(rewards)]
        per_row = group_advantages(rewards, data["group_size"], knobs["baseline"], knobs["scale"])
        if knobs["difficulty"] == "logistic":
            per_row = per_row * difficulty_weight(per_row, data["correct"], data["group_size"])
        advantages = np.repeat(per_row[:, None], mask.shape[1], 1)
    unscaled = loss_weights(counted, knobs["weighting"], data["limit"])
    cap = knobs["importance_cap"]
    importance = np.minimum(np.exp(old - data["sampling_logprobs"]), cap)
    weights = np.where(counted, unscaled * importance, 0)
    clip = knobs["clip_low"], knobs["clip_high"]
    levels = knobs["ratio_level"], knobs["surrogate"]
    loss = policy_loss(logp, old, advantages, weights, counted, *clip, *levels, frozen)
    if knobs["kl_placement"] == "loss":
        loss += knobs["kl_coef"] * float((weights * kl_penalty(logp, ref, old, knobs["kl_estimator"])).sum())
    loss -= knobs["entropy_coef"] * float((weights * entropy).sum())
    if knobs["baseline"] == "critic":
        clip = knobs["value_clip"]
        loss += knobs["value_coef"] * value_loss(values, old_values, returns, unscaled, clip)
    return loss


def mask_lengths(mask):
    return [sum(bool(m) for m in row) for row in mask]


def rollout(seed=0, drift=0.3):
    """A batch with ragged completions, one all-equal group, and rows that moved far and hardly at all."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, TOKENS)
    lengths = rng.integers(1, TOKENS + 1, ROWS)
    lengths[:2] = TOKENS, 1
    old = -rng.gamma(2.0, 0.6, shape)
    rewards = rng.normal(size=ROWS).round(2)
    rewards[4:8] = 0.1
    row_drift = drift * np.array([1.0, 8.0, 1e-3])[np.arange(ROWS) % 3][:, None]
    old_values = rng.normal(size=shape)
    return {
        "completion_mask": np.arange(TOKENS) < lengths[:, None],
        "logprobs": old + row_drift * rng.normal(size=shape),
        "old_logprobs": old,
        "sampling_logprobs": old.copy(),
        "ref_logprobs": old + 0.5 * rng.normal(size=shape),
        "entropy": rng.gamma(2.0, 0.6, shape),
        "rewards": rewards,
        "correct": rng.random(ROWS) < 0.5,
        "values": old_values + 0.3 * rng.normal(size=shape),
        "old_values": old_values,
        "group_size": GROUP_SIZE,
        "limit": LIMIT,
    }
