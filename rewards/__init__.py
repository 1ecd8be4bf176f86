"""Rewards: names to functions, and the one place that calls them.

A reward function has TRL's signature: `f(completions, **columns) -> list[float | None]`, with one entry a
completion. It gets the keyword arguments that it names, or all of them if it takes `**kwargs`: `prompts`,
`completions`, `completion_ids`, `group_size`, `max_completion_tokens`, `trainer_state` (`global_step` and
`max_steps`), `log_extra`, `log_metric`, `correct` (the judge's verdicts), `questions`, `gold`, and every
column of the dataset. `None` means "does not apply" and leaves the sum.
"""

import asyncio
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards import shaping
from rewards.extraction import candidates
from rewards.verify import Verdict, is_readable, judge

RewardFunction = Callable[..., Sequence[float | None]]

# What every function is given, whatever the data.
GIVEN = ("completions", "prompts", "questions", "completion_ids", "gold", "correct", "group_size")
# The columns that a verdict is made from.
JUDGED = ("gold", "numbers", "target")
DEFAULT_REWARDS = {"correct": 1.0, "format": 0.1, "repetition": -0.1}

BUILT_IN: dict[str, RewardFunction] = {
    "correct": shaping.correct,
    "countdown": shaping.countdown,
    "format": shaping.format_binary,
    "format_graded": shaping.format_graded,
    "steps": shaping.steps,
    "verification": shaping.verification,
    "repetition": shaping.repetition,
    "unique_characters": shaping.unique_characters,
    "length_target": shaping.length_target,
    "length_penalty": shaping.length_penalty,
    "soft_overlong": shaping.soft_overlong,
    "lead": shaping.lead,
}
# The least that options of built-in rewards may be.
COUNTS = {"wanted": 1, "n": 1, "target": 1, "budget": 1, "cache": 1, "min_length": 0}
_OPTIONS = re.compile(r"(.+?)\(([^()]*)\)")
_ALLOWED = (
    f"one of {', '.join(BUILT_IN)}; or file.py:function, model:NAME (a reward model), "
    "judge:URL (a model behind a server)"
)


class RewardError(Exception):
    """A reward function broke its promise: raised, returned the wrong length, or something that is no finite
    number. The message ends with what to do.
    """


@dataclass
class Reward:
    """One reward of a set.

    Attributes:
        name: as written in the configuration.
        weight: factor in the sum.
        function: None until the owner of a `model:` slot sets it.
        options: fixed keyword arguments; those of a `model:` slot are its owner's to read.
        model_name: NAME of `model:NAME`, empty for every other reward.
        patience_s: seconds that a call may take for each completion, on top of the scorer's deadline.
    """

    name: str
    weight: float
    function: RewardFunction | None
    options: dict[str, Any] = field(default_factory=dict)
    model_name: str = ""
    patience_s: float = 0.0


@dataclass
class RewardSet:
    """The chosen rewards, in the order of the configuration.

    Attributes:
        rewards: one for each name.
        spec: what they were parsed from.
    """

    rewards: list[Reward]
    spec: dict[str, float]

    @property
    def slots(self) -> list[Reward]:
        """The `model:NAME` rewards. Their owner sets `function`,
        always called in this process; see `model_name`.
        """
        return [reward for reward in self.rewards if reward.model_name]


@dataclass(frozen=True)
class Scores:
    """What the rewards say of some completions; every list has one entry a completion.

    Attributes:
        total: weighted sums; a part that is None adds nothing.
        parts: unweighted values by reward name.
        correct: the judge's verdicts; None where undecided, or where there is no gold.
        extracted: the answers that were judged.
        undecided: no verdict, or no value, within the time limit.
        metrics: numbers that functions logged by name.
        extra: values that they logged, one a completion.
    """

    total: list[float]
    parts: dict[str, list[float | None]]
    correct: list[bool | None]
    extracted: list[str | None]
    undecided: list[bool]
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------
# Names to functions


