"""What benchmarks do with what they measured: rows into a file, and plots."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_rows(rows: Sequence[dict[str, Any]], file: Path | None) -> None:
    """Write a row a line, where a file is asked for."""
    if file:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def in_turn(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """`ratio`, the median quotient of what two sides measured in turn, and `ratios`, the least and the most.

    A machine that others use drifts by more than the sides differ: only neighbours are compared.
    """
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return {"ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}


def require_matplotlib(file: Path | None) -> None:
    """Find out whether a plot that is asked for can be drawn: before anything is measured."""
    if file:
        import matplotlib

        matplotlib.use("Agg")
