"""Scores groups in worker processes while generation goes on.

A group is handed in as soon as its completions are done and judged in the background; results come back in
the order in which the groups went in. Three outcomes: a value; undecided (the judge or a function ran out of
time: no value, counted, and never taken for wrong); and a crash of a function, which stops the run with its
name (`RewardError`).
"""

import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rewards import (
    Notes,
    RewardError,
    RewardSet,
    Scores,
    call_reward,
    judge_all,
    parse_rewards,
    weighted_sum,
)
from rewards.processes import Child, ChildDied, OutOfTime, serve

# Long enough for a whole group of slow but honest judgements; a function that needs more hangs.
DEADLINE_S = 60.0
JUDGE = "judge"  # stands first among the names that a worker is asked for
NOTES = "notes"  # under which it tells what functions logged

_Scored = tuple[Scores, list[str], dict[str, Any]]


class Scorer:
    """A pool of killable workers around a `RewardSet`. Use it as a context manager, or `close` it.

    Functions of `model:` slots hold a model of the caller's: they run in `results`, in the thread that calls
    it.
    """

    def __init__(self, reward_set: RewardSet, workers: int = 1, deadline_s: float = DEADLINE_S) -> None:
        """Workers start with the first group.

        Args:
            reward_set: the workers parse its specification again.
            workers: processes; functions that remember things between calls want 1.
            deadline_s: wall-clock seconds for a group. One that takes longer is asked again function by
                function, each with as long, and those that answer in time count.
        """
        if workers < 1 or deadline_s <= 0:
            raise ValueError(f"workers and deadline_s must be positive, got {workers} and {deadline_s}")
        self.reward_set = reward_set
        self.deadline_s = deadline_s
        self._children = [Child("rewards.scorer") for _ in range(workers)]
        self._idle = list(self._children)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="scorer")
        self._pending: list[Future[_Scored]] = []
        self._patience_s = {JUDGE: 0.0} | {
            r.name: r.patience_s for r in reward_set.rewards if not r.model_name
        }
        self._broken: RewardError | None = None
        self._is_closed = False
        self.waited_s = 0.0  # that `results` took, in all

    def submit(self, completions: list[str], columns: Mapping[str, Any]) -> None:
        """Hand in one group (or several); returns at once. Arguments as for `rewards.score`.

        Raises:
            RewardError: of an earlier group, so that no more are sampled in vain.
        """
        if self._broken:
            raise self._broken
        self._pending.append(self._pool.submit(self._score, list(completions), dict(columns)))

    def results(self) -> list[Scores]:
        """Wait for every group handed in since the last call; in that order.

        Raises:
            RewardError: of the first group whose function broke its promise.
        """
        pending, self._pending = self._pending, []
        began = time.perf_counter()
        try:
            return [self._with_slots(*future.result()) for future in pending]
        finally:
            self.waited_s += time.perf_counter() - began
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the workers; what was not collected is lost."""
        self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _with_slots(self, scores: Scores, completions: list[str], columns: dict[str, Any]) -> Scores:
        if not self.reward_set.slots:
            return scores
        parts = dict(scores.parts)
        for reward in self.reward_set.slots:
            parts[reward.name] = call_reward(reward, completions, columns)
        return replace(scores, parts=parts, total=weighted_sum(self.reward_set, parts))

    def _score(self, completions: list[str], columns: dict[str, Any]) -> _Scored:
        child = self._idle.pop()  # as many threads as children: there is always one
        try:
            return self._score_with(child, completions, columns), completions, columns
        except RewardError as error:
            self._broken = error
            raise
        finally:
            self._idle.append(child)

    def _score_with(self, child: Child, completions: list[str], columns: dict[str, Any]) -> Scores:
        try:
            answers = self._ask(child, list(self._patience_s), completions, columns)
        except (OutOfTime, ChildDied):
            if self._is_closed:  # it was `close` that ended the worker
                raise
            answers = self._ask_one_by_one(child, completions, columns)
        nothing = [None] * len(completions)
        is_judged = [gold is not None for gold in columns.get("gold") or nothing]
        columns["correct"], extracted, undecided = answers.get(JUDGE, (nothing, nothing, is_judged))
        if not self._patience_s.keys() <= answers.keys():
            undecided = [True] * len(completions)
        parts = {reward.name: answers.get(reward.name, nothing) for reward in self.reward_set.rewards}
        metrics, extra = answers.get(NOTES, ({}, {}))
        total = weighted_sum(self.reward_set, parts)
        return Scores(total, parts, columns["correct"], extracted, undecided, metrics, extra)

    def _ask_one_by_one(
        self, child: Child, completions: list[str], columns: dict[str, Any]
    ) -> dict[str, Any]:
        """What each says that answers in time; tells which it was that does not, or ends its worker."""
        answers: dict[str, Any] = {}
        columns = {**columns, "correct": [None] * len(completions)}
        for name in self._patience_s:
            try:
                said = self._ask(child, [name], completions, columns)
                for noted, new in zip(answers.setdefault(NOTES, ({}, {})), said.pop(NOTES), strict=True):
                    noted.update(new)
                answers |= said
            except OutOfTime:
                limit_s = self.deadline_s + self._patience_s[name] * len(completions)
                print(f"reward {name!r} took longer than {limit_s:g} s: undecided", file=sys.stderr)
            except ChildDied as error:
                raise RewardError(
                    f"reward {name!r} ended its worker process ({error}). Mend the function"
                ) from error
            if name == JUDGE and name in answers:
                columns["correct"] = answers[name][0]
        return answers

    def _ask(
        self, child: Child, names: list[str], completions: list[str], columns: dict[str, Any]
    ) -> dict[str, Any]:
        """What the worker says under each name."""
        limit_s = self.deadline_s + sum(self._patience_s[name] for name in names) * len(completions)
        failed, answer = child.request((self.reward_set.spec, names, completions, columns), limit_s)
        if failed:
            raise RewardError(answer)
        return answer


# -------------------------------------------------------------------------------------------------------
# The worker's side

_parsed: dict[str, RewardSet] = {}


def _answer(message: Any) -> tuple[bool, Any]:
    """Whether a function broke its promise, and what it says then; else what each name says."""
    spec, names, completions, columns = message
    answers: dict[str, Any] = {}
    try:
        key = repr(spec)
        if key not in _parsed:
            _parsed[key] = parse_rewards(spec)
        rewards = {reward.name: reward for reward in _parsed[key].rewards}
        notes = Notes(len(completions))
        columns.update(notes.columns)
        for name in names:
            if name == JUDGE:
                answers[JUDGE] = judge_all(completions, columns)
                columns["correct"] = answers[JUDGE][0]
            else:
                answers[name] = call_reward(rewards[name], completions, columns)
    except (RewardError, ValueError) as error:
        return True, str(error)
    return False, answers | {NOTES: (notes.metrics, notes.extra)}


def main() -> None:
    """Run the worker."""
    serve(_answer)