def parse_rewards(spec: Mapping[str, float] | None = None) -> RewardSet:
    """The rewards that a configuration names.

    Args:
        spec: weight by name; None is `DEFAULT_REWARDS`. A name is a built-in, `file.py:function`,
            `model:NAME` or `judge:URL`, with options in brackets: `length_penalty(budget=300)`.

    Raises:
        ValueError: unknown name, function or option, or a weight that is not a finite number.
    """
    spec = DEFAULT_REWARDS if spec is None else spec
    if not spec:
        raise ValueError(f"rewards is empty; name at least one: {_ALLOWED}")
    return RewardSet([_parse_reward(name, weight) for name, weight in spec.items()], dict(spec))


def _parse_reward(name: str, weight: float) -> Reward:
    if not _is_finite(weight) or isinstance(weight, bool):
        raise ValueError(f"rewards: the weight of {name!r} must be a finite number, got {weight!r}")
    match = _OPTIONS.fullmatch(name)
    base, options = (match.group(1), _parse_options(name, match.group(2))) if match else (name, {})
    if base.startswith("model:") and len(base) > len("model:"):
        return Reward(name, float(weight), None, options, base.removeprefix("model:"))
    if base.startswith("judge:"):
        from rewards.llm_judge import build_judge  # only where it is asked for

        check_options(name, build_judge, options)
        judge_by_server = build_judge(base.removeprefix("judge:"), **options)
        return Reward(name, float(weight), judge_by_server, patience_s=judge_by_server.patience_s)
    if base in BUILT_IN:
        function = BUILT_IN[base]
    elif ":" in base:
        function = _load_function(base)
    else:
        raise ValueError(f"rewards: unknown reward {name!r}; allowed: {_ALLOWED}")
    check_options(name, function, options)
    if base in BUILT_IN:
        _check_numbers(name, options)
    return Reward(name, float(weight), function, options)


def _check_numbers(name: str, options: dict[str, Any]) -> None:
    """The options of built-in rewards that count something count at least one."""
    for key, value in options.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in COUNTS and (not isinstance(value, int) or not is_number or value < COUNTS[key]):
            raise ValueError(
                f"rewards: {key} of {name!r} must be a whole number >= {COUNTS[key]}, got {value!r}"
            )
        if key == "alpha" and not (is_number and 0 <= value < math.inf):
            raise ValueError(f"rewards: alpha of {name!r} must be a number >= 0, got {value!r}")
        if key == "only_correct" and not isinstance(value, bool):
            raise ValueError(f"rewards: only_correct of {name!r} must be true or false, got {value!r}")


