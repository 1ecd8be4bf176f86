"""Reinforcement learning with verifiable rewards: GRPO and its relatives, a step read top to bottom.

A step rolls out a group of completions for each prompt, scores them, compares each with its group, and moves
the policy. Departures from DeepSeekMath's GRPO (arXiv 2402.03300): groups without a difference are left out
of the update (their gradient is zero), and the KL's estimator is corrected so that its gradient is the KL's.

    python train_grpo.py                                      # the tiny model on the built-in sums, anywhere
    accelerate launch train_grpo.py --config configs/gsm8k_qwen2.5_0.5b.yaml      # one GPU
    accelerate launch --num_processes 4 train_grpo.py ...     # several
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

import rewards
from batches import MicroBatches
from credit import credit, explained_variance
from data import Problem, load_problems, take
from exam import canary_rows, hold_shared_exam, summarise
from handover import StepInHand, collate_step, hand_over, put_down_step, take_over, take_up_step
from inference import SamplingParams
from inference.engine import TorchEngine, stop_token_ids
from inference.vllm_engine import VLLMEngine
from inference.vllm_server import EngineError
from memory import peak_memory
from mixes import refuse_mixes
from models import (
    Policy,
    WithoutAdapter,
    attend_fast,
    compute_dtype,
    load_reward_model,
    make_accelerator,
)
from optimizers import make_optimizer, make_scheduler
from plan import Load
from preflight import check_memory, check_template, choose_problems, grpo_load, tell
from rehearsal import dry_run, rehearse_grpo
from rewards.scorer import Scorer
from rollouts import Group, RolloutBatch, count, rollout_metrics, rollout_rows, try_roll_out
from runs.config import RunStopped, UserError, at_the_door, parse_config, require, run_script
from runs.folder import Run, Start, open_run
from runs.loop import Work, train
from runs.signals import StepStopped
from runs.training import TrainingConfig
from sharding import Weights, is_sharded, prepare, refuse_unshardable
from tokenizer import ADAPTER, asking
from train_sft import SFTConfig
from train_sft import main as cold_start
from updates import minibatches, score_rollout, update, update_metrics

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
    "kl_placement": "loss",
    "kl_estimator": "k3_corrected",
    "dynamic_sampling": False,
    "overlong": "none",
    "wrong_reward": 0.0,
    "length_alpha": 0.0,
    "difficulty": "none",
    "updates_per_rollout": 1,
    "epochs_per_rollout": 1,
}
_KL_IN_REWARD = {"kl_placement": "reward", "kl_estimator": "k1"}
PRESETS: dict[str, dict[str, Any]] = {
    "ppo": _GRPO
    | {"baseline": "critic", "scale": "batch", "weighting": "token", "kl_coef": 0.01}
    | {**_KL_IN_REWARD, "updates_per_rollout": 4},
    "grpo": _GRPO | {"kl_coef": 0.04},
    "dr_grpo": _GRPO | {"scale": "none", "weighting": "constant"},
    "dapo": _GRPO
    | {"clip_high": 0.28, "weighting": "token", "updates_per_rollout": 4}
    | {"dynamic_sampling": True, "overlong": "soft"},
    "gspo": _GRPO
    | {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "updates_per_rollout": 4},
    "grpo_lead": _GRPO
    | {"dynamic_sampling": True}
    | {"wrong_reward": -1.0, "length_alpha": 0.05, "difficulty": "logistic"},
    "rloo": _GRPO | {"baseline": "leave_one_out", "scale": "none", "weighting": "constant", **_KL_IN_REWARD},
    "cispo": _GRPO | {"surrogate": "cispo", "clip_high": 5.0, "weighting": "token"},
}
# What only a critic reads; filled in where there is one, refused where there is none.
CRITIC: dict[str, Any] = {
    "critic": "shared",
    "critic_warmup_steps": 0,
    "value_coef": 0.5,
    "value_clip": 0.2,
    "gamma": 1.0,
    "lam": 0.95,
}


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(TrainingConfig):
    """Every field is a flag of the same name; a knob that is None takes the value of the preset `algo`."""

    tiny_rates = (4e-4, 4e-3)
    pretrained_rates = (1e-6, 1e-5)

    model: str = f"{COLD_START.output}/final"
    """A model folder or a Hub name. The default is the cold start's; where there is none, it is run first."""
    output: str = "outputs/grpo"

    total_steps: int = 100
    """Rollouts; each is followed by `updates_per_rollout` x `epochs_per_rollout` optimizer steps."""
    prompts_per_step: int = 32
    """Prompts in a rollout, over all processes."""
    group_size: int = 8
    """Completions a prompt."""
    max_completion_tokens: int = 64
    """Tokens a completion at most, the EOS included."""
    temperature: float = 1.0
    """Of sampling; the update scores under the same temperature."""
    top_k: int = 0
    """Must stay 0: what a sampler leaves out, an update cannot score. Likewise top_p and min_p."""
    top_p: float = 1.0
    """Must stay 1."""
    min_p: float = 0.0
    """Must stay 0."""
    engine: Literal["torch", "vllm"] = "torch"
    """What samples rollouts: the weights that train, in place; or vLLM servers, see docs/scaling.md."""
    engine_url: str | None = None
    """Addresses of vLLM servers, separated by commas; `make vllm-server MODEL=...` starts one."""
    engine_timeout_s: float = 600.0
    """How long a server may be gone, or silent over a completion or a hand-over, before the run stops."""
    rewards: dict[str, float] = field(default_factory=lambda: dict(rewards.DEFAULT_REWARDS))
    """Weight by name: built-in, file.py:function, model:NAME or judge:URL; see docs/rewards.md."""
    on_bad_gold: Literal["skip", "stop"] = "skip"
    """Of golds that the verifier cannot read: leave them out and say so (half of them at most), or stop."""

    algo: Literal["ppo", "grpo", "dr_grpo", "dapo", "gspo", "grpo_lead", "rloo", "cispo"] = "grpo"
    """The preset that fills the knobs below."""
    baseline: Literal["critic", "group", "leave_one_out"] | None = None
    """What a reward is compared with: a critic's value, its group's mean, or the others' mean."""
    scale: Literal["group", "batch", "none"] | None = None
    """What the difference is divided by: the standard deviation of the group, of the batch, or nothing."""
    ratio_level: Literal["token", "sequence"] | None = None
    """One probability ratio a token, or one a completion."""
    surrogate: Literal["clip", "cispo"] | None = None
    """The clipped objective, or CISPO's capped weight on the log-probability."""
    clip_low: float | None = None
    """Ratios below 1 - clip_low stop pushing. With one update a rollout all are 1, and clipping is idle."""
    clip_high: float | None = None
    """Ratios above 1 + clip_high stop pushing; with surrogate cispo the absolute cap."""
    weighting: Literal["sequence", "token", "constant"] | None = None
    """How tokens count: completions equally, tokens equally, or all by 1 / max_completion_tokens."""
    kl_coef: float | None = None
    """Weight of the KL to the model that the run began with; 0 keeps no second model in memory."""
    kl_placement: Literal["loss", "reward"] | None = None
    """Where the KL counts: in the loss, or as a cost in the rewards."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_corrected"] | None = None
    """How the KL is estimated from the sampled tokens; in the loss, k1 has no gradient on average."""
    kl_target: float = 0.0
    """Above 0: kl_coef is moved by at most 2 % a step until the KL is about this (nats a token)."""
    ref_sync_steps: int = 0
    """Steps after which the KL's reference becomes the policy as it is then; 0 for never."""
    dynamic_sampling: bool | None = None
    """Leave out groups that are all right or all wrong, and sample others in their place."""
    max_refills: int = 4
    """Further rollouts that dynamic sampling may make in a step; what is missing then stays as it is."""
    overlong: Literal["none", "soft", "mask"] | None = None
    """Near the limit: nothing; a punishment over the last fifth; or truncated completions out of the loss."""
    wrong_reward: float | None = None
    """Added to the reward of a wrong answer."""
    length_alpha: float | None = None
    """exp(-alpha z) - 1 is added for a right one, z scoring its length among its group's right ones."""
    length_min_tokens: int = 0
    """Groups whose three shortest completions average fewer tokens are spared length_alpha."""
    difficulty: Literal["none", "logistic"] | None = None
    """logistic weighs rare successes of hard prompts and rare failures of easy ones up."""
    critic: Literal["shared", "separate"] | None = None
    """Where the critic's values come from: a head on the policy's states, or a second model."""
    critic_warmup_steps: int | None = None
    """Steps at first in which the critic alone learns."""
    critic_learning_rate: float | None = None
    """The critic's highest: by default 1e-3 for a shared one's head, and learning_rate for a separate one."""
    value_coef: float | None = None
    """Weight of the critic's loss."""
    value_clip: float | None = None
    """How far a value may move from the rollout's and still be rewarded for it."""
    gamma: float | None = None
    """Discount a token."""
    lam: float | None = None
    """Of generalised advantage estimation: 1 waits for the outcome, less trusts the critic."""
    updates_per_rollout: int | None = None
    """Minibatches that a rollout is split into, by prompts."""
    epochs_per_rollout: int | None = None
    """How often each minibatch is used."""
    entropy_coef: float = 0.0
    """Weight of the entropy, which is rewarded."""
    importance_cap: float = 2.0
    """Where sampler and trainer differ, a token counts by their probability ratio, at most this."""
    replay_groups: int = 0
    """Groups of the steps before, the latest with a signal, that each step learns from again."""

    learning_rate: float | None = None
    """The highest. If not given: 4e-4 for the built-in model, 1e-6 for any other (as in arXiv 2402.03300);
    for adapters 4e-3 and 1e-5."""
    warmup_steps: int = 5

    eval_every: int = 25
    save_every: int = 50

    def __post_init__(self) -> None:
        """Fill the preset in, then refuse what cannot train."""
        super().__post_init__()
        has_critic = (self.baseline or PRESETS[self.algo]["baseline"]) == "critic"
        defaults = PRESETS[self.algo] | (CRITIC if has_critic else {})
        if has_critic:
            # A head of one output, zero at first, moves as fast as it likes; a second model as the policy.
            is_head = self.critic in (None, "shared")
            defaults["critic_learning_rate"] = 1e-3 if is_head else self.learning_rate
        for knob, value in defaults.items():
            if getattr(self, knob) is None:
                object.__setattr__(self, knob, value)
        require(self, "prompts_per_step", "group_size", "max_completion_tokens", at_least=1)
        require(self, "updates_per_rollout", "epochs_per_rollout", at_least=1)
        require(self, "kl_coef", "kl_target", "ref_sync_steps", "clip_low", "entropy_coef", at_least=0)
        require(self, "max_refills", "length_alpha", "length_min_tokens", "replay_groups", at_least=0)
        require(self, "temperature", "clip_high", "importance_cap", "engine_timeout_s", above=0)
        if has_critic:
            require(self, "critic_warmup_steps", "value_coef", "gamma", "lam", at_least=0)
            require(self, "critic_learning_rate", "value_clip", above=0)
        refuse_mixes(self, (*CRITIC, "critic_learning_rate"))
        check_share(self, processes=1)


