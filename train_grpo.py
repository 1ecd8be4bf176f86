"""Reinforcement learning with verifiable rewards: GRPO and its relatives, one loop to be read from top to
bottom.

A step rolls out a group of completions for each prompt, scores them, compares each with its group, and moves
the policy. Departures from DeepSeekMath's GRPO (arXiv 2402.03300): groups without a difference are left out
of the update (their gradient is zero), and the KL's estimator is corrected so that its gradient is the KL's.

    python train_grpo.py                                      # the built-in tiny model on the built-in sums,
    on a laptop
    accelerate launch train_grpo.py --config configs/gsm8k_qwen2.5_0.5b.yaml      # one GPU
    accelerate launch --num_processes 4 train_grpo.py ...     # several
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

import rewards
from batches import micro_batches
from data import Problem, load_problems, take
from exam import hold_shared_exam
from inference import SamplingParams
from inference.engine import TorchEngine
from losses import group_advantages, kl_penalty, loss_weights, moments, policy_loss
from models import Policy, load_model, load_tokenizer, make_accelerator
from optimizers import make_optimizer, make_scheduler
from prompts import completion_prefix, encode_prompt, render_prompt
from rewards.shaping import soft_overlong
from rollouts import Group, RolloutBatch, collate, count, rollout_metrics, rollout_rows, slice_scores
from runs.config import RunStopped, at_the_door, parse_config, require, run_script
from runs.folder import Run, open_run
from runs.signals import stop_on_signal
from runs.training import TrainingConfig
from train_sft import SFTConfig
from train_sft import main as cold_start

COLD_START = SFTConfig()

# ------------------------------------------------------------------------------------------------------------
# Configuration

# An algorithm is a row, read from top to bottom: it fills the knobs that the user left unset. No other line
# knows the names.
_GRPO: dict[str, Any] = {
    "baseline": "group",
    "scale": "group",
    "ratio_level": "token",
    "surrogate": "clip",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "weighting": "sequence",
    "kl_coef": 0.0,
    "kl_estimator": "k3_corrected",
    "dynamic_sampling": False,
    "overlong": "none",
    "updates_per_rollout": 1,
    "epochs_per_rollout": 1,
}
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": _GRPO | {"kl_coef": 0.04},
    "dr_grpo": _GRPO | {"scale": "none", "weighting": "constant"},
    "dapo": _GRPO
    | {"clip_high": 0.28, "weighting": "token", "updates_per_rollout": 4}
    | {"dynamic_sampling": True, "overlong": "soft"},
    "gspo": _GRPO
    | {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "updates_per_rollout": 4},
    "rloo": _GRPO | {"baseline": "leave_one_out", "scale": "none", "weighting": "constant"},
    "cispo": _GRPO | {"surrogate": "cispo", "clip_high": 5.0, "weighting": "token"},
}


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(TrainingConfig):
    """Every field is a flag of the same name; a knob that is None takes the value of the preset `algo`."""

    model: str = f"{COLD_START.output}/final"
    """A model folder or a Hub name. The default is the cold start's; where there is none, it is run first."""
    output: str = "outputs/grpo"

    total_steps: int = 120
    """Rollouts; each is followed by `updates_per_rollout` x `epochs_per_rollout` optimizer steps."""
    prompts_per_step: int = 32
    """Prompts in a rollout, over all processes."""
    group_size: int = 8
    """Completions a prompt."""
    max_completion_tokens: int = 64
    """Tokens a completion at most, the EOS included."""
    temperature: float = 1.0
    """Of sampling; the update scores under the same temperature."""
    rewards: dict[str, float] = field(default_factory=lambda: dict(rewards.DEFAULT_REWARDS))
    """Weight by name: built-in rewards, or file.py:function."""

    algo: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo", "cispo"] = "grpo"
    """The preset that fills the knobs below."""
    baseline: Literal["group", "leave_one_out"] | None = None
    """What a reward is compared with: its group's mean, or the mean of the others in it."""
    scale: Literal["group", "batch", "none"] | None = None
    """What the difference is divided by: the standard deviation of the group, of the batch, or nothing."""
    ratio_level: Literal["token", "sequence"] | None = None
    """One probability ratio a token, or one a completion."""
    surrogate: Literal["clip", "cispo"] | None = None
    """The clipped objective, or CISPO's capped weight on the log-probability."""
    clip_low: float | None = None
    """Ratios below 1 - clip_low stop pushing. With one update a rollout every ratio is 1 and clipping is
    idle.
    """
    clip_high: float | None = None
    """Ratios above 1 + clip_high stop pushing; with surrogate cispo the absolute cap."""
    weighting: Literal["sequence", "token", "constant"] | None = None
    """How tokens count: completions equally, tokens equally, or all by the constant 1 /
    max_completion_tokens.
    """
    kl_coef: float | None = None
    """Weight of the KL to the model that the run began with; 0 keeps no second model in memory."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_corrected"] | None = None
    """How the KL is estimated from the sampled tokens."""
    dynamic_sampling: bool | None = None
    """Leave out groups that are all right or all wrong, and sample others in their place."""
    max_refills: int = 4
    """Further rollouts that dynamic sampling may make in a step; what is still missing then is left as it
    is.
    """
    overlong: Literal["none", "soft", "mask"] | None = None
    """Completions near the limit: nothing; a punishment over the last fifth; or truncated ones out of the
    loss.
    """
    updates_per_rollout: int | None = None
    """Minibatches that a rollout is split into, by prompts."""
    epochs_per_rollout: int | None = None
    """How often each minibatch is used."""

    learning_rate: float = 4e-4
    """The highest; 4e-4 suits the tiny model, 1e-6 a pretrained one."""
    warmup_steps: int = 5

    eval_every: int = 30
    save_every: int = 60

    def __post_init__(self) -> None:
        """Fill the preset in, then refuse what cannot train."""
        for knob, value in PRESETS[self.algo].items():
            if getattr(self, knob) is None:
                object.__setattr__(self, knob, value)
        super().__post_init__()
        require(self, "prompts_per_step", "group_size", "max_completion_tokens", at_least=1)
        require(self, "updates_per_rollout", "epochs_per_rollout", at_least=1)
        require(self, "kl_coef", "clip_low", "max_refills", at_least=0)
        require(self, "temperature", "clip_high", above=0)
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be >= 2 with baseline={self.baseline!r}, got {self.group_size}: "
                "a completion is compared with others of its prompt; give --group_size 8"
            )
        if self.ratio_level == "sequence" and self.weighting != "sequence":
            raise ValueError(
                f'ratio_level="sequence" needs weighting="sequence", got weighting={self.weighting!r}: '
                "a completion that has one ratio counts as one"
            )
        check_share(self, processes=1)


# ------------------------------------------------------------------------------------------------------------
# The rollout


def roll_out(
    engine: TorchEngine,
    tokenizer: Any,
    problems: list[Problem],
    reward_set: rewards.RewardSet,
    config: GRPOConfig,
    step: int,
    first_prompt: int,
) -> list[Group]:
    """Sample a group of completions for each problem and score them.

    Args:
        engine: samples with the policy as it is now.
        tokenizer: of the policy.
        problems: this process' share of the step's problems.
        reward_set: scores whole groups.
        config: of the run.
        step: keys the random numbers, with the seed.
        first_prompt: the number of the first problem among all that the step asks.
    """
    size = config.group_size
    prompts = [render_prompt(tokenizer, problem.question) for problem in problems]
    prompt_ids = [encode_prompt(tokenizer, problem.question) for problem in problems]
    params = SamplingParams(config.max_completion_tokens, config.temperature)
    sampled = engine.generate(prompt_ids, size, params, (config.seed, step), first_prompt)

    def each(values: list[Any]) -> list[Any]:
        return [value for value in values for _ in range(size)]

    token_ids = [completion.token_ids for completions in sampled for completion in completions]
    decoded = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    texts = [completion_prefix(prompt) + text for prompt, text in zip(each(prompts), decoded, strict=True)]
    names = sorted({name for problem in problems for name in problem.columns})
    columns = {name: each([problem.columns.get(name) for problem in problems]) for name in names}
    columns |= {
        "prompts": each(prompts),
        "completion_ids": token_ids,
        "gold": each([p.gold for p in problems]),
    }
    columns |= {"group_size": size, "max_completion_tokens": config.max_completion_tokens}
    scores = rewards.score(reward_set, texts, columns)
    return [
        Group(
            number=first_prompt + i,
            problem=problem,
            prompt_ids=prompt_ids[i],
            completions=sampled[i],
            texts=texts[i * size : (i + 1) * size],
            scores=slice_scores(scores, i * size, (i + 1) * size),
        )
        for i, problem in enumerate(problems)
    ]


def sample_step(
    engine: TorchEngine,
    tokenizer: Any,
    problems: list[Problem],
    reward_set: rewards.RewardSet,
    config: GRPOConfig,
    run: Run,
) -> list[Group]:
    """This process' groups of a step: one rollout, or with dynamic sampling as many as it takes until every
    process has enough groups that teach something. All processes leave together.

    Raises:
        RunStopped: a reward broke its promise, on whatever process; the run stands where it stood before.
    """
    share = config.prompts_per_step // run.accelerator.num_processes
    first = run.accelerator.process_index * share
    position = run.drawn
    groups: list[Group] = []
    for refill in range(1 + config.dynamic_sampling * config.max_refills):
        drawn = take(problems, config.seed, run.drawn + first, share)
        run.drawn += config.prompts_per_step
        number = refill * config.prompts_per_step + first
        broken = None
        try:
            with run.accelerator.autocast():
                groups += roll_out(engine, tokenizer, drawn, reward_set, config, run.step, number)
        except rewards.RewardError as error:
            broken = str(error)
        informative = sum(group.is_informative for group in groups)
        counts, errors = zip(*gather_object([(informative, broken)]), strict=True)
        if any(errors):
            run.drawn = position
            run.checkpoint()
            raise RunStopped(
                f"{next(filter(None, errors))}. {run.step} steps are saved; mend the function, and the same "
                "command goes on"
            )
        if min(counts) >= share:
            break
    return groups


def choose_groups(groups: list[Group], share: int, config: GRPOConfig) -> list[Group]:
    """The groups to learn from: the first, with dynamic sampling the informative ones first."""
    if config.dynamic_sampling:
        groups = sorted(groups, key=lambda group: not group.is_informative)
    return groups[:share]


def credit(groups: list[Group], config: GRPOConfig, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Turn rewards into advantages `[B]`, and say which completions count `[B]`."""
    completions = [completion for group in groups for completion in group.completions]
    totals = torch.tensor([total for group in groups for total in group.scores.total])
    counted = torch.ones(len(totals), dtype=torch.bool)
    if config.overlong == "soft":
        token_ids = [completion.token_ids for completion in completions]
        totals += torch.tensor(soft_overlong([], token_ids, config.max_completion_tokens))
    elif config.overlong == "mask":
        counted = torch.tensor([completion.finish_reason != "length" for completion in completions])
    everyone = sum(gather_object([moments(totals)]))
    advantages = group_advantages(
        totals, config.group_size, config.baseline, config.scale, batch_moments=everyone
    )
    return advantages * counted, counted


