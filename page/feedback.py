"""What visitors like and dislike, and conversations to take along: JSON lines that `train_sft.py` takes."""

import json
from collections.abc import Sequence
from pathlib import Path

from inference.chat import Turn
from runs.lines import append_whole


def example(turn: Turn) -> dict[str, str]:
    """A turn as a worked example."""
    return {"question": turn.question, "completion": turn.reading.text, "model": turn.model}


def lines(turns: Sequence[Turn]) -> str:
    """The turns that were answered to the end, a line each."""
    rows = [example(turn) for turn in turns if turn.reading and turn.reading.finish_reason == "stop"]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def keep(folder: Path, liked: bool, turn: Turn) -> Path:
    """Add a turn to `liked.jsonl` or `disliked.jsonl`; returns the file.

    Raises:
        OSError: the folder cannot be written.
    """
    file = folder / ("liked.jsonl" if liked else "disliked.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    append_whole(file, (json.dumps(example(turn), ensure_ascii=False) + "\n").encode())
    return file
