"""Before a run: what would keep it from learning, at a cost of nothing, at every start.

Golds that nobody can read, prompts over the limit, what the chat template does, the memory that there is: a
line each, with what to change, where there is something to tell. `rehearsal` is for the rest.
"""

import math
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from data import Problem, load_problems
from plan import MIB, Load, plan_memory
from prompts import THINK_CLOSE, THINK_OPEN, completion_prefix, encode_prompt, render_prompt
from rewards import RewardSet, can_judge, needs_gold
from runs.watchdog import Finding

SHOWN = 3  # bad golds in a message
LOOKED_AT = 64  # texts among which the longest prompt is looked for

# ------------------------------------------------------------------------------------------------------------
# Problems


def choose_problems(config: Any, tokenizer: Any, reward_set: RewardSet) -> tuple[list[Problem], str]:
    """The problems to train on, and a sentence that counts those left out and why.

    A prompt over `max_prompt_tokens` is left out and never cut: half a question is another question.

    Args:
        config: a `train_grpo.GRPOConfig`.
        tokenizer: of the policy.
        reward_set: decides whether golds matter.

    Raises:
        ValueError: nothing is left; or golds that the verifier cannot read, and `on_bad_gold` stop.
    """
    gold = needs_gold(reward_set)
    problems = load_problems(
        config.data, "train", limit=config.limit, require_gold=gold, **config.data_arguments()
    )
    # A token is a byte at least: of most questions that is enough to know that they fit.
    room = config.max_prompt_tokens - len(encode_prompt(tokenizer, ""))
    fitting = [
        problem
        for problem in problems
        if len(problem.question.encode()) <= room
        or len(encode_prompt(tokenizer, problem.question)) <= config.max_prompt_tokens
    ]
    kept = [problem for problem in fitting if not gold or can_judge(problem.gold, problem.columns)]
    told = f"{len(problems)} problems"
    if len(fitting) < len(problems) or config.dry_run:
        told += f", {len(problems) - len(fitting)} left out over max_prompt_tokens"
    if len(kept) < len(fitting):
        told += f", {_count_bad_golds(config, fitting, kept)}"
    if not kept:
        raise ValueError(
            f"data {config.data!r} leaves nothing to train on: {told}; raise --max_prompt_tokens"
        )
    return kept, told


def _count_bad_golds(config: Any, problems: list[Problem], readable: list[Problem]) -> str:
    """Count and list the golds that the verifier cannot read, or stop at them, as the user says."""
    known = {id(problem) for problem in readable}
    bad = [problem.gold for problem in problems if id(problem) not in known]
    shown = ", ".join(repr(str(gold)[:60]) for gold in bad[:SHOWN]) + ", ..." * (len(bad) > SHOWN)
    # Where most are bad, the column is.
    if config.on_bad_gold == "stop" or len(bad) > len(problems) / 2:
        raise ValueError(
            f"data {config.data!r}: the verifier cannot read {len(bad)} of {len(problems)} golds ({shown}); "
            "mend them, name another --answer_column, or choose rewards that need no gold; up to half of "
            "them may be left out with --on_bad_gold skip"
        )
    return f"{len(bad)} left out with golds that the verifier cannot read ({shown})"


# ------------------------------------------------------------------------------------------------------------
# Every start


def longest(texts: Sequence[str], count: int = LOOKED_AT) -> list[str]:
    """The longest texts, in bytes."""
    return sorted(texts, key=lambda text: len(text.encode()))[-count:]


def grpo_load(config: Any, tokenizer: Any, problems: list[Problem], processes: int) -> Load:
    """What a step of `train_grpo` puts through the model at most."""
    questions = longest([problem.question for problem in problems])
    share = config.prompts_per_step // processes * config.group_size
    examined = math.ceil(config.eval_limit / processes) if config.eval_every else 0
    return Load(
        prompt=max(len(encode_prompt(tokenizer, question)) for question in questions),
        completion=config.max_completion_tokens,
        limit=config.max_completion_tokens,
        group_size=config.group_size,
        rows=share // config.updates_per_rollout,
        sampled=max(share, examined),
    )


def sft_load(config: Any, lengths: Sequence[tuple[int, int]], processes: int) -> Load:
    """What a step of `train_sft` puts through the model at most; `lengths` are its examples'."""
    prompts, completions = zip(*lengths, strict=True)
    return Load(
        prompt=max(prompts),
        completion=max(completions),
        limit=config.max_completion_tokens,
        group_size=1,
        rows=math.ceil(config.examples_per_step / processes),
        sampled=math.ceil(config.eval_limit / processes) if config.eval_every else 0,
    )


def check_memory(config: Any, source: str, load: Load, accelerator: Accelerator) -> None:
    """Compare what a run will hold with what is free, before it is loaded: in a dry run the whole table, else
    a line where it does not fit.

    Args:
        config: of the script.
        source: the model, or the checkpoint that is gone on from.
        load: of a step.
        accelerator: of the run.
    """
    plan = plan_memory(config, source, load, accelerator.device, accelerator.num_processes)
    if config.dry_run:
        accelerator.print(plan)
    if plan.peak <= plan.free:
        return
    needed = plan.peak
    remedy = "--gradient_checkpointing true, or a smaller --micro_batch_tokens"
    if plan.held > plan.free:
        needed = plan.held
        remedy = "--lora_rank 16, --quantize nf4, --optimizer adamw_8bit, or a smaller model"
    text = f"a step takes {needed / MIB:,.0f} MiB, and {plan.free / MIB:,.0f} are free: {remedy}"
    tell(accelerator, [Finding("memory", text)])


def check_template(tokenizer: Any, stop_token_ids: Sequence[int]) -> list[Finding]:
    """What a tokenizer and its chat template do that surprises people.

    Args:
        tokenizer: prepared.
        stop_token_ids: that end a completion.
    """
    found = {}
    prompt, end = render_prompt(tokenizer, ""), turn_end(tokenizer)
    if completion_prefix(prompt):
        found["prefilled_think"] = (
            f"the chat template opens {THINK_OPEN} itself; completions are read with it in front"
        )
    if prompt.rstrip().endswith(THINK_CLOSE):
        found["closed_think"] = (
            f"the chat template closes {THINK_CLOSE} before the model begins, so that no completion is well "
            "formed; give a template that leaves the thought to the model, or --rewards without format"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        found["pad_is_eos"] = (
            f"padding is the EOS {tokenizer.eos_token!r}; harmless here, as masks come from lengths"
        )
    if end.strip() and not set(stop_token_ids) & set(tokenizer.encode(end, add_special_tokens=False)):
        stops = ", ".join(tokenizer.convert_ids_to_tokens(list(stop_token_ids)))
        found["eos_unreachable"] = (
            f"the chat template ends a turn with {end.strip()!r}, and a completion ends with {stops}: a "
            "model trained on the template never ends one; set eos_token in tokenizer_config.json"
        )
    return [Finding(*finding) for finding in found.items()]


def turn_end(tokenizer: Any) -> str:
    """What the chat template writes behind a completion; empty where it does not write the completion."""
    said = "forty-two"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    _, is_there, end = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(said)
    return end if is_there else ""


def tell(accelerator: Accelerator, findings: list[Finding]) -> None:
    """Print findings, a line each."""
    for finding in findings:
        accelerator.print(f"preflight: {finding.cause}: {finding.text}")