@torch.no_grad()
def score_rollout(
    policy: Any, batch: RolloutBatch, accelerator: Accelerator, rows: range, config: GRPOConfig
) -> Tensor:
    """Log-probabilities `[B, T]` of the rollout's completions under a policy; zero in rows not asked for."""
    logprobs = torch.zeros_like(batch.tensors["sampling_logprobs"])
    policy.eval()
    for chosen, scale, _ in micro_batches(
        accelerator, policy, batch.lengths, rows, config.micro_batch_tokens
    ):
        if scale:
            inputs = model_inputs(batch.select(chosen, accelerator.device))
            with accelerator.autocast():  # a reference is not prepared, and must compute as the policy does
                values, _ = policy(**inputs, temperature=config.temperature)
            logprobs[chosen, : values.shape[1]] = values.cpu()
    return logprobs


def model_inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `Policy.forward` takes of a batch."""
    return {name: tensors[name] for name in ("input_ids", "attention_mask", "completion_mask")}


# ------------------------------------------------------------------------------------------------------------
# The update


def minibatches(batch: RolloutBatch, config: GRPOConfig) -> Iterator[range]:
    """Rows of each update: the rollout split by prompts, in order, and gone through `epochs_per_rollout`
    times.
    """
    size = len(batch.lengths) // config.updates_per_rollout
    for _ in range(config.epochs_per_rollout):
        for number in range(config.updates_per_rollout):
            yield range(number * size, (number + 1) * size)


def update(
    policy: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    accelerator: Accelerator,
    batch: RolloutBatch,
    rows: range,
    config: GRPOConfig,
) -> dict[str, float]:
    """One optimizer step on a minibatch; the gradient depends neither on the micro-batches nor on the
    processes.
    """
    mask = batch.tensors["completion_mask"][rows.start : rows.stop]
    totals = accelerator.reduce(
        torch.tensor([int(mask.any(1).sum()), int(mask.sum())], device=accelerator.device)
    ).tolist()
    # Fixed for the whole update before anything is split or left out.
    weights = torch.zeros(batch.tensors["completion_mask"].shape)
    weights[rows.start : rows.stop] = loss_weights(
        mask, config.weighting, config.max_completion_tokens, *totals
    )
    # Without a KL, rows of zero advantage have zero gradient: they cost nothing.
    learning = [row for row in rows if config.kl_coef or batch.advantages[row] != 0]
    policy.train()
    sums = dict.fromkeys(("tokens", "loss", "ratio_max"), 0.0)
    for chosen, scale, context in micro_batches(
        accelerator, policy, batch.lengths, learning, config.micro_batch_tokens
    ):
        tensors = batch.select(chosen, accelerator.device)
        tensors["advantages"] = batch.advantages[chosen, None].to(accelerator.device)
        tensors["weights"] = (
            weights[chosen, : tensors["completion_mask"].shape[1]].to(accelerator.device) * scale
        )
        with context:
            loss, stats = micro_loss(policy, tensors, config)
            accelerator.backward(loss * accelerator.num_processes)
        sums["loss"] += float(loss.detach())
        sums["ratio_max"] = max(sums["ratio_max"], stats.pop("ratio_max"))
        tokens = stats.pop("tokens") * scale
        sums["tokens"] += tokens
        for name, mean in stats.items():
            sums[name] = sums.get(name, 0.0) + mean * tokens
    grad_norm = accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return {**sums, "grad_norm": float(grad_norm)}


def micro_loss(
    policy: Any, tensors: dict[str, Tensor], config: GRPOConfig
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a micro-batch, and what it tells: the number of tokens, means over them, the largest
    ratio.
    """
    mask = tensors["completion_mask"]
    logprobs, entropy = policy(**model_inputs(tensors), temperature=config.temperature)
    # Where the sampler's arithmetic is not the trainer's, the trainer's own log-probabilities are the old
    # ones.
    old_logprobs = tensors.get("old_logprobs", logprobs.detach())
    advantages = tensors["advantages"].expand_as(logprobs)
    loss, stats = policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        tensors["weights"],
        mask,
        config.clip_low,
        config.clip_high,
        config.ratio_level,
        config.surrogate,
    )
    gap = logprobs.detach() - tensors["sampling_logprobs"]
    tells = {"entropy": entropy.detach(), "sampler_mismatch": gap.expm1() - gap}
    if config.kl_coef:
        kl = kl_penalty(logprobs, tensors["ref_logprobs"], old_logprobs, config.kl_estimator)
        loss = loss + config.kl_coef * (tensors["weights"] * kl).sum()
        tells["kl"] = kl.detach()
    for name, values in tells.items():
        stats[name] = torch.where(mask, values, 0).sum() / stats["tokens"].clamp(min=1)
    return loss, {name: float(value) for name, value in stats.items()}


