"""Supervised fine-tuning: the cold start that shows a model the form of thinking before it answers.

Cross entropy on completions only: the prompt is read, never imitated, and the end-of-sequence token counts.
The loss is the mean over all completion tokens of a step, whatever the micro-batches and the number of
processes.

    python train_sft.py                                     # the tiny model on the built-in sums, on a laptop
    accelerate launch train_sft.py --model Qwen/Qwen2.5-0.5B --data gsm8k      # one GPU
    accelerate launch --num_processes 4 train_sft.py ...    # several
"""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from batches import MicroBatches, averaged_gradients, pad_batch
from data import Problem, load_problems, take
from exam import canary_rows, hold_shared_exam, summarise
from inference import SamplingParams
from inference.engine import TorchEngine
from losses import loss_weights
from memory import peak_memory
from models import Policy, attend_fast, compute_dtype, make_accelerator
from optimizers import OptimizerName, make_optimizer, make_scheduler, take_step
from plan import Load
from preflight import check_memory, check_template, fit_prompts, sft_load, tell
from prompts import answer_style, completion_prefix, in_style, render_prompt
from rehearsal import dry_run, rehearse_sft
from runs.config import at_the_door, parse_config, require, run_script
from runs.folder import Run, Start, open_run
from runs.loop import Work, train
from runs.training import TrainingConfig
from sharding import Weights, prepare, refuse_unshardable
from tiny import TINY

