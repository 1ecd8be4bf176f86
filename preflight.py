"""Before a run: what would keep it from learning, at a cost of nothing, at every start.

Golds that nobody can read, prompts over the limit, what the chat template does, the memory that there is: a
line each, with what to change, where there is something to tell. `rehearsal` is for the rest.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from data import Problem, load_problems
from plan import MIB, Load, plan_memory
from prompts import (
    BASE_TEMPLATE,
    PREPARED_MARK,
    THINK_CLOSE,
    THINK_OPEN,
    completion_prefix,
    encode_prompt,
    render_prompt,
)
from rewards import RewardSet, can_judge, needs_gold
from runs.watchdog import Finding
from sharding import division_of

SHOWN = 3  # bad golds in a message
LOOKED_AT = 64  # texts among which the longest prompt is looked for

# ------------------------------------------------------------------------------------------------------------
# Problems


def choose_problems(config: Any, tokenizer: Any, reward_set: RewardSet) -> tuple[list[Problem], str]:
    """The problems to train on, and a sentence that counts those left out or cut and why.

    Args:
        config: a `train_grpo.GRPOConfig`.
        tokenizer: of the policy.
        reward_set: decides whether golds matter.

    Raises:
        ValueError: nothing is left; or golds that the verifier cannot read or prompts over the limit, and
            `on_bad_gold` or `on_long_prompt` stop.
    """
    gold = needs_gold(reward_set)
    problems = load_problems(
        config.data, "train", limit=config.limit, require_gold=gold, **config.data_arguments()
    )
    fitting, told_long = fit_prompts(problems, tokenizer, config)
    kept = [problem for problem in fitting if not gold or can_judge(problem.gold, problem.columns)]
    told = f"{len(problems)} problems{told_long}"
    if len(kept) < len(fitting):
        told += f", {_count_bad_golds(config, fitting, kept)}"
    if not kept:
        raise ValueError(
            f"data {config.data!r} leaves nothing to train on: {told}; raise --max_prompt_tokens"
        )
    return kept, told


def fit_prompts(problems: list[Problem], tokenizer: Any, config: Any) -> tuple[list[Problem], str]:
    """The problems with the prompts over `max_prompt_tokens` left out or cut, as `on_long_prompt` says, and
    what to tell of these; empty where there are none, except in a dry run.

    Raises:
        ValueError: there are some, and `on_long_prompt` is stop; or nothing can be cut, as the system prompt
            and the template alone are over the limit.
    """
    limit, choice = config.max_prompt_tokens, config.on_long_prompt
    frame = len(encode_prompt(tokenizer, ""))
    # A token is a byte at least: of most questions that is enough to know that they fit.
    over = {
        index: tokens
        for index, problem in enumerate(problems)
        if len(problem.question.encode()) > limit - frame
        and (tokens := len(encode_prompt(tokenizer, problem.question))) > limit
    }
    if over and choice == "stop":
        raise ValueError(
            f"data {config.data!r}: {len(over)} of {len(problems)} prompts are over max_prompt_tokens {limit}"
            f", the longest has {max(over.values())}; give more, or --on_long_prompt drop or cut"
        )
    if over and choice == "cut":
        if frame >= limit:
            raise ValueError(
                f"max_prompt_tokens must be > {frame}, which the system prompt and the chat template take, "
                f"got {limit}; a question cannot be cut to nothing"
            )
        fitting = [
            replace(problem, question=cut_question(tokenizer, problem.question, limit))
            if index in over
            else problem
            for index, problem in enumerate(problems)
        ]
    else:
        fitting = [problem for index, problem in enumerate(problems) if index not in over]
    done = "cut to their end" if choice == "cut" else "left out"
    return fitting, f", {len(over)} {done} over max_prompt_tokens" if over or config.dry_run else ""


def cut_question(tokenizer: Any, question: str, limit: int) -> str:
    """The longest end of a question whose prompt has at most `limit` tokens; it begins with a whole word, if
    the last one fits.
    """

    def fits(start: int) -> bool:
        return len(encode_prompt(tokenizer, question[start:])) <= limit

    words = [word.start() for word in re.finditer(r"\S+", question)]
    for starts in (words, range(words[-1], len(question))):
        place = bisect_left(starts, True, key=fits)
        # A shorter end may have a token more, where it parts a word otherwise.
        while place < len(starts) and not fits(starts[place]):
            place += 1
        if place < len(starts):
            return question[starts[place] :]
    return ""


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
    division = division_of(accelerator)
    plan = plan_memory(config, source, load, accelerator.device, accelerator.num_processes, division)
    if config.dry_run:
        accelerator.print(plan)
    if plan.peak <= plan.free:
        return
    needed = plan.peak
    remedy = "--gradient_checkpointing true, or a smaller --micro_batch_tokens"
    if plan.held > plan.free:
        needed = plan.held
        smaller = "more processes" if division else "--quantize nf4, --optimizer adamw_8bit"
        remedy = f"--lora_rank 16, {smaller}, or a smaller model"
    text = f"a step takes {needed / MIB:,.0f} MiB, and {plan.free / MIB:,.0f} are free: {remedy}"
    tell(accelerator, [Finding("memory", text)])


def check_template(tokenizer: Any, stop_token_ids: Sequence[int]) -> list[Finding]:
    """What a tokenizer and its chat template do that surprises people.

    Args:
        tokenizer: prepared.
        stop_token_ids: that end a completion.
    """
    found = {}
    if tokenizer.chat_template.rpartition(PREPARED_MARK)[2].startswith(BASE_TEMPLATE):
        found["plain_template"] = (
            "the model brings no chat template, or --plain_template is given: questions are asked as plain "
            "text, User: ... Assistant: ..."
        )
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