# ------------------------------------------------------------------------------------------------------------
# Telling


def update_metrics(updates: list[list[dict[str, float]]]) -> dict[str, float]:
    """The updates' metrics from every process' list; means are over the tokens that were learned from."""
    every = [update for of_process in updates for update in of_process]
    metrics = {
        "policy/loss": sum(update["loss"] for update in every) / len(updates[0]),
        "policy/grad_norm": max(update["grad_norm"] for update in every),
        "policy/ratio_max": max(update["ratio_max"] for update in every),
    }
    tokens = sum(update["tokens"] for update in every)
    names = {"entropy", "approx_kl", "clip_fraction", "kl", "sampler_mismatch"} & every[0].keys()
    for name in sorted(names):
        key = "rollout/sampler_mismatch_kl" if name == "sampler_mismatch" else f"policy/{name}"
        metrics[key] = sum(update[name] for update in every) / tokens if tokens else 0.0
    return metrics


# ------------------------------------------------------------------------------------------------------------
# The run


def load_training_problems(config: GRPOConfig, tokenizer: Any, gold: bool) -> tuple[list[Problem], str]:
    """The problems whose prompt fits, and a sentence that counts the others.

    Raises:
        ValueError: nothing is left to train on.
    """
    problems = load_problems(
        config.data, "train", limit=config.limit, require_gold=gold, **config.data_arguments()
    )
    kept = [p for p in problems if len(encode_prompt(tokenizer, p.question)) <= config.max_prompt_tokens]
    left_out = len(problems) - len(kept)
    told = f"{len(problems)} problems" + (f", {left_out} left out over max_prompt_tokens" if left_out else "")
    if not kept:
        raise ValueError(
            f"data {config.data!r} leaves nothing to train on: {told}; raise --max_prompt_tokens"
        )
    return kept, told


