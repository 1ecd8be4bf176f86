"""Plain numbers, compared exactly: decimals of any length,
fractions, mixed numbers, percentages, money and units.

Decimals are compared as digits, so nothing here depends on the size of a number; a `Fraction` is made only
of numbers short enough to be cheap.
"""

import re
from fractions import Fraction
from typing import NamedTuple

# Far below Python's own limit for int(text), which a caller may lower to 640.
MAX_DIGITS = 400
MAX_EXPONENT = 400

_CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}

_INTEGER = re.compile(r"-?[0-9]{1,18}")
# Sign, currency, sign (`-$5`, `$-5`), whole part with or without separators, decimals, scientific exponent,
# the rest.
_DECIMAL = re.compile(
    r"([-+]?)\s*+(?:\\?([$€£¥₹])\s*+)?([-+]?)\s*+"
    r"([0-9]{1,3}(?:(?:,|\{,\}|\\,|\\!|,\\!|\\!,|\\ | |~)[0-9]{3})++(?![0-9])|[0-9]++)?(?:\.([0-9]*+))?"
    r"(?:[eE]([-+]?[0-9]++)|\s*+(?:\\times|\\cdot|\*)\s*+10\s*+(?:\^|\*\*)\s*+(?:\{\s*+([-+]?[0-9]++)\s*+\}|([-+]?[0-9]++)))?"
    r"(.*+)",
    re.DOTALL,
)
_FRACTION = re.compile(
    r"([-+]?)\s*+(?:([0-9]++)[ ]++)?([0-9]++)\s*+/\s*+([0-9]++)(?![0-9.^])(.*+)", re.DOTALL
)
_NOT_DIGITS = re.compile(r"[^0-9]")

_MACRO_TEXT = re.compile(
    r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname|rm)\s*+\{([^{}]*+)\}"
)
_UNIT = re.compile(r"([A-Za-z][A-Za-z.'/ -]*?)\s*(?:\^\s*\{?\s*([23])\s*\}?|([²³]))?")
_SHORT_UNITS = frozenset(
    [
        "m", "g", "s", "h", "l", "L", "A", "V", "W", "N", "J", "K", "C", "F", "km", "cm", "mm", "nm", "kg",
        "mg", "ml", "mL", "kW", "kJ", "hr", "ft", "in", "yd", "mi", "lb", "oz", "am", "pm", "mph", "kph",
        "cents", "min", "sec", "USD", "EUR", "GB", "MB", "kB", "Hz",
    ]
)  # fmt: skip
# Words that say more than what is counted: after one of these the text is not "a number and its unit".
_NOT_IN_UNITS = frozenset(
    [
        "or", "and", "not", "no", "but", "maybe", "perhaps", "probably", "is", "are", "was", "were",
        "wrong", "than", "if", "else", "nor", "either", "if", "to", "then", "minus", "plus", "equal",
        "equals", "over", "i", "e", "pi", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln",
        "exp", "theta", "alpha", "beta", "infinity", "infty", "inf", "mod", "choose", "half", "quarter",
        "hundred", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
        "twelve", "twenty", "thirty", "forty", "fifty", "thousand", "million", "billion", "trillion",
        "wait", "actually",
    ]
)  # fmt: skip
_ALIASES = {
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "gram": "g", "kilogram": "kg", "second": "s", "sec": "s",
    "minute": "min",
    "hour": "h", "hr": "h", "inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "mile": "mi",
    "liter": "l",
    "litre": "l", "usd": "dollar", "eur": "euro", "buck": "dollar", "cent": "cent", "percent": "%",
    "percentage point": "%", "degree": "degree", "deg": "degree",
}  # fmt: skip


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


def read_unit(text: str) -> str | None:
    """The normalised unit that a text after a number names; "" for none, None where it is something else."""
    text = text.strip()
    if not text:
        return ""
    if text in ("%", "\\%"):
        return "%"
    if text in ("°", "^\\circ", "^{\\circ}", "\\degree", "^\\degree"):
        return "degree"
    if len(text) > 80:
        return None
    marked = "\\" in text
    text = _MACRO_TEXT.sub(r" \1", text.replace("\\ ", " ").replace("\\,", " ").replace("~", " ")).strip()
    match = _UNIT.fullmatch(text.rstrip("."))
    if not match:
        return None
    words = match.group(1).replace(".", "").lower().split()
    if not words or len(words) > 4 or any(word in _NOT_IN_UNITS for word in words):
        return None
    if not marked and len(words[0]) < 3 and match.group(1).split()[0] not in _SHORT_UNITS:
        return None
    power = match.group(2) or {"²": "2", "³": "3"}.get(match.group(3), "")
    if words[0] in ("square", "sq", "cubic"):
        power = "3" if words[0] == "cubic" else "2"
        words = words[1:]
    name = " ".join(words)
    if len(name) > 2:
        name = name.removesuffix("s")
    return _ALIASES.get(name, name) + power


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
    if not rest or rest == ".":
        unit = ""
    else:
        rest = rest.strip()
        word, _, after = rest.partition(" ")
        if word.lower() in _SCALES and exponent is None:
            exponent, rest = str(_SCALES[word.lower()]), after
        unit = read_unit(rest)
        if unit is None:
            return None
    if currency:
        if unit not in ("", _CURRENCY[currency]):
            return None
        unit = _CURRENCY[currency]
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


def same_number(answer: Quantity, gold: Quantity) -> bool:
    """Is it the same quantity? Exact, but for a gold that
    is itself a rounded decimal (see `within_rounding`).

    A unit that one side leaves out is no difference; two different units are. A percentage equals its value
    (50% and 0.5), and the same figure with the sign left out, where that figure could not be meant as a
    share (50% and 50).
    """
    if answer.unit and gold.unit and answer.unit != gold.unit:
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
