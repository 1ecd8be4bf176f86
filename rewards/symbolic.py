r"""What needs real computer algebra, in a child process:
proofs by SymPy, and texts that only Math-Verify can read.

The libraries are imported in the child alone. SymPy gets trees built by our own parser, node by node;
Math-Verify gets guarded LaTeX and reads it with a grammar, without `eval`.
"""

import logging
import sys
from fractions import Fraction
from typing import Any

from rewards.processes import ChildDied, OutOfTime, Pool, serve

MEMORY_BYTES = 2 * 1024**3

START_S = 1.5  # the start of a fresh child takes about 1 s; a call waits no longer for it
MAX_CHILDREN = 4

_pool = Pool(MAX_CHILDREN, "rewards.symbolic", MEMORY_BYTES, start_s=START_S)


def prove_equal(left: tuple, right: tuple, timeout_s: float) -> bool | None:
    """Are two trees equal as expressions? None where SymPy cannot say, or not in time."""
    return _ask(("prove", left, right), timeout_s)


def compare_latex(answer: str, gold: str, timeout_s: float) -> bool | None:
    """Does Math-Verify find two guarded texts equal? None where it cannot read them, or not in time."""
    return _ask(("latex", answer, gold), timeout_s)


def _ask(message: Any, timeout_s: float) -> bool | None:
    if timeout_s <= 0:
        return None
    try:
        return _pool.request(message, timeout_s)
    except (OutOfTime, ChildDied):
        return None


# -------------------------------------------------------------------------------------------------------
# The child's side


def _answer(message: Any) -> bool | None:
    kind, left, right = message
    try:
        return _prove(left, right) if kind == "prove" else _compare(left, right)
    except MemoryError:
        raise SystemExit(1) from None  # what is left of the heap is not to be trusted
    except Exception as error:  # noqa: BLE001 - any failure inside the libraries means "cannot say"
        print(f"rewards.symbolic: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        return None


def _prove(left: tuple, right: tuple) -> bool | None:
    import sympy

    a, b = to_sympy(left), to_sympy(right)
    difference = a - b
    if difference == 0:
        return True
    # Fifty digits at a point before the slow search for a proof. Variables are positive: other signs were
    # tried before.
    point = {
        symbol: sympy.Rational(7 * k + 3, 11)
        for k, symbol in enumerate(sorted(difference.free_symbols, key=str))
    }
    number = sympy.N(difference.subs(point), 50, maxn=200)
    if number.is_number and number.is_comparable and abs(number) > sympy.Float("1e-40"):
        return False
    if sympy.simplify(difference) == 0:
        return True
    are_positive = a.is_positive and b.is_positive
    if are_positive and sympy.simplify(sympy.expand_log(sympy.log(a) - sympy.log(b), force=True)) == 0:
        return True
    # SymPy's own "no" is not trusted: it says that 2^(ln 3) is not 3^(ln 2). Fifty digits say no, or nobody.
    return True if difference.equals(0) else None


def to_sympy(node: tuple) -> Any:
    """The SymPy expression of a tree; only known kinds, nothing by name from the text."""
    import sympy

    kind = node[0]
    if kind == "num":
        return sympy.Rational(node[1].numerator, node[1].denominator)
    if kind == "sym":
        return sympy.Symbol(node[1], positive=True)
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}[node[1]]
    parts = [to_sympy(child) for child in node[2 if kind == "fn" else 1 :]]
    if kind == "fn":
        return _sympy_function(node[1], parts)
    return {
        "+": lambda *x: sympy.Add(*x),
        "*": lambda *x: sympy.Mul(*x),
        "/": lambda a, b: a / b,
        "^": _sympy_power,
        "neg": lambda a: -a,
        "deg": lambda a: a * sympy.pi / 180,
    }[kind](*parts)


def _sympy_power(base: Any, exponent: Any) -> Any:
    import sympy

    if exponent.is_Rational and exponent.q % 2 and exponent.q > 1 and base.is_negative:
        return sympy.real_root(base, exponent.q) ** exponent.p
    if base.is_number and exponent.is_number and abs(sympy.N(exponent)) > 10_000:
        raise ValueError("the exponent is too large")
    return base**exponent


def _sympy_function(name: str, parts: list) -> Any:
    import sympy

    known = {
        "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec,
        "csc": sympy.csc,
        "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "sinh": sympy.sinh,
        "cosh": sympy.cosh,
        "tanh": sympy.tanh, "ln": sympy.log, "exp": sympy.exp, "abs": sympy.Abs, "floor": sympy.floor,
        "ceil": sympy.ceiling, "factorial": sympy.factorial, "binom": sympy.binomial, "max": sympy.Max,
        "min": sympy.Min,
        "gcd": sympy.gcd, "lcm": sympy.lcm,
    }  # fmt: skip
    if name == "log":
        base = parts[1] if len(parts) > 1 else sympy.Symbol("log base", positive=True)
        return sympy.log(parts[0]) / sympy.log(base)
    return known[name](*parts) if name in known else sympy.Function(name)(*parts)


def _compare(answer: str, gold: str) -> bool | None:
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=-1)]
    sides = [
        parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
        for text in (gold, answer)
    ]
    if any(not side or isinstance(side[0], str) for side in sides):
        return None
    # No rounding: six digits are not equality. Time is kept by the parent's clock.
    equal = verify(
        *sides,
        float_rounding=15,
        strict=True,
        allow_set_relation_comp=False,
        timeout_seconds=None,
        raise_on_error=True,
    )
    # With variables, a sum or an integral that nobody evaluated looks different from its closed form.
    return (
        True if equal else (None if any(getattr(side[0], "free_symbols", None) for side in sides) else False)
    )


def main() -> None:
    """Run the child."""
    logging.disable()  # Math-Verify warns at every call that its own timeout is off
    # Imports and first calls are slow; done before the first request, they do not eat its time.
    half = ("num", Fraction(1, 2), None)
    _answer(("prove", ("fn", "sin", ("*", half, ("sym", "x"))), ("fn", "cos", ("sym", "x"))))
    _answer(("latex", r"\int_0^1 x dx", r"\frac12"))
    serve(_answer)