def load_rewards(config: GRPOConfig) -> rewards.RewardSet:
    """The chosen rewards.

    Raises:
        ValueError: an unknown one, or one that needs a model beside the policy.
    """
    reward_set = rewards.parse_rewards(config.rewards)
    if reward_set.slots:
        name = reward_set.slots[0].name
        raise ValueError(f"rewards: {name!r} needs a reward model, not built yet; use file.py:function")
    return reward_set


def check_share(config: GRPOConfig, processes: int) -> None:
    """Refuse a rollout that does not split evenly over processes and minibatches."""
    if config.prompts_per_step % (processes * config.updates_per_rollout):
        raise ValueError(
            f"prompts_per_step must be a multiple of {processes} processes x "
            f"updates_per_rollout={config.updates_per_rollout}, got {config.prompts_per_step}"
        )


def ensure_cold_start(config: GRPOConfig, accelerator: Accelerator) -> int:
    """Run the cold start if the default model is asked for and not there yet. Returns the exit code."""
    if config.model != GRPOConfig.model or (Path(config.model) / "config.json").is_file():
        return 0
    accelerator.print(f"{config.model} is not there yet: running the cold start first (python train_sft.py)")
    same_task = {"data": config.data, "data_options": config.data_options, "seed": config.seed}
    code = cold_start(SFTConfig(**same_task), accelerator)
    accelerator.free_memory()
    return code