def _parse_options(name: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key.isidentifier():
            raise ValueError(f"rewards: options of {name!r} are written (key=value, …), got {item!r}")
        options[key] = _parse_value(value)
    return options


def _parse_value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def check_options(name: str, function: Callable, options: dict[str, Any]) -> None:
    """Refuse options of the reward `name` that are no keyword argument of a function.

    Raises:
        ValueError: names the option and those there are.
    """
    parameters = inspect.signature(function).parameters.values()
    allowed = [p.name for p in parameters if p.default is not p.empty]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in options:
        if key not in allowed and not takes_any:
            raise ValueError(
                f"rewards: {name!r} has no option {key!r}; allowed: {', '.join(allowed) or 'none'}"
            )
        if key in GIVEN:
            raise ValueError(f"rewards: {key!r} is given to {name!r} for each completion and is no option")


def _load_function(path_and_name: str) -> RewardFunction:
    file, _, function_name = path_and_name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(
            f"rewards: {path_and_name!r} names no reward and no file at {path.resolve()}; allowed: {_ALLOWED}"
        )
    module_name = f"reward_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"rewards: {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - a user's file may raise anything
        message = f"rewards: {path} could not be run: {type(error).__name__}: {error}"
        raise ValueError(f"{message}; mend it, or install what it imports") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise ValueError(
            f"rewards: {path} has no function {function_name!r}; it has: {', '.join(names) or 'none'}"
        )
    return function


def required_columns(reward: Reward) -> list[str]:
    """What a function must be told besides the completions: the arguments without a default of its signature.
    Empty for a slot without its function.
    """
    parameters = inspect.signature(reward.function).parameters if reward.function else {}
    return [
        name
        for name, p in parameters.items()
        if p.default is p.empty and "VAR" not in p.kind.name and name != "completions"
    ]


def needs_gold(reward_set: RewardSet) -> bool:
    """Does a chosen reward require gold answers? Without one, data of prompts alone is fine."""
    return any(
        {"gold", "correct"} & set(required_columns(reward)) or reward.options.get("only_correct") is True
        for reward in reward_set.rewards
    )


def fill_slots(reward_set: RewardSet, load: Callable[..., RewardFunction], device: Any) -> RewardSet:
    """Give the `model:NAME` rewards their functions; returns the set.

    Args:
        reward_set: from `parse_rewards`.
        load: takes a name, the device and the slot's options; `models.load_reward_model`.
        device: where reward models are held.

    Raises:
        ValueError: an option that `load` does not have, or a model that rewards nothing.
        FileNotFoundError: a reward model that is not there.
    """
    for slot in reward_set.slots:
        check_options(slot.name, load, slot.options)
        slot.function = load(slot.model_name, device, **slot.options)
    return reward_set


# -------------------------------------------------------------------------------------------------------
# Calling them


def score(reward_set: RewardSet, completions: list[str], columns: Mapping[str, Any]) -> Scores:
    """Score whole groups of completions, in prompt order.

    Args:
        reward_set: from `parse_rewards`, every slot filled.
        completions: plain strings, the prefilled `<think>` included.
        columns: `prompts`, `completion_ids`, `gold` and the dataset's columns, each as long as `completions`;
            plain numbers such as `group_size` and `max_completion_tokens` are handed on as they are.

    Raises:
        RewardError: a function raised, or returned something other than a finite number or None for each.
    """
    correct, extracted, undecided = judge_all(completions, columns)
    notes = Notes(len(completions))
    columns = {**columns, "correct": correct, **notes.columns}
    parts = {reward.name: call_reward(reward, completions, columns) for reward in reward_set.rewards}
    total = weighted_sum(reward_set, parts)
    return Scores(total, parts, correct, extracted, undecided, notes.metrics, notes.extra)


class Notes:
    """What functions log beside their values, through TRL's `log_metric` and `log_extra`."""

    def __init__(self, count: int) -> None:
        """Nothing yet, of `count` completions."""
        self.count = count
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}

    @property
    def columns(self) -> dict[str, Any]:
        """The two functions under their names, for those that ask for them."""
        return {"log_metric": self._log_metric, "log_extra": self._log_extra}

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self.count:
            raise ValueError(f"log_extra({column!r}) takes {self.count} values, got {len(values)}")
        # By type, not by family: a float of NumPy's is a float, and no checkpoint could be read with it.
        plain = (str, int, float, bool, type(None))
        kept = [float(value) if isinstance(value, float) else value for value in values]
        self.extra[column] = [value if type(value) in plain else str(value) for value in kept]


def judge_problem(
    completion: str, gold: str | None, columns: Mapping[str, Any], strict: bool = True
) -> Verdict | None:
    """The verdict by the problem's own rule; None where it has no gold.

    Args:
        completion: the whole text.
        gold: the reference answer.
        columns: the problem's other columns. With `numbers` and `target` (countdown) the answer must be an
            expression that makes the target of the numbers; the target itself proves nothing.
        strict: see `rewards.verify.judge`.
    """
    if _is_countdown(columns):
        solved = shaping.countdown([completion], [columns["numbers"]], [columns["target"]])[0] == 1.0
        answers = candidates(completion)
        return Verdict(solved, answers[-1] if answers else None, "countdown")
    return None if gold is None else judge(completion, gold, strict)


def can_judge(gold: str | None, columns: Mapping[str, Any]) -> bool:
    """Can answers to a problem be judged: by a rule of its own, or by a gold that the judge understands?"""
    return _is_countdown(columns) or (gold is not None and is_readable(gold))


def _is_countdown(columns: Mapping[str, Any]) -> bool:
    return columns.get("numbers") is not None and columns.get("target") is not None


def judge_all(completions: list[str], columns: Mapping[str, Any]) -> tuple[list, list, list]:
    """Verdict, extracted answer and "could not decide" of each completion; None and False without a gold."""
    nothing = [None] * len(completions)
    rows = zip(completions, *(columns.get(name) or nothing for name in JUDGED), strict=True)
    verdicts = [judge_problem(c, gold, {"numbers": n, "target": t}) for c, gold, n, t in rows]
    correct = [v.correct if v else None for v in verdicts]
    extracted = [v.extracted if v else None for v in verdicts]
    return correct, extracted, [bool(v) and v.correct is None for v in verdicts]


def weighted_sum(reward_set: RewardSet, parts: Mapping[str, list[float | None]]) -> list[float]:
    """The total of each completion; None adds nothing."""
    rows = zip(*(parts[reward.name] for reward in reward_set.rewards), strict=True)
    weights = [reward.weight for reward in reward_set.rewards]
    return [sum(w * v for w, v in zip(weights, row, strict=True) if v is not None) for row in rows]


def call_reward(reward: Reward, completions: list[str], columns: Mapping[str, Any]) -> list[float | None]:
    """Call one function with what its signature takes, and check what it returns.

    Raises:
        RewardError: see `score`; names the function, the sample and the value.
    """
    if reward.function is None:
        raise RewardError(f"reward {reward.name!r} was never given its function (see RewardSet.slots)")
    # Copies: a function that changes its arguments changes nothing for the next.
    arguments = {k: list(v) if isinstance(v, list) else v for k, v in _arguments(reward, columns).items()}
    try:
        values = reward.function(completions=list(completions), **arguments)
        if inspect.isawaitable(values):  # as TRL has them too
            values = asyncio.run(_wait(values))
    except RewardError:
        raise
    except ConnectionError as error:
        raise RewardError(f"reward {reward.name!r}: {error}. Start its server again") from error
    except Exception as error:  # noqa: BLE001 - whatever a user's function raises is reported under its name
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        raise RewardError(
            f"reward {reward.name!r} raised {type(error).__name__}: {error} ({place}) on "
            f"{_quote(completions)}. Mend the function"
        ) from error
    return _checked(reward.name, values, completions)


async def _wait(values: Any) -> Any:
    return await values


def _arguments(reward: Reward, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a function takes, and the options that were set for it."""
    parameters = inspect.signature(reward.function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # The options of a built-in are set by name alone: a dataset may have a column `target` of its own.
    is_built_in = reward.function in BUILT_IN.values()
    options = {name for name, p in parameters.items() if is_built_in and p.kind is p.KEYWORD_ONLY}
    arguments = {
        key: value
        for key, value in columns.items()
        if key != "completions" and key not in options and (takes_any or key in parameters)
    }
    if not reward.model_name:
        arguments.update(reward.options)
    for name in required_columns(reward):
        if name not in arguments:
            has = ", ".join(sorted(columns))
            raise RewardError(
                f"reward {reward.name!r} needs the column {name!r}; the data has: {has}. Mend either"
            )
    return arguments


def _checked(name: str, values: Any, completions: list[str]) -> list[float | None]:
    if hasattr(values, "tolist"):  # a NumPy array or a tensor
        values = values.tolist()
    if not isinstance(values, list | tuple) or len(values) != len(completions):
        got = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)[:80]
        raise RewardError(
            f"reward {name!r} must return a list of {len(completions)} numbers or None, got {got} for "
            f"{_quote(completions)}. Mend the function"
        )
    return [_checked_value(name, i, value, completions) for i, value in enumerate(values)]


def _checked_value(name: str, index: int, value: Any, completions: list[str]) -> float | None:
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0:  # a NumPy or tensor scalar
        value = value.item()
    if not _is_finite(value):
        raise RewardError(
            f"reward {name!r} returned {repr(value)[:80]} for sample {index}; allowed: a finite number or "
            f"None. The completion: {completions[index][:200]!r}. Mend the function"
        )
    return float(value)


def _is_finite(value: Any) -> bool:
    """A number that a float can hold."""
    try:
        return isinstance(value, bool | int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _quote(completions: list[str]) -> str:
    """The completions of a call, as far as a message has room for them."""
    first = f"{completions[0][:200]!r}" if completions else "nothing"
    return f"{len(completions)} completions, the first: {first}" if len(completions) > 1 else first
