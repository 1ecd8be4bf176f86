"""Scores groups in worker processes while generation goes on.

A group is handed in as soon as its completions are done and judged in the background; results come back in
the order in which the groups went in. Three outcomes: a value; undecided (the judge or a function ran out of
time: no value, counted, and never taken for wrong); and a crash of a function, which stops the run with its
name (`RewardError`).
"""

import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rewards import (
    JUDGED,
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
_JUDGE = "judge"

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
            deadline_s: wall-clock seconds for one function on one group.
        """
        if workers < 1 or deadline_s <= 0:
            raise ValueError(f"workers and deadline_s must be positive, got {workers} and {deadline_s}")
        self.reward_set = reward_set
        self.deadline_s = deadline_s
        self._children = [Child("rewards.scorer") for _ in range(workers)]
        self._idle = list(self._children)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="scorer")
        self._pending: list[Future[_Scored]] = []

    def submit(self, completions: list[str], columns: Mapping[str, Any]) -> None:
        """Hand in one group (or several); returns at once. Arguments as for `rewards.score`."""
        self._pending.append(self._pool.submit(self._score, list(completions), dict(columns)))

    def results(self) -> list[Scores]:
        """Wait for every group handed in since the last call; in that order.

        Raises:
            RewardError: of the first group whose function broke its promise.
        """
        pending, self._pending = self._pending, []
        try:
            return [self._with_slots(*future.result()) for future in pending]
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """End the workers; what was not collected is lost."""
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
        finally:
            self._idle.append(child)

    def _score_with(self, child: Child, completions: list[str], columns: dict[str, Any]) -> Scores:
        count = len(completions)
        judged = self._ask(child, _JUDGE, completions, {name: columns.get(name) for name in JUDGED})
        if judged is None:
            has_gold = [gold is not None for gold in columns.get("gold") or [None] * count]
            judged = [None] * count, [None] * count, has_gold
        correct, extracted, undecided = judged
        columns["correct"] = correct
        parts: dict[str, list[float | None]] = {}
        for reward in self.reward_set.rewards:
            values: list[float | None] | None = [None] * count
            if reward not in self.reward_set.slots:
                values = self._ask(child, reward.name, completions, columns)
            if values is None:
                values, undecided = [None] * count, [True] * count
            parts[reward.name] = values
        return Scores(weighted_sum(self.reward_set, parts), parts, correct, extracted, undecided)

    def _ask(self, child: Child, name: str, completions: list[str], columns: dict[str, Any]) -> Any:
        """The worker's answer, None where it took too long."""
        try:
            failed, answer = child.request(
                (self.reward_set.spec, name, completions, columns), self.deadline_s
            )
        except OutOfTime:
            print(f"reward {name!r} took longer than {self.deadline_s:g} s: undecided", file=sys.stderr)
            return None
        except ChildDied as error:
            raise RewardError(f"reward {name!r} ended its worker process ({error})") from error
        if failed:
            raise RewardError(answer)
        return answer


# -------------------------------------------------------------------------------------------------------
# The worker's side

_parsed: dict[str, RewardSet] = {}


def _answer(message: Any) -> tuple[bool, Any]:
    spec, name, completions, columns = message
    try:
        if name == _JUDGE:
            return False, judge_all(completions, columns)
        key = repr(spec)
        if key not in _parsed:
            _parsed[key] = parse_rewards(spec)
        reward = next(reward for reward in _parsed[key].rewards if reward.name == name)
        return False, call_reward(reward, completions, columns)
    except (RewardError, ValueError) as error:
        return True, str(error)


def main() -> None:
    """Run the worker."""
    serve(_answer)