def main(config: GRPOConfig) -> int:
    """Train; returns the exit code."""
    with at_the_door():
        accelerator = make_accelerator(config.tracker, config.output)
    if code := ensure_cold_start(config, accelerator):
        return code
    with at_the_door():
        check_share(config, accelerator.num_processes)
        start = open_run(config)
        if start.is_finished:
            accelerator.print(f"{start.folder} is finished: its model is {start.folder / 'final'}")
            return 0
        reward_set = load_rewards(config)
        source = str(start.checkpoint or config.model)
        tokenizer = load_tokenizer(source, config.system_prompt)
        train, told = load_training_problems(config, tokenizer, rewards.needs_gold(reward_set))
        held_out = (
            load_problems(config.data, "validation", **config.data_arguments()) if config.eval_every else []
        )
        model = load_model(source, config.seed)
        reference = Policy(load_model(config.model)).requires_grad_(False) if config.kl_coef else None

    policy = Policy(model)
    optimizer = make_optimizer(policy, config.optimizer, config.learning_rate, config.weight_decay)
    optimizer_steps = config.total_steps * config.updates_per_rollout * config.epochs_per_rollout
    scheduler = make_scheduler(optimizer, config.lr_schedule, config.warmup_steps, optimizer_steps)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    reference = reference and reference.to(accelerator.device)
    engine = TorchEngine(model, tokenizer)
    run = Run(start, config, accelerator, model, tokenizer, optimizer, scheduler)
    run.log.say(f"{config.algo} from {config.model} on {config.data}: {told}")

    greedy = SamplingParams(config.max_completion_tokens, temperature=0.0)
    # Only where sampler and trainer compute alike are the sampled log-probabilities the policy's own.
    sampler_is_exact = accelerator.mixed_precision == "no"

    def evaluate() -> None:
        figures = hold_shared_exam(accelerator, engine, tokenizer, held_out[: config.eval_limit], greedy)
        run.evaluated("validation", figures)

    with stop_on_signal() as stop:
        if run.step == 0 and config.eval_every:
            evaluate()
        while run.step < config.total_steps and not stop.signal:
            began = time.perf_counter()
            # 1. Roll out: a group of completions for each prompt, from the policy as it is now, scored.
            groups = sample_step(engine, tokenizer, train, reward_set, config, run)
            chosen = choose_groups(groups, config.prompts_per_step // accelerator.num_processes, config)
            batch = collate(chosen, *credit(chosen, config, accelerator), tokenizer.pad_token_id)
            rolled_out = time.perf_counter()

            # 2. The log-probabilities that the update compares with.
            rows = range(len(batch.lengths))
            if sampler_is_exact:
                batch.tensors["old_logprobs"] = batch.tensors["sampling_logprobs"]
            elif config.updates_per_rollout * config.epochs_per_rollout > 1:
                batch.tensors["old_logprobs"] = score_rollout(policy, batch, accelerator, rows, config)
            if reference:
                batch.tensors["ref_logprobs"] = score_rollout(reference, batch, accelerator, rows, config)

            # 3. Learn.
            updates = [
                update(policy, optimizer, scheduler, accelerator, batch, minibatch, config)
                for minibatch in minibatches(batch, config)
            ]

            # 4. Tell and keep.
            run.step += 1
            metrics = rollout_metrics(gather_object([count(groups)])) | update_metrics(
                gather_object([updates])
            )
            times = {"time/generate_s": rolled_out - began, "time/update_s": time.perf_counter() - rolled_out}
            run.log.step(run.step, {**metrics, **times, "policy/learning_rate": scheduler.get_last_lr()[0]})
            run.log.rollouts(gather_object(rollout_rows(groups, batch, run.step)))
            is_last = run.step == config.total_steps
            if config.eval_every and (run.step % config.eval_every == 0 or is_last):
                evaluate()
            if run.step % config.save_every == 0 or is_last or stop.signal:
                run.checkpoint()
    return run.finish(stop)


if __name__ == "__main__":
    run_script(main, lambda: parse_config(GRPOConfig))
