r"""Exact arithmetic on parsed answers: a normal form in which equal expressions are equal as data.

A value is a quotient of two polynomials with rational coefficients, `(numerator, denominator)`; a polynomial
maps a monomial, a sorted tuple of `(atom, exponent)`, to its coefficient. Atoms are variables, pi, e, i,
primes under a root (`#2` with exponent 1/2 is the square root of 2), and whole functions (`sin(@0)`), with a
short name for the normal form of each argument (`Algebra.name`), so that names do not grow with the nesting.
Exponents may be negative and fractions, so that `1/x` and roots of
numbers need no denominator.

Where only variables, pi, e, i, roots of numbers and logarithms of primes occur, different forms are different
values (as far as mathematics knows). With other atoms they may still be equal (`sin 2x` and `2 sin x cos x`):
then `exact` is False, and numbers and after them SymPy have to decide.

Source: linear independence of roots over the rationals: Besicovitch 1940.
"""

import math
from fractions import Fraction

from rewards import primes
from rewards.latex import Node
from rewards.tokens import TooBig

Number = int | Fraction
Monomial = tuple[tuple[str, Number], ...]
Polynomial = dict[Monomial, Number]
Value = tuple[Polynomial, Polynomial | None]

MAX_BITS = 4096
MAX_TERMS = 300
MAX_POWER = 24
MAX_WORK = 60_000  # products of terms and trial divisions in one computation: some tenths of a second

ONE: Polynomial = {(): 1}


class Undefined(ValueError):
    """Division by zero and its like."""


class NoNormalForm(ValueError):
    """A node that is not an expression, such as a tuple inside a sum."""


def equal(left: Node, right: Node) -> bool | None:
    """Are two expressions the same value? None where the normal forms differ but do not decide."""
    algebra = Algebra()
    try:
        difference = algebra.difference(algebra.value(left), algebra.value(right))
    except Undefined:
        return False
    if not difference:
        return True
    return False if algebra.exact else None


def proportional(left: Node, right: Node) -> int | None:
    """The sign of the constant c with left = c * right,
    where there is one; 0 where not; None where undecided.
    """
    algebra = Algebra()
    try:
        a, b = algebra.value(left), algebra.value(right)
        numerator_a, numerator_b = a[0], b[0]
        if not numerator_a or not numerator_b:
            return int(not numerator_a and not numerator_b)
        lead = min(numerator_a)
        if lead not in numerator_b:
            return 0 if algebra.exact else None
        scale_a, scale_b = numerator_a[lead], numerator_b[lead]
        difference = algebra.difference(
            (_scale(numerator_a, scale_b), a[1]), (_scale(numerator_b, scale_a), b[1])
        )
    except Undefined:
        return 0
    if difference:
        return 0 if algebra.exact else None
    return 1 if (scale_a > 0) == (scale_b > 0) else -1


def rational(node: Node) -> Number | None:
    """The value of an expression where it is a rational number, else None."""
    if node[0] == "num":
        return node[1]
    algebra = Algebra()
    try:
        return _constant(algebra.value(node))
    except ValueError:
        return None


# -------------------------------------------------------------------------------------------------------
# Polynomials


def _reduced(value: Number) -> Number:
    return value.numerator if value.__class__ is Fraction and value.denominator == 1 else value


def _check(value: Number) -> Number:
    if value.__class__ is int:
        if value.bit_length() > MAX_BITS:
            raise TooBig("a number")
        return value
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooBig("a number")
    return value.numerator if value.denominator == 1 else value


def _scale(polynomial: Polynomial, factor: Number) -> Polynomial:
    return {m: _check(c * factor) for m, c in polynomial.items()} if factor else {}


def _plus(left: Polynomial, right: Polynomial) -> Polynomial:
    result = dict(left)
    for monomial, coefficient in right.items():
        total = result.get(monomial, 0) + coefficient
        if total:
            result[monomial] = _check(total)
        else:
            result.pop(monomial, None)
    if len(result) > MAX_TERMS:
        raise TooBig("terms")
    return result


