"""Answers kept as they come: an evaluation that is stopped goes on where it was.

A line of `samples.jsonl` holds all answers to one problem and the key of how they were asked for: the model
and when its weights were written, the prompt's form, the sampling. Answers of another key are left alone, so
one folder may hold several evaluations, and an old answer is never taken for that of new weights in a folder.
What stands behind a server or a Hub name is not looked at.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data import Problem
from exam import Answer
from runs.lines import append_whole
from runs.records import read_rows

SAMPLES = "samples.jsonl"


def key_of(**asked: Any) -> str:
    """A short name for a way of asking."""
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).hexdigest()


def gaps(known: Sequence[int] | set[int], first: int, stop: int) -> Iterator[tuple[int, int]]:
    """The stretches of [first, stop) that are not known, each as (first, stop)."""
    begin = None
    for number in range(first, stop + 1):
        is_missing = number < stop and number not in known
        if is_missing and begin is None:
            begin = number
        elif not is_missing and begin is not None:
            yield begin, number
            begin = None


class AnswerBook:
    """The answers in a folder. Every process writes a file of its own and reads all."""

    def __init__(self, folder: Path | None, process: int = 0) -> None:
        """Open the book.

        Args:
            folder: with `samples.jsonl`, made where it is missing; None keeps nothing.
            process: number of this one.
        """
        self.folder = folder
        name = SAMPLES if process == 0 else SAMPLES.replace(".", f"-{process}.")
        self.file = folder / name if folder else None
        self.rows: list[dict[str, Any]] = []
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob("samples*.jsonl")):
                self.rows += read_rows(file)[0]
            if self.file.exists() and self.file.read_bytes()[-1:] not in (b"", b"\n"):
                append_whole(self.file, b"\n")  # a line that was cut off

    def known(self, key: str, problems: Sequence[Problem]) -> dict[int, list[Answer]]:
        """The answers of a key by the problem's number; only where the problem is still the same."""
        return {
            row["number"]: [Answer(**answer) for answer in row["answers"]]
            for row in self.rows
            if row.get("key") == key
            and row["number"] < len(problems)
            and row["question"] == problems[row["number"]].question
            and row["gold"] == problems[row["number"]].gold
        }

    def keep(self, key: str, number: int, problem: Problem, answers: Sequence[Answer], **told: Any) -> None:
        """Write the answers to a problem down.

        Raises:
            OSError: the disk does not take them.
        """
        row = {"key": key, **told, "number": number, "question": problem.question, "gold": problem.gold}
        row["answers"] = [asdict(answer) for answer in answers]
        if self.file:
            append_whole(self.file, (json.dumps(row, ensure_ascii=False) + "\n").encode())