# ------------------------------------------------------------------------------------------------------------
# A step


@dataclass
class Training:
    """Everything that a step works with. Every process holds one.

    Attributes:
        config: of the run.
        accelerator: prepared policy and optimizer.
        tokenizer: of the policy.
        problems: to draw from.
        held_out: to evaluate on.
        scorer: scores completions in processes of its own.
        engine: samples from the very weights that train.
        sampler: samples rollouts: the engine, or servers that are handed the weights.
        policy: as prepared.
        reference: the policy that the KL is taken to; None where it counts for nothing.
        optimizer: as prepared.
        scheduler: of the learning rate.
        micro_batches: take rows through the policy.
        run: position, log, checkpoints, and `memory`: what a step hands to the next besides the weights.
        load: what a step puts through the model at most.
    """

    config: GRPOConfig
    accelerator: Accelerator
    tokenizer: Any
    problems: list[Problem]
    held_out: list[Problem]
    scorer: Scorer
    engine: TorchEngine
    sampler: TorchEngine | VLLMEngine
    policy: Any
    reference: nn.Module | None
    optimizer: Any
    scheduler: Any
    micro_batches: MicroBatches
    run: Run
    load: Load


def train_step(training: Training) -> dict[str, float]:
    """One step: roll out, compare, learn, tell. Returns its metrics.

    Raises:
        StepStopped: the run was told to stop; what is in hand is in `run.memory`.
    """
    config, accelerator, run = training.config, training.accelerator, training.run
    drawn = run.drawn
    try:
        hand = take_up_step(training) or begin_step(training)
    except StepStopped:
        run.drawn = drawn  # the weights have not moved: the step begins anew
        raise
    batch, seconds, kl_coef = hand.batch, hand.seconds, run.memory["kl_coef"]

    # 4. Learn.
    began = time.perf_counter()
    critic_only = run.step < (config.critic_warmup_steps or 0)
    movers = (training.policy, training.optimizer, training.scheduler, training.micro_batches)
    try:
        for rows in list(minibatches(batch, config))[len(hand.updates) :]:
            run.seed_dropout(len(hand.updates))
            hand.updates.append(update(*movers, batch, rows, config, kl_coef, critic_only))
    except StepStopped:
        seconds["time/update_s"] += time.perf_counter() - began
        put_down_step(training, hand)
        raise
    seconds["time/update_s"] += time.perf_counter() - began

    # 5. Tell, and keep what the next step needs.
    run.step += 1
    updates, groups = hand.updates, hand.groups
    metrics = rollout_metrics(gather_object([count(groups)])) | update_metrics(gather_object([updates]))
    if config.baseline == "critic":
        metrics["critic/explained_variance"] = explained_variance(batch)
    if training.reference:
        metrics["policy/kl_coef"] = kl_coef
    if config.replay_groups:
        metrics["rollout/replayed_groups"] = len(run.memory["replay"])
    metrics["policy/learning_rate"] = training.scheduler.get_last_lr()[0]
    metrics |= seconds
    if config.engine == "vllm":
        metrics["time/push_s"] = training.sampler.pushed_s
    tokens = metrics["rollout/completion_tokens"] * metrics["rollout/completions"]
    metrics["rollout/tokens_per_s"] = tokens / (seconds["time/generate_s"] + seconds["time/score_s"])
    metrics["memory/peak_mib"] = max(gather_object([peak_memory(accelerator.device) / 2**20]))
    run.tell(metrics)
    rows = gather_object(rollout_rows(groups, batch, run.step))
    run.log.rollouts(rows)
    run.check_updates([done["cause"] for done in updates], rows)
    hand_over(training, metrics, hand.fresh)
    return metrics


