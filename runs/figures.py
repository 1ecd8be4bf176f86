"""Figures as people read them."""

import math

LARGEST = 1e30  # a value beyond it is no reading; sums of such values overflow


def is_reading(value: float) -> bool:
    """Is it a number that can be drawn and added?"""
    return math.isfinite(value) and abs(value) < LARGEST


def number(value: float, shares: bool = False) -> str:
    """A value in a few characters; a share as a percentage."""
    if shares:
        return f"{100 * value:.3g}%"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{float(f'{value:.4g}'):g}".replace("-", "−")
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: int, noun: str) -> str:
    """A number of things, the noun in its form."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
