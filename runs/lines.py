"""A run's text files, written whole; JSON lines, appended whole and cut back to what a checkpoint knew."""

import os
from pathlib import Path

LINES = ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl", "canaries.jsonl")


def write_whole(path: Path, text: str) -> None:
    """Write a file, or leave what stood there.

    Raises:
        OSError: the disk is full, or not ours to write.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_whole(path: Path, data: bytes) -> None:
    """Append all of the data, or nothing where the disk cannot take it.

    Raises:
        OSError: nothing was written.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def line_offsets(folder: Path) -> dict[str, int]:
    """How many bytes each of the run's JSONL files holds, to be kept in a checkpoint."""
    return {name: (folder / name).stat().st_size if (folder / name).exists() else 0 for name in LINES}


def cut_lines(folder: Path, offsets: dict[str, int]) -> None:
    """Cut the run's JSONL files back to the checkpoint's offsets: no step is told twice after a resume."""
    for name in LINES:
        path = folder / name
        if path.exists():
            with open(path, "r+b") as file:
                # Never longer: a file that a power cut left short would be filled up with zero bytes.
                file.truncate(min(offsets.get(name, 0), path.stat().st_size))