def begin_step(training: Training) -> StepInHand:
    """The first three parts of a step: roll out, look back, credit."""
    config, accelerator, run = training.config, training.accelerator, training.run
    began, waited_s = time.perf_counter(), training.scorer.waited_s
    # 1. Roll out: a group of completions for each prompt, from the policy as it is now; each group is scored
    # while others still generate.
    groups = sample_step(training)
    fresh = choose_groups(groups, config.prompts_per_step // accelerator.num_processes, config)
    batch = collate_step(training, fresh)
    rolled_out = time.perf_counter()

    # 2. What the update compares with: log-probabilities and values as they were before it.
    look_back(training, batch)

    # 3. Credit: who did better than expected.
    credit(batch, config, accelerator, run.memory["kl_coef"])
    score_s = training.scorer.waited_s - waited_s
    seconds = {
        "time/generate_s": rolled_out - began - score_s,
        "time/score_s": score_s,
        "time/update_s": time.perf_counter() - rolled_out,
    }
    return StepInHand(groups, fresh, batch, [], seconds)


def sample_step(training: Training) -> list[Group]:
    """This process' groups of a step: one rollout, or with dynamic sampling as many as it takes until every
    process has enough groups that teach something. All processes leave together.

    Raises:
        RunStopped: a reward broke its promise or no server is left, on any process; the run is as before it.
        StepStopped: a process was told to stop.
    """
    config, run = training.config, training.run
    share = config.prompts_per_step // run.accelerator.num_processes
    first = run.accelerator.process_index * share
    position = run.drawn
    groups: list[Group] = []
    for refill in range(1 + config.dynamic_sampling * config.max_refills):
        drawn = take(training.problems, config.seed, run.drawn + first, share)
        run.drawn += config.prompts_per_step
        number = refill * config.prompts_per_step + first
        actors = (training.sampler, training.tokenizer, drawn, training.scorer)
        sampled, broken = [], None
        try:
            with run.weights.whole(compute_dtype()) as model, run.accelerator.autocast():
                if config.engine == "vllm" and refill == 0:
                    training.sampler.push_weights(model)
                sampled, broken = try_roll_out(*actors, config, run.step, number)
        except StepStopped:
            pass
        except EngineError as error:
            broken = str(error)
        groups += sampled
        informative = sum(group.is_informative for group in groups)
        counts, errors, signals = zip(*gather_object([(informative, broken, run.stop.signal)]), strict=True)
        if any(signals):
            raise StepStopped
        if any(errors):
            run.drawn = position
            run.checkpoint()
            raise RunStopped(next(filter(None, errors)))
        if min(counts) >= share:
            break
    return groups


def choose_groups(groups: list[Group], share: int, config: GRPOConfig) -> list[Group]:
    """The groups to learn from: the first, with dynamic sampling the informative ones first."""
    if config.dynamic_sampling:
        groups = sorted(groups, key=lambda group: not group.is_informative)
    return groups[:share]


def look_back(training: Training, batch: RolloutBatch) -> None:
    """Add the log-probabilities and values that the update reads and the sampler has not given."""
    config, accelerator, tensors = training.config, training.accelerator, batch.tensors
    # Replayed groups are an older policy's; half precision and a server are not what the trainer computes by.
    if accelerator.mixed_precision == "no" and config.engine == "torch" and not config.replay_groups:
        tensors["old_logprobs"] = tensors["sampling_logprobs"]
    # With one update the trainer's own are known when it begins: `micro_loss` takes them there.
    is_read_before = config.updates_per_rollout * config.epochs_per_rollout > 1 or config.replay_groups
    is_read_before = is_read_before or (config.kl_placement == "reward" and training.reference)
    if config.baseline == "critic" or (is_read_before and "old_logprobs" not in tensors):
        tensors.update(score_rollout(training.policy, batch, training.micro_batches, config) | tensors)
    if training.reference:
        told = score_rollout(training.reference, batch, training.micro_batches, config)
        tensors["ref_logprobs"] = told["old_logprobs"]


def build_reference(config: GRPOConfig, policy: Policy) -> nn.Module:
    """The policy that the KL is taken to: a frozen copy, or the policy itself with its adapter off."""
    began_with_adapter = (Path(config.model) / ADAPTER).is_file()
    if config.lora_rank and not began_with_adapter:
        return WithoutAdapter(policy)
    return Policy(config.load_weights(config.model)[0]).requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# The run


def check_share(config: GRPOConfig, processes: int) -> None:
    """Refuse a rollout that does not split evenly over processes and minibatches."""
    if config.prompts_per_step % (processes * config.updates_per_rollout):
        raise ValueError(
            f"prompts_per_step must be a multiple of {processes} processes x "
            f"updates_per_rollout={config.updates_per_rollout}, got {config.prompts_per_step}"
        )


def ensure_cold_start(config: GRPOConfig, accelerator: Accelerator) -> int | None:
    """Run the cold start if the default model is asked for and not there yet.

    Returns:
        The exit code, where there is nothing to go on with: it failed, or was a dry run. Else None.

    Raises:
        UserError: it would have to be sharded, which its optimizer cannot be.
    """
    if config.model != GRPOConfig.model or (Path(config.model) / "config.json").is_file():
        return None
    if is_sharded(accelerator):
        raise UserError(
            f"model {config.model!r} is not there yet, and the cold start that makes it is not sharded: run "
            "python train_sft.py first, which takes one process minutes, or give another --model"
        )
    accelerator.print(f"{config.model} is not there yet: running the cold start first (python train_sft.py)")
    shared = ("data", "data_options", "max_prompt_tokens", "on_long_prompt", "seed")
    shared += ("log_level", "dry_run", "price_per_hour")
    same_task = {name: getattr(config, name) for name in shared}
    code = cold_start(SFTConfig(**same_task, **asking(config)), accelerator)
    if config.dry_run:
        accelerator.print("that was the cold start; what follows can be rehearsed once it is there")
    accelerator.free_memory()
    return code if code or config.dry_run else None


def set_up(config: GRPOConfig, start: Start, accelerator: Accelerator) -> Training:
    """Load and prepare everything, and go on where `start` says.

    Raises:
        UserError: what was asked for is not there, or does not fit.
    """
    with at_the_door():
        reward_set = rewards.parse_rewards(config.rewards)
        reward_set = rewards.fill_slots(reward_set, load_reward_model, accelerator.device)
        source = str(start.checkpoint or config.model)
        tokenizer = config.load_tokenizer(source)
        problems, told = choose_problems(config, tokenizer, reward_set)
        where = config.data_arguments()
        held_out = load_problems(config.data, "validation", **where) if config.eval_every else []
        held_out = held_out[: config.eval_limit]
        load = grpo_load(config, tokenizer, problems, accelerator.num_processes)
        check_memory(config, source, load, accelerator)
        model = config.load_model(source)
        policy = Policy(model, config.critic)
        reference = build_reference(config, policy) if config.kl_coef else None
        rates = (config.learning_rate, config.weight_decay, config.critic_learning_rate)
        optimizer = make_optimizer(policy, config.optimizer, *rates)
        servers = None
        if config.engine == "vllm":
            servers = VLLMEngine(
                config.engine_url,
                model,
                stop_token_ids(model, tokenizer),
                folder=Path(config.output),
                context=config.max_prompt_tokens + config.max_completion_tokens,
                timeout_s=config.engine_timeout_s,
                is_main=accelerator.is_main_process,
                share=lambda given: gather_object([given])[0],
            )
            told += f"; {servers.told}"

    optimizer_steps = config.total_steps * config.updates_per_rollout * config.epochs_per_rollout
    scheduler = make_scheduler(optimizer, config.lr_schedule, config.warmup_steps, optimizer_steps)
    critic, weights = policy.critic, Weights(accelerator, policy)
    policy, optimizer = prepare(accelerator, policy, optimizer)
    attend_fast(model)
    reference = reference and reference.to(accelerator.device)
    run = Run(start, config, accelerator, weights, tokenizer, optimizer, scheduler)
    take_over(run, config, critic, reference)
    micro_batches = MicroBatches(accelerator, config.micro_batch_tokens, run.memory["budget"], run.stop)
    with weights.whole() as sampled:  # the model, or a copy of it
        attend_fast(sampled)
        engine = TorchEngine(sampled, tokenizer)
    engine.memory = run.memory["sampler"] or engine.memory
    sampler = servers or engine
    engine.check = sampler.check = run.stop.check
    run.log.console.say(f"{config.algo} from {config.model} on {config.data}: {told}")
    tell(accelerator, check_template(tokenizer, engine.stop_token_ids.tolist()))
    return Training(
        *(config, accelerator, tokenizer, problems, held_out, Scorer(reward_set), engine, sampler),
        *(policy, reference, optimizer, scheduler, micro_batches, run, load),
    )


@contextmanager
def work(training: Training) -> Iterator[Work]:
    """What the loop needs of a training."""
    config, run, held_out = training.config, training.run, training.held_out
    greedy = SamplingParams(config.max_completion_tokens, temperature=0.0)

    def evaluate() -> None:
        asked = (training.accelerator, training.engine, training.tokenizer, held_out, greedy)
        with run.weights.whole(compute_dtype()):
            groups = hold_shared_exam(*asked)
        run.evaluated("validation", summarise(groups), canary_rows(held_out, groups))

    with training.scorer:
        yield Work(run, lambda: train_step(training), evaluate, evaluates_first=True)


def main(config: GRPOConfig) -> int:
    """Train; returns the exit code."""
    with at_the_door():
        accelerator = make_accelerator(config.tracker, config.output)
    if (code := ensure_cold_start(config, accelerator)) is not None:
        return code
    with at_the_door():
        check_share(config, accelerator.num_processes)
        refuse_unshardable(accelerator, config)
        start = open_run(config)
    if start.is_finished:
        accelerator.print(f"{start.folder} is finished: its model is {start.folder / 'final'}")
        return 0
    if config.dry_run:
        config = replace(config, engine="torch", engine_url=None)  # no server is handed weights for nothing
        begin = partial(set_up, accelerator=accelerator)
        return dry_run(config, start, begin, partial(rehearse_grpo, take_step=train_step))
    code = train(lambda start: work(set_up(config, start, accelerator)), start)
    accelerator.end_training()
    return code


if __name__ == "__main__":
    run_script(main, lambda: parse_config(GRPOConfig))
