"""Plain numbers, compared exactly: decimals of any length,
fractions, mixed numbers, percentages, money and units.

Decimals are compared as digits, so nothing here depends on the size of a number; a `Fraction` is made only
of numbers short enough to be cheap.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from rewards.units import CURRENCY, SCALES, read_unit, same_unit

# Far below Python's own limit for int(text), which a caller may lower to 640.
MAX_DIGITS = 400
MAX_EXPONENT = 400

_INTEGER = re.compile(r"-?[0-9]{1,18}")
# Sign, currency, sign (`-$5`, `$-5`), whole part with or without separators, decimals, scientific exponent,
# the rest.
_DECIMAL = re.compile(
    r"([-+]?)\s*+(?:\\?([$€£¥₹]|USD|EUR|Rs\.?)\s*+)?([-+]?)\s*+"
    r"([0-9]{1,3}(?:(?:,|\{,\}|\\,|\\!|,\\!|\\!,|\\ | |~)[0-9]{3})++(?![0-9])|[0-9]++)?(?:\.([0-9]*+))?"
    r"(?:[eE]([-+]?[0-9]++)|\s*+(?:\\times|\\cdot|[*×x])\s*+10\s*+(?:\^|\*\*)\s*+(?:\{\s*+([-+]?[0-9]++)\s*+\}|([-+]?[0-9]++)))?"
    r"(.*+)",
    re.DOTALL,
)
_SCALE = re.compile(rf"(?:\\text\{{)?\s*+({'|'.join(SCALES)})(?![a-z])\s*+\}}?+", re.IGNORECASE)
_FRACTION = re.compile(
    r"([-+]?)\s*+(?:([0-9]++)[ ]++)?([0-9]++)\s*+/\s*+([0-9]++)(?![0-9.^])(.*+)", re.DOTALL
)
_NOT_DIGITS = re.compile(r"[^0-9]")


class Quantity(NamedTuple):
    """A number as it was written.

    Attributes:
        digits: (negative, whole digits, decimal digits), without idle zeros; None for a fraction, or where
        scaled. fraction: the exact value; None where it is too long for arithmetic, or not needed yet.
        places: digits after the point as written, None where it was not a decimal. unit: normalised name,
        "%" for a percentage, "" for none.
    """

    digits: tuple[bool, str, str] | None
    fraction: Fraction | None
    places: int | None
    unit: str

    @property
    def value(self) -> Fraction | None:
        """The exact value of the written number (percent signs not applied); None where it is too long."""
        if self.fraction is not None or self.digits is None:
            return self.fraction
        negative, whole, decimals = self.digits
        if len(whole) + len(decimals) > MAX_DIGITS:
            return None
        value = Fraction(int(whole + decimals or "0"), 10 ** len(decimals))
        return -value if negative else value


def read_number(text: str) -> Quantity | None:
    """The number that the whole text is, with its unit; None where the text is not a plain number."""
    if _INTEGER.fullmatch(text):
        negative = text[0] == "-"
        return Quantity(_canonical(negative, text[1:] if negative else text, ""), None, None, "")
    if "/" in text:
        quantity = _read_fraction(text)
        if quantity:
            return quantity
    return _read_decimal(text)


def _canonical(negative: bool, whole: str, decimals: str) -> tuple[bool, str, str]:
    whole, decimals = whole.lstrip("0"), decimals.rstrip("0")
    return (negative and bool(whole or decimals), whole, decimals)


def _read_decimal(text: str) -> Quantity | None:
    match = _DECIMAL.fullmatch(text)
    sign, currency, inner_sign, whole, decimals, exponent, braced, bare, rest = match.groups()
    if not whole and not decimals:
        return None
    if sign and inner_sign:
        return None
    whole = _NOT_DIGITS.sub("", whole or "")
    negative = "-" in (sign, inner_sign)
    unit = ""
    if rest and rest != ".":
        word = _SCALE.match(rest)
        if word and exponent is None:
            exponent, rest = str(SCALES[word.group(1).lower()]), rest[word.end() :]
        unit = read_unit(rest, bool(currency))
        if unit is None:
            return None
    if currency:
        name = CURRENCY.get(currency) or read_unit(f" {currency}")
        if not same_unit(name, unit.partition("/")[0]):
            return None
        unit = unit if unit.startswith(name) else name + unit
    places = None if decimals is None else len(decimals)
    digits = _canonical(negative, whole, decimals or "")
    exponent = exponent or braced or bare
    if exponent is None:
        return Quantity(digits, None, places, unit)
    value = Quantity(digits, None, None, "").value
    if value is None or len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    return Quantity(None, value * Fraction(10) ** int(exponent), None, unit)


def _read_fraction(text: str) -> Quantity | None:
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    sign, whole, top, bottom, rest = match.groups()
    unit = read_unit(rest.removesuffix("."))
    if unit is None or len(text) > MAX_DIGITS or not bottom.strip("0"):
        return None
    value = Fraction(int(top), int(bottom))
    if whole:
        if value >= 1:
            return None
        value += int(whole)
    return Quantity(None, -value if sign == "-" else value, None, unit)


def same_number(answer: Quantity, gold: Quantity, rounding: bool = True) -> bool:
    """Is it the same quantity? Exact, but for a gold that
    is itself a rounded decimal (see `within_rounding`).

    A unit that one side leaves out is no difference; two different units are. A percentage equals its value
    (50% and 0.5), and the same figure with the sign left out, where that figure could not be meant as a
    share (50% and 50).

    Args:
        answer: untrusted.
        gold: the truth.
        rounding: False compares exactly whatever the gold.
    """
    if not rounding:
        gold = gold._replace(places=None)
    if not same_unit(answer.unit, gold.unit):
        return False
    if (answer.unit == "%") == (gold.unit == "%"):
        return _same_figure(answer, gold)
    figure = gold.value
    if figure is not None and abs(figure) >= 1 and _same_figure(answer, gold):
        return True
    return _same_figure(_share(answer), _share(gold))


def _share(quantity: Quantity) -> Quantity:
    if quantity.unit != "%" or quantity.value is None:
        return quantity
    places = None if quantity.places is None else quantity.places + 2
    return Quantity(None, quantity.value / 100, places, "")


def _same_figure(answer: Quantity, gold: Quantity) -> bool:
    if answer.digits and gold.digits:
        if answer.digits == gold.digits:
            return True
        if not gold.places:
            return False
    answer_value, gold_value = answer.value, gold.value
    if answer_value is None or gold_value is None:
        return False
    return answer_value == gold_value or within_rounding(answer_value, gold_value, gold.places)


def within_rounding(answer: Fraction, gold: Fraction, places: int | None) -> bool:
    """Could the gold, written with this many decimals, be the
    answer rounded? Half a unit of its last digit, no more.

    A gold with a single significant digit (0.5) is taken as exact: half a unit would be a tenth of its value
    or more.
    """
    if not places or abs(gold) * 10**places < 10:
        return False
    return 2 * abs(answer - gold) * 10**places <= 1