# ------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Every field is a flag of the same name."""

    tiny_rates = (5e-3, 4e-3)  # Muon's, and AdamW's
    pretrained_rates = (1e-5, 1e-4)

    model: str = TINY
    """`tiny` (the built-in model, fresh weights), a model folder, or a name on the Hugging Face Hub."""
    output: str = "outputs/sft"
    max_completion_tokens: int = 1024
    """Examples with a longer completion are left out, and counted: a cut one would teach not to finish."""

    total_steps: int = 700
    """Optimizer steps."""
    examples_per_step: int = 64
    """Examples in a step, over all processes."""
    optimizer: OptimizerName | None = None
    """If not given: muon, which learns a model from nothing in far fewer steps, for the built-in one; adamw
    for any other and for adapters. adamw_8bit takes a quarter of its memory, and paged_adamw_8bit moves that
    out of a GPU's memory where it runs out."""
    learning_rate: float | None = None
    """The highest. If not given: 5e-3 for the built-in model, 1e-5 for any other (as in arXiv 2501.19393);
    for adapters 4e-3 and 1e-4."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 50
    weight_decay: float = 0.01

    eval_every: int = 350
    save_every: int = 350

    def __post_init__(self) -> None:
        """Fill the optimizer in, then refuse what cannot train."""
        super().__post_init__()
        if self.optimizer is None:
            is_whole_tiny = self.trains_tiny and not self.trains_adapter
            object.__setattr__(self, "optimizer", "muon" if is_whole_tiny else "adamw")
        require(self, "examples_per_step", "max_completion_tokens", at_least=1)


# ------------------------------------------------------------------------------------------------------------
# Examples


@dataclass(frozen=True)
class Example:
    """One example in tokens; the completion ends with the EOS."""

    prompt_ids: list[int]
    completion_ids: list[int]


def encode_examples(problems: list[Problem], tokenizer: Any, config: SFTConfig) -> tuple[list[Example], str]:
    """Tokenize the worked examples.

    Returns:
        The examples that fit, and a sentence that counts what was left out or cut and why.

    Raises:
        ValueError: nothing is left to train on; or prompts over the limit, and `on_long_prompt` is stop.
    """
    examples, overlong = [], 0
    worked = [problem for problem in problems if problem.completion is not None]
    fitting, told_long = fit_prompts(worked, tokenizer, config)
    for problem in fitting:
        prompt = render_prompt(tokenizer, problem.question)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        # What the template writes of the completion is the prompt's.
        completion = in_style(problem.completion, answer_style(prompt))
        completion = completion.removeprefix(completion_prefix(prompt))
        completion_ids = [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
        if len(completion_ids) > config.max_completion_tokens:
            overlong += 1
            continue
        examples.append(Example(prompt_ids, completion_ids))
    told = f"{len(problems)} problems, {len(examples)} worked examples"
    unworked = len(problems) - len(worked)
    told += f", {unworked} left out without a worked completion" if unworked else ""
    told += told_long + (f", {overlong} left out over max_completion_tokens" if overlong else "")
    if not examples:
        raise ValueError(f"data {config.data!r} leaves nothing to train on: {told}")
    return examples, told


# ------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class Training:
    """Everything that a step works with. Every process holds one.

    Attributes:
        config: of the run.
        accelerator: prepared policy and optimizer.
        tokenizer: of the policy.
        examples: to draw from.
        held_out: to evaluate on.
        engine: samples from the very weights that train.
        policy: as prepared.
        optimizer: as prepared.
        scheduler: of the learning rate.
        micro_batches: take rows through the policy.
        run: position, log, checkpoints.
        load: what a step puts through the model at most.
    """

    config: SFTConfig
    accelerator: Accelerator
    tokenizer: Any
    examples: list[Example]
    held_out: list[Problem]
    engine: TorchEngine
    policy: Any
    optimizer: Any
    scheduler: Any
    micro_batches: MicroBatches
    run: Run
    load: Load


def set_up(config: SFTConfig, start: Start, accelerator: Accelerator) -> Training:
    """Load and prepare everything, and go on where `start` says.

    Raises:
        UserError: what was asked for is not there, or does not fit.
    """
    with at_the_door():
        source = str(start.checkpoint or config.model)
        tokenizer = config.load_tokenizer(source)
        where = config.data_arguments()
        problems = load_problems(config.data, "cold_start", limit=config.limit, require_gold=False, **where)
        examples, told = encode_examples(problems, tokenizer, config)
        held_out = load_problems(config.data, "validation", **where) if config.eval_every else []
        held_out = held_out[: config.eval_limit]
        lengths = [(len(example.prompt_ids), len(example.completion_ids)) for example in examples]
        load = sft_load(config, lengths, accelerator.num_processes)
        check_memory(config, source, load, accelerator)
        model = config.load_model(source)
        policy = Policy(model)
        optimizer = make_optimizer(policy, config.optimizer, config.learning_rate, config.weight_decay)

    scheduler = make_scheduler(optimizer, config.lr_schedule, config.warmup_steps, config.total_steps)
    weights = Weights(accelerator, policy)
    policy, optimizer = prepare(accelerator, policy, optimizer)
    attend_fast(model)
    with weights.whole() as sampled:  # the model, or a copy of it
        attend_fast(sampled)
        engine = TorchEngine(sampled, tokenizer)
    run = Run(start, config, accelerator, weights, tokenizer, optimizer, scheduler)
    engine.check = run.stop.check
    run.log.console.say(f"cold start of {config.model} on {config.data}: {told}")
    tell(accelerator, check_template(tokenizer, engine.stop_token_ids.tolist()))
    micro_batches = MicroBatches(accelerator, config.micro_batch_tokens, run.memory.get("budget"), run.stop)
    return Training(
        *(config, accelerator, tokenizer, examples, held_out, engine),
        *(policy, optimizer, scheduler, micro_batches, run, load),
    )


def work(training: Training) -> AbstractContextManager[Work]:
    """What the loop needs of a training."""
    run, held_out = training.run, training.held_out
    greedy = SamplingParams(training.config.max_completion_tokens, temperature=0.0)

    def evaluate() -> None:
        asked = (training.accelerator, training.engine, training.tokenizer, held_out, greedy)
        with run.weights.whole(compute_dtype()):
            groups = hold_shared_exam(*asked)
        run.evaluated("validation", summarise(groups), canary_rows(held_out, groups))

    return nullcontext(Work(run, lambda: train_step(training), evaluate, evaluates_first=False))


def main(config: SFTConfig, accelerator: Accelerator | None = None) -> int:
    """Train; returns the exit code. For the automatic cold start `train_grpo` hands in its Accelerator."""
    is_stage = accelerator is not None
    with at_the_door():
        accelerator = accelerator or make_accelerator(config.tracker, config.output)
        refuse_unshardable(accelerator, config)
        start = open_run(config)
    if start.is_finished:
        accelerator.print(f"{start.folder} is finished: its model is {start.folder / 'final'}")
        return 0
    if config.dry_run:
        begin = partial(set_up, accelerator=accelerator)
        return dry_run(config, start, begin, partial(rehearse_sft, take_step=train_step))
    code = train(lambda start: work(set_up(config, start, accelerator)), start)
    if not is_stage:
        accelerator.end_training()
    return code


def train_step(training: Training) -> dict[str, float]:
    """One step: learn from the next examples, and tell of it. Returns its metrics."""
    config, accelerator, run = training.config, training.accelerator, training.run
    began = time.perf_counter()
    drawn = take(training.examples, config.seed, run.drawn, config.examples_per_step)
    run.seed_dropout()
    movers = (training.policy, training.optimizer, training.scheduler, training.micro_batches)
    metrics, cause = update(*movers, drawn, training.tokenizer.pad_token_id, config.max_grad_norm)
    run.memory["budget"] = training.micro_batches.memory
    run.step += 1
    run.drawn += config.examples_per_step
    metrics["time/update_s"] = time.perf_counter() - began
    metrics["memory/peak_mib"] = max(gather_object([peak_memory(accelerator.device) / 2**20]))
    run.tell(metrics)
    run.check_updates([cause], [asdict(example) for example in drawn])
    return metrics


def update(
    policy: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    micro_batches: MicroBatches,
    examples: list[Example],
    pad_token_id: int,
    max_grad_norm: float,
) -> tuple[dict[str, float], str | None]:
    """One optimizer step on this step's examples, of which every process takes its share.

    Returns:
        Its metrics, and why there was no step; None where there was.
    """
    accelerator = micro_batches.accelerator
    total_tokens = sum(len(example.completion_ids) for example in examples)
    share = examples[accelerator.process_index :: accelerator.num_processes]
    lengths = [(len(example.prompt_ids), len(example.completion_ids)) for example in share]
    losses: list[torch.Tensor] = []

    def restart() -> None:
        optimizer.zero_grad()
        losses.clear()

    def learn(rows: list[int], scale: float) -> None:
        batch = pad_batch(
            [share[i].prompt_ids for i in rows], [share[i].completion_ids for i in rows], pad_token_id
        )
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        weights = loss_weights(batch["completion_mask"], "token", total_tokens=total_tokens) * scale
        logprobs, _, _ = policy(**batch)
        loss = -(weights * logprobs).sum()
        accelerator.backward(loss * accelerator.num_processes)
        losses.append(loss.detach())

    policy.train()
    with averaged_gradients(accelerator, policy):
        micro_batches.run(lengths, range(len(share)), learn, restart)
    loss = float(accelerator.reduce(torch.stack(losses).sum()))
    grad_norm, cause = take_step(accelerator, policy, optimizer, scheduler, loss, max_grad_norm)
    metrics = {"train/bad_updates": int(cause is not None)}
    if cause is None:
        metrics |= {"policy/loss": loss, "policy/grad_norm": grad_norm}
    return metrics | {"policy/learning_rate": scheduler.get_last_lr()[0]}, cause


if __name__ == "__main__":
    run_script(main, lambda: parse_config(SFTConfig))
