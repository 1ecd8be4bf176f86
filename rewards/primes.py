"""Prime factors of the numbers under roots and logarithms, by trial division."""

import math
from fractions import Fraction

from rewards.tokens import TooBig

MAX_FACTOR = 10**10


def factorize(number: int) -> dict[int, int]:
    """Prime factors with their powers, by trial division; numbers above the limit are refused."""
    if number > MAX_FACTOR:
        raise TooBig("a number under a root")
    factors: dict[int, int] = {}
    prime = 2
    while prime * prime <= number:
        while number % prime == 0:
            factors[prime] = factors.get(prime, 0) + 1
            number //= prime
        prime += 1 if prime == 2 else 2
    if number > 1:
        factors[number] = factors.get(number, 0) + 1
    return factors


def powers(value: int | Fraction) -> dict[int, int]:
    """A positive rational as a product of prime powers."""
    factors = factorize(value.numerator)
    for prime, power in factorize(value.denominator).items():
        factors[prime] = factors.get(prime, 0) - power
    return factors


def trials(value: int | Fraction) -> int:
    """What `powers` costs at the most, in products of terms of a polynomial."""
    return math.isqrt(min(max(value.numerator, value.denominator), MAX_FACTOR)) // 16
