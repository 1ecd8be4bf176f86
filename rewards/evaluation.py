"""Two expressions at a few points in floating point: a cheap and safe way to see that they differ.

It only ever says "different". Agreement is not taken for equality; that is for a proof.
"""

import cmath
import math
from collections.abc import Iterator
from zlib import crc32

from rewards.latex import Node

POINTS = 8
TOLERANCE = 1e-7

_REAL = {
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "arcsin": math.asin, "arccos": math.acos,
    "arctan": math.atan,
    "sinh": math.sinh, "cosh": math.cosh, "tanh": math.tanh, "ln": math.log, "exp": math.exp, "abs": abs,
    "floor": math.floor, "ceil": math.ceil, "factorial": lambda x: math.gamma(x + 1),
    "cot": lambda x: 1 / math.tan(x), "sec": lambda x: 1 / math.cos(x), "csc": lambda x: 1 / math.sin(x),
    "binom": lambda n, k: math.gamma(n + 1) / (math.gamma(k + 1) * math.gamma(n - k + 1)),
    "max": max, "min": min,
}  # fmt: skip
_COMPLEX = {
    **_REAL, "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "arcsin": cmath.asin, "arccos": cmath.acos,
    "arctan": cmath.atan, "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh, "ln": cmath.log,
    "exp": cmath.exp,
    "cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x),
}  # fmt: skip
_UNKNOWN_LOG_BASE = 1.7


def differ(left: Node, right: Node) -> bool:
    """True where two expressions are certainly different: they disagree at a point where both are defined."""
    has_i = _mentions_i(left) or _mentions_i(right)
    for point in range(POINTS if _has_symbols(left) or _has_symbols(right) else 1):
        a, b = _at(left, point, has_i), _at(right, point, has_i)
        if a is not None and b is not None and abs(a - b) > TOLERANCE * max(abs(a), abs(b), 1e-30):
            return True
    return False


def real_value(node: Node) -> float | None:
    """The value of an expression without variables, None where it is not one real number."""
    if _has_symbols(node):
        return None
    value = _at(node, 0, _mentions_i(node))
    if value is None or abs(complex(value).imag) > 1e-12 * max(1.0, abs(value)):
        return None
    return complex(value).real


def _leaves(node: Node) -> Iterator[Node]:
    stack = [node]
    while stack:
        current = stack.pop()
        if current[0] in ("sym", "const", "num", "text"):
            yield current
        else:
            stack += [child for child in current[1:] if isinstance(child, tuple)]


def _mentions_i(node: Node) -> bool:
    return ("const", "i") in _leaves(node)


def _has_symbols(node: Node) -> bool:
    return any(leaf[0] == "sym" for leaf in _leaves(node))


def _at(node: Node, point: int, is_complex: bool) -> complex | None:
    try:
        value = _evaluate(node, point, is_complex)
        return value if cmath.isfinite(value) else None
    except (ArithmeticError, ValueError, TypeError):  # outside of the domain, or too large for a float
        return None


def _symbol(name: str, point: int) -> float:
    """A value of a variable, its sign and size different from point to point and between variables."""
    bits = crc32(f"{name}/{point}".encode())
    size = 0.3 + (bits & 0xFFFF) / 0x10000 * 2.5
    return size if bits >> 16 & 1 or point == 0 else -size


def _evaluate(node: Node, point: int, is_complex: bool) -> complex:
    kind = node[0]
    if kind == "num":
        return float(node[1])
    if kind == "sym":
        return _symbol(node[1], point)
    if kind == "const":
        return {"pi": math.pi, "e": math.e, "i": 1j}[node[1]] if node[1] in ("pi", "e", "i") else math.nan
    if kind not in ("+", "*", "/", "^", "neg", "deg", "fn"):
        raise ValueError(kind)
    first = 2 if kind == "fn" else 1
    values = [_evaluate(child, point, is_complex) for child in node[first:]]
    if kind == "+":
        return sum(values)
    if kind == "*":
        return math.prod(values)
    if kind == "/":
        return values[0] / values[1]
    if kind == "neg":
        return -values[0]
    if kind == "deg":
        return values[0] * math.pi / 180
    return _power(node, values, is_complex) if kind == "^" else _call(node[1], values, is_complex)


def _power(node: Node, values: list, is_complex: bool) -> complex:
    base, exponent = values
    if not is_complex and base < 0 and exponent != int(exponent):
        parts = node[2][1:] if node[2][0] == "/" else ()
        if (
            len(parts) == 2
            and all(p[0] == "num" and p[1].denominator == 1 for p in parts)
            and parts[1][1] % 2
        ):
            return (-1 if parts[0][1] % 2 else 1) * (-base) ** exponent  # the real root
        raise ValueError("a root of a negative number")
    return base**exponent


def _call(name: str, values: list, is_complex: bool) -> complex:
    if name == "log":
        log = (_COMPLEX if is_complex else _REAL)["ln"]
        return log(values[0]) / (log(values[1]) if len(values) > 1 else math.log(_UNKNOWN_LOG_BASE))
    function = (_COMPLEX if is_complex else _REAL).get(name)
    if function:
        return function(*values)
    if name in ("gcd", "lcm"):
        return getattr(math, name)(*[round(value) for value in values])
    # An unknown function is a fixed, arbitrary one: the same for equal arguments.
    return 0.5 + crc32(f"{name}{[f'{value:.9g}' for value in values]}".encode()) / 2**32
