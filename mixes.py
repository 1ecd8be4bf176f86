"""Knobs of reinforcement learning that cannot work together, and what to give instead."""

from collections.abc import Iterable
from typing import Any

# Sampling that leaves nothing out.
FULL_SAMPLING = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def refuse_mixes(config: Any, of_critic: Iterable[str]) -> None:
    """Refuse knobs that cannot work together.

    Args:
        config: a `train_grpo.GRPOConfig`, its preset filled in.
        of_critic: the knobs that only a critic reads.

    Raises:
        ValueError: names both, and says what to give instead.
    """
    baseline, size = config.baseline, config.group_size
    has_critic = baseline == "critic"
    compares = config.length_alpha or config.difficulty != "none" or config.dynamic_sampling
    named = {name.partition("(")[0] for name in config.rewards}
    mixes = [
        (
            size < 2 and not has_critic,
            f"group_size must be >= 2 with baseline={baseline!r}, got {size}: a completion is compared with "
            "others of its prompt; give --group_size 8",
        ),
        (
            size < 2 and compares,
            f"group_size must be >= 2 with length_alpha, difficulty or dynamic_sampling, got {size}: they "
            "compare the completions of a prompt; give --group_size 8",
        ),
        (
            has_critic and config.scale == "group",
            "scale='group' does not go with baseline='critic', which compares with no group; give --scale "
            "batch or none",
        ),
        (
            has_critic and config.difficulty != "none",
            f"difficulty={config.difficulty!r} does not go with baseline='critic', which compares with no "
            "group; give --difficulty none",
        ),
        (
            config.ratio_level == "sequence" and config.weighting != "sequence",
            f'ratio_level="sequence" needs weighting="sequence", got weighting={config.weighting!r}: '
            "a completion that has one ratio counts as one",
        ),
        (
            config.ref_sync_steps and config.lora_rank,
            "ref_sync_steps does not go with lora_rank: the reference is the model without its adapter, and "
            "stays what it is; give --ref_sync_steps 0",
        ),
        (
            config.surrogate == "cispo" and config.clip_high < 1,
            f"clip_high={config.clip_high} with surrogate='cispo' would cap every ratio below 1: it is an "
            "absolute cap there; give --clip_high 5",
        ),
        (
            config.overlong == "soft" and "soft_overlong" in named,
            "overlong='soft' adds the punishment that the reward soft_overlong is; give --overlong none, or "
            "leave the reward out",
        ),
        (
            (config.length_alpha or config.wrong_reward) and "lead" in named,
            "length_alpha and wrong_reward add up to what the reward lead is; give --length_alpha 0 "
            "--wrong_reward 0, or the reward correct in its place",
        ),
        (
            config.engine == "vllm" and not config.engine_url,
            "engine 'vllm' needs engine_url; start a server by make vllm-server MODEL=..., and give "
            "--engine_url http://127.0.0.1:8000",
        ),
        (
            config.engine == "torch" and config.engine_url,
            f"engine_url {config.engine_url!r} is not asked with engine 'torch'; give --engine vllm",
        ),
    ]
    for knob in of_critic:
        unread = not has_critic and getattr(config, knob) is not None
        mixes.append((unread, f"{knob} needs a critic, not baseline={baseline!r}; give --baseline critic"))
    for knob in ("kl_target", "ref_sync_steps"):
        unread = getattr(config, knob) and not config.kl_coef
        mixes.append((unread, f"{knob} needs a KL, and kl_coef is 0; give --kl_coef 0.04, or leave it out"))
    for knob, full in FULL_SAMPLING.items():
        got = getattr(config, knob)
        message = (
            f"{knob} must be {full} in training, got {got}: an update scores every token at temperature="
        )
        message += f"{config.temperature} and cannot know which were left out; use it in evaluation and chat"
        mixes.append((got != full, message))
    for is_mixed, message in mixes:
        if is_mixed:
            raise ValueError(message)
