"""What benchmarks do with what they measured: rows into a file, and plots."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_rows(rows: Sequence[dict[str, Any]], file: Path | None) -> None:
    """Write a row a line, where a file is asked for."""
    if file:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def require_matplotlib(file: Path | None) -> None:
    """Find out whether a plot that is asked for can be drawn: before anything is measured."""
    if file:
        import matplotlib

        matplotlib.use("Agg")
