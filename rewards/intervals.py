"""Sets of real numbers, written as intervals, unions, differences or inequalities: are two of them the same?

The end points of both sets, in order, cut the real line into points and the gaps between them, numbered from
the left: gap 0, point 1, gap 2, … A set is the set of its numbers, and what is left is Python's set algebra.
"""

from collections.abc import Iterator

from rewards import algebra, evaluation
from rewards.latex import Node

INFINITY = ("const", "inf")
MAX_ENDS = 40
_CLOSE = 1e-9
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


class _NoSet(ValueError):
    """Not a set of real numbers with known end points."""


def same_set(left: Node, right: Node) -> bool | None:
    """Are two nodes the same set of real numbers? None where one is none, or has unknown end points."""
    if len(variables(left)) > 1 or len(variables(right)) > 1:  # of the plane
        return False
    try:
        ends = _in_order([*_ends(left), *_ends(right)])
        return _pieces(left, ends) == _pieces(right, ends)
    except _NoSet:
        return None


def variables(node: Node) -> set[Node]:
    """The variables that inequalities speak of by themselves: x for `x > 5 and x < 7`."""
    if node[0] in ("all", "any"):
        return set().union(*map(variables, node[1]))
    return {side for side in node[2] if side[0] == "sym"} if node[0] == "rel" else set()


def _is_infinite(node: Node) -> bool:
    return node in (INFINITY, ("neg", INFINITY))


def _ends(node: Node) -> Iterator[Node]:
    """Every finite end point and point that a set names."""
    kind = node[0]
    if kind in ("union", "cap", "minus"):
        for part in node[1:]:
            yield from _ends(part)
    elif kind in ("all", "any"):
        for part in node[1]:
            yield from _ends(part)
    elif kind == "rel":
        yield from (side for side in node[2] if side[0] != "sym" and not _is_infinite(side))
    elif kind in ("group", "set"):
        yield from (item for item in node[-1] if not _is_infinite(item))
    elif node != ("const", "R"):
        yield node


def _in_order(ends: list[Node]) -> dict[Node, int]:
    """The place of each end point in order from 0; equal ones share it."""
    values = {
        end: evaluation.real_value(end) for end in ends if end[0] not in ("rel", "group", "set", "list")
    }
    if len(values) < len(set(ends)) or None in values.values() or len(values) > MAX_ENDS:
        raise _NoSet
    places: dict[Node, int] = {}
    before = None
    for end in sorted(values, key=values.get):
        place = places[before] + 1 if before else 0
        if before and values[end] - values[before] < _CLOSE * max(1.0, abs(values[end])):
            if algebra.equal(end, before) is not True:
                raise _NoSet
            place -= 1
        places[end] = place
        before = end
    return places


def _pieces(node: Node, ends: dict[Node, int]) -> set[int]:
    """The numbers of the points and gaps that make up a set."""
    kind = node[0]
    if kind in ("union", "cap", "minus", "all", "any"):
        parts = [_pieces(part, ends) for part in (node[1] if kind in ("all", "any") else node[1:])]
        if kind == "minus":
            return parts[0] - parts[1]
        return set.union(*parts) if kind in ("union", "any") else set.intersection(*parts)
    everything = set(range(2 * len(ends) + 1))
    if node == ("const", "R"):
        return everything
    if kind == "rel":
        return _solutions(node, ends)
    if kind == "set" and not any(map(_is_infinite, node[1])):
        return {2 * ends[item] + 1 for item in node[1]}
    if kind != "group" or len(node[2]) != 2:
        raise _NoSet
    low, high = node[2]
    if low == INFINITY or high == ("neg", INFINITY):
        raise _NoSet
    first = 0 if _is_infinite(low) else 2 * ends[low] + (1 if node[1][0] == "[" else 2)
    last = 2 * len(ends) if _is_infinite(high) else 2 * ends[high] + (1 if node[1][1] == "]" else 0)
    if first > last:
        raise _NoSet  # rather a point of the plane
    return set(range(first, last + 1))


def _solutions(node: Node, ends: dict[Node, int]) -> set[int]:
    """Of `1 < x <= 3` or `x = 2`: one variable, compared with numbers."""
    operators, sides = node[1], node[2]
    at = [index for index, side in enumerate(sides) if side[0] == "sym"]
    if len(at) != 1 or len(sides) > 3 or (len(sides) == 3 and at != [1]):
        raise _NoSet
    result = set(range(2 * len(ends) + 1))
    for index, operator in enumerate(operators):
        side = sides[index] if index < at[0] else sides[index + 1]
        result &= _compared(FLIPPED.get(operator) if index < at[0] else operator, side, ends)
    return result


def _compared(operator: str | None, side: Node, ends: dict[Node, int]) -> set[int]:
    if operator == "in":
        return _pieces(side, ends)
    if operator not in FLIPPED or _is_infinite(side):
        raise _NoSet
    everything, point = set(range(2 * len(ends) + 1)), 2 * ends[side] + 1
    if operator in ("=", "!="):
        return {point} if operator == "=" else everything - {point}
    below = {piece for piece in everything if piece < point}
    return (below if operator[0] == "<" else everything - below - {point}) | (
        {point} if operator.endswith("=") else set()
    )