def _constant(value: Value) -> Number | None:
    """The value as a rational number, None where it is none."""
    numerator, denominator = value
    if denominator is not None:
        return None
    if not numerator:
        return 0
    return numerator.get(()) if len(numerator) == 1 else None


def _sorted_terms(polynomial: Polynomial) -> tuple:
    return tuple(sorted(polynomial.items(), key=repr))


# sin(k pi / 12) = sqrt(a) / b, by k: (a, b).
_SINES = {0: (0, 1), 2: (1, 2), 3: (2, 2), 4: (3, 2), 6: (4, 2)}
_POSITIVE_ATOMS = ("pi", "e")


class Algebra:
    """One computation: what the atoms stand for, and whether a difference of normal forms decides.

    Attributes:
        exact: no atom has relations that the normal form does not know.
    """

    def __init__(self) -> None:
        self.exact = True
        self.roots: dict[str, Polynomial] = {}
        self.cosines: dict[str, str] = {}
        self.names: dict[tuple, str] = {}
        self.work = 0

    def name(self, form: tuple) -> str:
        """A short name for a value, or for anything that can be hashed: the same for equal normal forms."""
        if form.__class__ is tuple and len(form) == 2 and form[0].__class__ is dict:
            numerator, denominator = form
            form = (_sorted_terms(numerator), denominator and _sorted_terms(denominator))
        return self.names.setdefault(form, f"@{len(self.names)}")

    def spend(self, work: int) -> None:
        self.work += work
        if self.work > MAX_WORK:
            raise TooBig("the work")

    def prime_powers(self, value: Number) -> dict[int, int]:
        self.spend(primes.trials(value))
        return primes.powers(value)

    # Values

    def times_polynomials(self, left: Polynomial, right: Polynomial) -> Polynomial:
        self.spend(len(left) * len(right))
        if len(left) == 1 and () in left:
            return _scale(right, left[()])
        if len(right) == 1 and () in right:
            return _scale(left, right[()])
        result: Polynomial = {}
        for a, x in left.items():
            for b, y in right.items():
                product = self.times_monomials(a, b, x * y)
                result = _plus(result, product) if result else product
        return result

    def times_monomials(self, left: Monomial, right: Monomial, coefficient: Number) -> Polynomial:
        if not left or not right:
            return {left or right: _check(coefficient)}
        exponents = dict(left)
        for atom, exponent in right:
            exponents[atom] = exponents.get(atom, 0) + exponent
        return self.monomial(exponents, coefficient)

    def monomial(self, exponents: dict[str, Number], coefficient: Number) -> Polynomial:
        """The product of atom powers as a polynomial, with the relations of the atoms applied."""
        factor: Polynomial | None = None
        kept: list[tuple[str, Number]] = []
        for atom, exponent in exponents.items():
            if atom[0] == "#":
                whole = math.floor(exponent)
                if whole:
                    coefficient *= self.number_power(int(atom[1:]), whole)
                    exponent -= whole
            elif atom == "i":
                exponent %= 4
                if exponent >= 2:
                    coefficient, exponent = -coefficient, exponent - 2
            elif exponent >= 1 and (atom[0] == "√" or atom in self.cosines):
                exponent, inner = self.folded(atom, exponent)
                factor = inner if factor is None else self.times_polynomials(factor, inner)
            if exponent:
                kept.append((atom, exponent))
        result = {tuple(sorted(kept)): _check(_reduced(coefficient))}
        return result if factor is None else self.times_polynomials(result, factor)

    def folded(self, atom: str, exponent: Number) -> tuple[Number, Polynomial]:
        """Whole powers of a root, and squares of a sine, as polynomials; and the exponent that is left."""
        if atom[0] == "√":
            whole = math.floor(exponent)
            return exponent - whole, self.power_polynomial(self.roots[atom], whole)
        halves = int(exponent // 2)
        squared = {(): 1, ((self.cosines[atom], 2),): -1}
        return exponent - 2 * halves, self.power_polynomial(squared, halves)

    def number_power(self, base: Number, exponent: int) -> Number:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits > 1 and abs(exponent) * bits > MAX_BITS:
            raise TooBig("a power")
        if not base and exponent < 0:
            raise Undefined("division by zero")
        return _reduced(Fraction(base) ** exponent) if exponent < 0 else base**exponent

    def plus(self, left: Value, right: Value) -> Value:
        (a, b), (c, d) = left, right
        if b is None and d is None:
            return _plus(a, c), None
        if b == d:
            return _plus(a, c), b
        bottom_left, bottom_right = b or ONE, d or ONE
        top = _plus(self.times_polynomials(a, bottom_right), self.times_polynomials(c, bottom_left))
        return top, self.times_polynomials(bottom_left, bottom_right)

    def times(self, left: Value, right: Value) -> Value:
        top = self.times_polynomials(left[0], right[0])
        if left[1] is None:
            return top, right[1]
        return top, left[1] if right[1] is None else self.times_polynomials(left[1], right[1])

    def inverse(self, value: Value) -> Value:
        top, bottom = value
        if not top:
            raise Undefined("division by zero")
        if len(top) > 1:
            return bottom or ONE, top
        ((exponents, coefficient),) = top.items()
        flipped = self.monomial({atom: -e for atom, e in exponents}, _reduced(Fraction(1) / coefficient))
        return (flipped if bottom is None else self.times_polynomials(flipped, bottom)), None

    def difference(self, left: Value, right: Value) -> Polynomial:
        """A polynomial that is zero exactly where the two values are equal in normal form."""
        (a, b), (c, d) = left, right
        if b is not None or d is not None:
            a, c = self.times_polynomials(a, d or ONE), self.times_polynomials(c, b or ONE)
        return _plus(a, _scale(c, -1))

    # Powers

    def power_polynomial(self, base: Polynomial, exponent: int) -> Polynomial:
        if exponent > MAX_POWER and len(base) > 1:
            raise TooBig("a power of a sum")
        result = base
        for _ in range(exponent - 1):
            result = self.times_polynomials(result, base)
        return result if exponent else ONE

    def power(self, base: Value, exponent: Value) -> Value:
        constant = _constant(exponent)
        if constant is None:
            return self.symbolic_power(base, exponent)
        if constant.__class__ is int:
            return self.whole_power(base, constant)
        return self.root_power(base, constant)

    def whole_power(self, base: Value, exponent: int) -> Value:
        if exponent < 0:
            return self.whole_power(self.inverse(base), -exponent)
        top, bottom = base
        if bottom is not None:
            return self.power_polynomial(top, exponent), self.power_polynomial(bottom, exponent)
        if not top:
            return (top if exponent else ONE), None
        if len(top) > 1:
            return self.power_polynomial(top, exponent), None
        if exponent > MAX_BITS:
            raise TooBig("an exponent")
        ((exponents, coefficient),) = top.items()
        return self.monomial(
            {a: e * exponent for a, e in exponents}, self.number_power(coefficient, exponent)
        ), None

    def root_power(self, base: Value, exponent: Fraction) -> Value:
        """A fractional power: of a number by its primes, of a sum as an atom with its content taken out."""
        top, bottom = base
        if bottom is not None:
            return self.times(
                self.root_power((top, None), exponent),
                self.inverse(self.root_power((bottom, None), exponent)),
            )
        if not top:
            if exponent < 0:
                raise Undefined("division by zero")
            return {}, None
        if abs(exponent.numerator) > MAX_POWER or exponent.denominator > MAX_POWER:
            raise TooBig("an exponent")
        if len(top) == 1:
            return self.root_of_monomial(top, exponent)
        content = Fraction(
            math.gcd(*(c.numerator for c in top.values())), math.lcm(*(c.denominator for c in top.values()))
        )
        content = _reduced(content)
        rest = _scale(top, _reduced(Fraction(1) / content))
        outside = self.root_of_monomial({(): content}, exponent)
        return self.times(outside, (self.root_atom(rest, exponent), None))

    def root_atom(self, inside: Polynomial, exponent: Fraction) -> Polynomial:
        self.exact = False
        atom = "√" + self.name((inside, None))
        self.roots[atom] = inside
        return self.monomial({atom: exponent}, 1)

    def root_of_monomial(self, top: Polynomial, exponent: Fraction) -> Value:
        ((exponents, coefficient),) = top.items()
        result: Polynomial = ONE
        opaque: dict[str, Number] = {}
        for atom, power in exponents:
            if atom[0] == "#" or atom in _POSITIVE_ATOMS or (power == 1 and atom[0] not in "√i"):
                result = self.times_polynomials(result, self.monomial({atom: power * exponent}, 1))
            else:
                opaque[atom] = power
        if coefficient < 0 and (
            opaque or len(exponents) > sum(a[0] == "#" or a in _POSITIVE_ATOMS for a, _ in exponents)
        ):
            opaque[""] = 1  # the root of -x is not a multiple of the root of x
        if opaque:
            sign = -1 if opaque.pop("", None) else 1
            if sign < 0:
                coefficient = -coefficient
            inside = {tuple(sorted(opaque.items())): sign}
            result = self.times_polynomials(result, self.root_atom(inside, exponent))
        if len(exponents) > 1:
            self.exact = False  # the root of xy against the roots of x and y
        if coefficient < 0:
            coefficient = -coefficient
            turned = self.root_of_minus_one(exponent)
            result = self.times_polynomials(result, turned)
        if coefficient != 1:
            roots = {f"#{p}": k * exponent for p, k in self.prime_powers(coefficient).items()}
            result = self.times_polynomials(result, self.monomial(roots, 1))
        return result, None

    def root_of_minus_one(self, exponent: Fraction) -> Polynomial:
        """The real root where there is one (school's cube root of -8 is -2), i for square roots."""
        if exponent.denominator % 2:
            return {(): -1 if exponent.numerator % 2 else 1}
        if exponent.denominator == 2:
            return self.monomial({"i": exponent.numerator}, 1)
        raise TooBig("a root of a negative number")

    def symbolic_power(self, base: Value, exponent: Value) -> Value:
        """b^(m + n) as b^m b^n, an atom for each monomial of the exponent; opaque where the base is a sum."""
        top, bottom = exponent
        constant = _constant(base)
        is_symbol = base[1] is None and len(base[0]) == 1 and constant is None and self._is_atom(base[0])
        if bottom is not None or not (is_symbol or (constant is not None and constant > 0)):
            self.exact = False
            return {((f"pow({self.name(base)},{self.name(exponent)})", 1),): 1}, None
        if is_symbol:
            (((atom, _),),) = base[0].keys()
            bases = {atom: 1}
        else:
            bases = {f"#{p}": k for p, k in self.prime_powers(constant).items()}
        result: Value = (ONE, None)
        for monomial, coefficient in top.items():
            if not monomial:
                part = self.power(base, ({(): coefficient}, None))
            elif bases == {"e": 1} and (turn := self.turn(monomial, coefficient)) is not None:
                part = turn
            elif bases == {"e": 1} and (log := self.only_logarithm(monomial)) is not None:
                prime, rest = log
                part = self.power(({(): prime}, None), ({rest: coefficient}, None))
            else:
                # 2^(ln 3) is 3^(ln 2): the normal form does not know.
                self.exact = self.exact and all(e == 1 and a[:2] != "ln" for a, e in monomial)
                powers = {f"{b.strip('#')}^{self.name(monomial)}": k * coefficient for b, k in bases.items()}
                part = self.monomial(powers, 1), None
            result = self.times(result, part)
        return result

    def only_logarithm(self, monomial: Monomial) -> tuple[int, Monomial] | None:
        """The prime p and the rest of a product with a single ln p in it: e^(x ln p) is p^x."""
        logs = [(atom, exponent) for atom, exponent in monomial if atom[:2] == "ln"]
        if len(logs) != 1 or logs[0][1] != 1 or not logs[0][0][2:].isdigit():
            return None
        return int(logs[0][0][2:]), tuple(pair for pair in monomial if pair != logs[0])

    def _is_atom(self, polynomial: Polynomial) -> bool:
        ((exponents, coefficient),) = polynomial.items()
        return coefficient == 1 and len(exponents) == 1 and exponents[0][1] == 1

    def turn(self, monomial: Monomial, coefficient: Number) -> Value | None:
        """e^(i pi r) on the unit circle."""
        if monomial != (("i", 1), ("pi", 1)):
            return None
        cosine, sine = self.sine_of_turn(coefficient + Fraction(1, 2)), self.sine_of_turn(coefficient)
        if cosine is None or sine is None:
            return None
        return self.plus((cosine, None), self.times((sine, None), ({(("i", 1),): 1}, None)))

    # Trees

    def value(self, node: Node) -> Value:
        """The normal form of a tree.

        Raises:
            NoNormalForm: not an expression. Undefined: division by zero. TooBig: a guard.
        """
        kind = node[0]
        if kind == "num":
            return ({(): _reduced(node[1])} if node[1] else {}), None
        if kind == "sym" or (kind == "const" and node[1] in ("pi", "e", "i")):
            return {((node[1], 1),): 1}, None
        if kind == "fn":
            return self.function(node[1], [self.value(argument) for argument in node[2:]])
        rule = _OPERATIONS.get(kind)
        if rule is None:
            raise NoNormalForm(kind)
        result = self.value(node[1])
        for child in node[2:]:
            result = rule(self, result, self.value(child))
        return rule(self, result) if len(node) == 2 else result

    def function(self, name: str, arguments: list[Value]) -> Value:
        rule = _FUNCTIONS.get(name)
        result = rule(self, arguments) if rule else None
        if result is None:
            self.exact = False
            result = {((f"{name}({','.join(self.name(a) for a in arguments)})", 1),): 1}, None
        return result

    # Functions: each gives a value, or None for "leave it as an atom"

    def sine(self, arguments: list[Value]) -> Value | None:
        (argument,) = arguments
        turn = self.fraction_of_pi(argument)
        exact = self.sine_of_turn(turn) if turn is not None else None
        if exact is not None:
            return exact, None
        return self.odd("sin", argument)

    def cosine(self, arguments: list[Value]) -> Value | None:
        (argument,) = arguments
        turn = self.fraction_of_pi(argument)
        exact = self.sine_of_turn(turn + Fraction(1, 2)) if turn is not None else None
        if exact is not None:
            return exact, None
        self.exact = False
        return {((f"cos({self.name(self.upright(argument)[1])})", 1),): 1}, None

    def tangent(self, arguments: list[Value]) -> Value:
        return self.times(self.sine(arguments), self.inverse(self.cosine(arguments)))

    def odd(self, name: str, argument: Value) -> Value:
        self.exact = False
        sign, upright = self.upright(argument)
        key = self.name(upright)
        self.cosines[f"sin({key})"] = f"cos({key})"
        return {((f"{name}({key})", 1),): sign}, None

    def upright(self, value: Value) -> tuple[int, Value]:
        """The sign of a value's first term, and the value with that sign taken out."""
        top, bottom = value
        if top and top[min(top, key=repr)] < 0:
            return -1, (_scale(top, -1), bottom)
        return 1, value

    def fraction_of_pi(self, value: Value) -> Number | None:
        top, bottom = value
        if bottom is not None or len(top) > 1:
            return None
        return 0 if not top else top.get((("pi", 1),))

    def sine_of_turn(self, turn: Number) -> Polynomial | None:
        """sin(turn pi) where it is a root over 2."""
        twelfths = turn * 12 % 24
        if twelfths.denominator != 1:
            return None
        sign, twelfths = (1, int(twelfths)) if twelfths < 12 else (-1, int(twelfths) - 12)
        if min(twelfths, 12 - twelfths) not in _SINES:
            return None
        square, divisor = _SINES[min(twelfths, 12 - twelfths)]
        if not square:
            return {}
        root, _ = self.root_of_monomial({(): square}, Fraction(1, 2))
        return _scale(root, Fraction(sign, divisor))

    def natural_log(self, arguments: list[Value]) -> Value | None:
        (argument,) = arguments
        constant = _constant(argument)
        if constant is not None:
            if constant <= 0:
                raise Undefined("the logarithm of a number that is not positive")
            return {((f"ln{p}", 1),): k for p, k in self.prime_powers(constant).items()}, None
        top, bottom = argument
        if bottom is None and len(top) == 1:
            ((exponents, coefficient),) = top.items()
            if len(exponents) == 1 and exponents[0][0] == "e" and coefficient == 1:
                return {(): exponents[0][1]}, None
        return None

    def logarithm(self, arguments: list[Value]) -> Value:
        r"""`\log_b x`; without a base it is one and the same
        unknown base, so neither `\ln` nor base 10 is assumed.
        """
        top = self.function("ln", arguments[:1])
        if len(arguments) == 1:
            return self.times(top, ({(("lnB", -1),): 1}, None))
        return self.times(top, self.inverse(self.function("ln", arguments[1:])))

    def absolute(self, arguments: list[Value]) -> Value | None:
        constant = _constant(arguments[0])
        if constant is not None:
            return ({(): abs(constant)} if constant else {}), None
        self.exact = False
        return {((f"abs({self.name(self.upright(arguments[0])[1])})", 1),): 1}, None

    def whole_function(self, arguments: list[Value], function) -> Value | None:
        constants = [_constant(argument) for argument in arguments]
        if any(constant is None for constant in constants):
            return None
        if any(abs(constant) > 400 or constant.denominator != 1 for constant in constants):
            raise TooBig("a factorial or binomial")
        if any(constant < 0 for constant in constants):
            raise Undefined("a factorial of a negative number")
        result = function(*constants)
        return ({(): _check(result)} if result else {}), None

    def rounded(self, arguments: list[Value], function) -> Value | None:
        constant = _constant(arguments[0])
        if constant is None:
            return None
        return ({(): function(constant)} if function(constant) else {}), None


_OPERATIONS = {
    "*": Algebra.times,
    "+": Algebra.plus,
    "/": lambda a, x, y: a.times(x, a.inverse(y)),
    "^": Algebra.power,
    "neg": lambda a, x: a.times(x, ({(): -1}, None)),
    "deg": lambda a, x: a.times(x, ({(("pi", 1),): Fraction(1, 180)}, None)),
}

_FUNCTIONS = {
    "sin": Algebra.sine,
    "cos": Algebra.cosine,
    "tan": Algebra.tangent,
    "cot": lambda a, x: a.inverse(a.tangent(x)),
    "sec": lambda a, x: a.inverse(a.cosine(x)),
    "csc": lambda a, x: a.inverse(a.sine(x)),
    "ln": Algebra.natural_log,
    "log": Algebra.logarithm,
    "exp": lambda a, x: a.power(({(("e", 1),): 1}, None), x[0]),
    "abs": Algebra.absolute,
    "factorial": lambda a, x: a.whole_function(x, math.factorial),
    "binom": lambda a, x: a.whole_function(x, math.comb),
    "floor": lambda a, x: a.rounded(x, math.floor),
    "ceil": lambda a, x: a.rounded(x, math.ceil),
}
