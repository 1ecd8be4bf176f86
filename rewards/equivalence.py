"""Do two answers say the same? Trees of `rewards.latex`, compared by shape and then by value.

Three-valued: None means that the values agree as far as floating point can see, and nobody has proved or
refuted it yet. The order inside tuples and intervals counts, that of sets, lists of solutions and unions
does not. A name in front of a value (`x = 5`, `f(x) = 2x`) is dropped where the other side has none; a chain
that contradicts itself equals nothing.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from string import ascii_letters

from rewards import algebra, evaluation, intervals
from rewards.latex import Node
from rewards.numeric import within_rounding
from rewards.tokens import TooBig
from rewards.units import takes_back

Prove = Callable[[Node, Node], bool | None]

MAX_ITEMS = 40
_WORDS = re.compile(r"[a-z][a-z ]*+")
_INFINITY = intervals.INFINITY
_REAL_LINE = ("group", "()", (("neg", _INFINITY), _INFINITY))
_USUAL_ORDERS = (["r", "theta"], ["r", "theta", "z"], ["alpha", "beta"], ["alpha", "beta", "gamma"])
_BRACKETS = {"<": ("(", ")"), "<=": ("[", "]"), ">": ("(", ")"), ">=": ("[", "]")}


def same(
    answer: Node, gold: Node, prove: Prove, rounding: bool = True, deadline: float = math.inf
) -> bool | None:
    """Does an answer say the same as the gold?

    Args:
        answer: what the model wrote, as a tree.
        gold: the tree of the gold; only its decimals may stand for rounded values.
        prove: asked about expressions that agree numerically and have different normal forms.
        rounding: False compares decimals of the gold exactly, too.
        deadline: of `time.monotonic()`, looked at before each pair of expressions.

    Raises:
        TooBig: a guard of the arithmetic, or the deadline.
    """
    return _Comparison(prove, rounding, deadline).same(answer, gold)


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """False if one is False, else None if one is undecided, else True."""
    result: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            result = None
    return result


class _Comparison:
    def __init__(self, prove: Prove, rounding: bool, deadline: float) -> None:
        self.prove = prove
        self.rounding = rounding
        self.deadline = deadline

    def exactly(self, left: Node, right: Node) -> bool:
        """Are two parts of one and the same answer equal? Between them nothing is rounded."""
        return _Comparison(self.prove, False, self.deadline).same(left, right) is True

    def same(self, answer: Node, gold: Node) -> bool | None:
        answer, gold = _expand_signs(answer), _expand_signs(gold)
        if answer == gold and answer[0] != "rel":
            return True
        named, gold_named = _assignments(answer), _assignments(gold)
        if _all_assignments(named) and _all_assignments(gold_named):
            return self.any_order(named[1], gold_named[1])
        if _is_condition(answer) and _is_condition(gold):
            names, gold_names = intervals.variables(answer), intervals.variables(gold)
            if names and gold_names and names != gold_names:
                return False
            if answer[0] == gold[0] != "rel":
                verdict = self.any_order(answer[1], gold[1])
                if verdict or len(gold_names) > 1:
                    return verdict
        if gold[0] == "rel" and answer[0] == "rel":
            verdict = self.same_relation(answer, gold)
            if verdict is not False or not _may_drop_names(answer, gold):
                return verdict
        answer, gold = self.bare(answer), self.bare(gold)
        if answer is None or gold is None or "rel" in (answer[0], gold[0]):
            return False
        return self.same_value(answer, gold)

    def bare(self, node: Node) -> Node | None:
        """A node without the name in front of it, as an interval
        where it is an inequality; None for a contradiction,
        and where the names are needed to tell the values apart.
        """
        if node[0] in ("list", "set"):
            parts = [item if _is_order(item) or item[0] != "rel" else self.bare(item) for item in node[1]]
            if None in parts:
                return None
            names = [item[2][0] for item in node[1] if _is_assignment(item)]
            if len(set(names)) < 2:
                return (node[0], tuple(parts))
            return ("group", "()", tuple(parts)) if _are_in_order(names) else None
        if node[0] != "rel":
            return _REAL_LINE if node == ("const", "R") else node
        operators, sides = node[1], node[2]
        if operators == ("in",):
            return self.bare(sides[1]) if _is_name(sides[0]) else None
        if _is_order(node):
            return _as_interval(node) or node
        if operators == ("!=",) and sides[0][0] == "sym":
            return ("minus", _REAL_LINE, ("set", sides[1:]))
        if any(operator not in ("=", "≈") for operator in operators):
            return node
        while len(sides) > 1 and _is_name(sides[0]):
            operators, sides = operators[1:], sides[1:]
        if len(sides) == 2 and _is_name(sides[1]):  # 2 = x
            return sides[0]
        return self.chain_value(operators, sides)

    def chain_value(self, operators: Sequence[str], values: Sequence[Node]) -> Node | None:
        """What `a = b ≈ c` amounts to: the last part before a
        rounding, if all parts are proved equal, and the rest is
        that part rounded; None for a contradiction.
        """
        exact = operators.index("≈") if "≈" in operators else len(operators)
        for operator, left, right in zip(operators, values, values[1:], strict=False):
            rounded = operator == "≈" and _rounds_to(values[exact], right)
            if not rounded and not self.exactly(left, right):
                return None
        return values[exact]

    def same_relation(self, answer: Node, gold: Node) -> bool | None:
        a, b = _one_relation(answer), _one_relation(gold)
        if a is None or b is None:
            parts_match = answer[1] == gold[1] and len(answer[2]) == len(gold[2])
            return parts_match and all_of(self.same(x, y) for x, y in zip(answer[2], gold[2], strict=True))
        (operator_a, left_a, right_a), (operator_b, left_b, right_b) = a, b
        if "in" in (operator_a, operator_b):
            return operator_a == operator_b and all_of(
                [self.same(left_a, left_b), self.same(right_a, right_b)]
            )
        if not all(_is_expression(side) for side in (left_a, right_a, left_b, right_b)):
            in_place = operator_a == operator_b
            return in_place and all_of([self.same(left_a, left_b), self.same(right_a, right_b)])
        difference_a, difference_b = ("+", left_a, ("neg", right_a)), ("+", left_b, ("neg", right_b))
        sign = algebra.proportional(difference_a, difference_b)
        if sign is None or not _has(gold, "sym"):
            in_place = operator_a == operator_b and all_of(
                [self.same(left_a, left_b), self.same(right_a, right_b)]
            )
            return True if in_place is True else (None if in_place is None else False)
        return sign != 0 and operator_a == (
            operator_b if sign > 0 else intervals.FLIPPED.get(operator_b, operator_b)
        )

    # Values

    def same_value(self, answer: Node, gold: Node) -> bool | None:
        if gold == ("const", "R"):
            gold = _REAL_LINE
        if answer[0] in _SETS or gold[0] in _SETS:
            return self.same_union(answer, gold)
        if "matrix" in (answer[0], gold[0]):
            return self.same_matrix(answer, gold)
        if gold[0] in ("list", "set", "group", "ratio") or answer[0] in ("list", "set", "group", "ratio"):
            return self.same_collection(answer, gold)
        if "text" in (answer[0], gold[0]) or "base" in (answer[0], gold[0]):
            return answer == gold
        return self.same_expression(answer, gold)

    def same_collection(self, answer: Node, gold: Node) -> bool | None:
        kinds = (answer[0], gold[0])
        for one, other in ((answer, gold), (gold, answer)):  # a set of one solution is that solution
            if one[0] == "set" and len(one[1]) == 1 and other[0] not in ("set", "list", "group", "ratio"):
                return self.same(*((one[1][0], other) if one is answer else (other, one[1][0])))
        if kinds == ("ratio", "ratio"):
            return self.in_order(answer[1], gold[1])
        if "group" in kinds:
            if not self.brackets_agree(answer, gold):
                return False
            return self.in_order(answer[-1], gold[-1])
        if not set(kinds) <= {"list", "set"}:
            return False
        return self.any_order(self.distinct(answer), self.distinct(gold))

    def distinct(self, node: Node) -> Sequence[Node]:
        """The items; of a set in braces each once."""
        if node[0] != "set" or len(node[1]) > MAX_ITEMS:
            return node[1]
        items: list[Node] = []
        for item in node[1]:
            if not any(self.exactly(item, other) for other in items):
                items.append(item)
        return items

    def brackets_agree(self, answer: Node, gold: Node) -> bool:
        if answer[0] == gold[0] == "group":
            return answer[1] == gold[1]
        other = answer if gold[0] == "group" else gold
        group = gold if gold[0] == "group" else answer
        return other[0] == "list" and group[1] == "()"

    def in_order(self, answers: Sequence[Node], golds: Sequence[Node]) -> bool | None:
        if len(answers) != len(golds):
            return False
        return all_of(self.same(a, g) for a, g in zip(answers, golds, strict=True))

    def any_order(self, answers: Sequence[Node], golds: Sequence[Node]) -> bool | None:
        """Every gold has its answer and every answer its gold; none serves twice."""
        if len(answers) != len(golds):
            return False
        if len(golds) > MAX_ITEMS:
            raise TooBig("items")
        left = list(answers)
        undecided = False
        for gold in golds:
            verdicts = [
                (answer[0] == "set") is (gold[0] == "set") and self.same(answer, gold) for answer in left
            ]
            if True in verdicts:
                left.pop(verdicts.index(True))
            elif None in verdicts:
                left.pop(verdicts.index(None))
                undecided = True
            else:
                return False
        return None if undecided else True

    def same_union(self, answer: Node, gold: Node) -> bool | None:
        kinds = {answer[0], gold[0]}
        if "list" in kinds:  # (0, 1), (2, 3) may be points
            return False
        if kinds <= {"union", "group", "set"}:
            verdict = self.any_order(_flatten(answer), _flatten(gold))
        elif kinds == {"minus"} or kinds == {"cap"}:
            verdict = all_of([self.same(answer[1], gold[1]), self.same(answer[2], gold[2])])
        else:
            verdict = None
        if verdict:
            return True
        same_set = intervals.same_set(answer, gold)
        return verdict if same_set is None else same_set

    def same_matrix(self, answer: Node, gold: Node) -> bool | None:
        if answer[0] != gold[0]:
            return False
        rows, gold_rows = answer[1], gold[1]
        if len(rows) != len(gold_rows) or len(rows[0]) != len(gold_rows[0]):
            return False
        return all_of(self.in_order(row, gold_row) for row, gold_row in zip(rows, gold_rows, strict=True))

    def same_expression(self, answer: Node, gold: Node) -> bool | None:
        if answer[0] == "deg" or gold[0] == "deg":  # a missing degree sign is a missing unit
            answer, gold = (node[1] if node[0] == "deg" else node for node in (answer, gold))
        if _INFINITY in (answer, gold) or not (_is_expression(answer) and _is_expression(gold)):
            return False
        if self.rounding and _rounds_to(answer, gold):
            return True
        if time.monotonic() > self.deadline:
            raise TooBig("the time")
        verdict = algebra.equal(answer, gold)
        if verdict is not None:
            return verdict
        if evaluation.differ(answer, gold):
            return False
        return self.prove(answer, gold)


# -------------------------------------------------------------------------------------------------------
# Shapes


_EXPRESSIONS = frozenset(["num", "sym", "const", "+", "*", "/", "^", "neg", "fn", "deg"])


_SETS = frozenset(["union", "cap", "minus", "all", "any"])


def _is_expression(node: Node) -> bool:
    stack = [node]
    while stack:
        current = stack.pop()
        if current[0] not in _EXPRESSIONS or current in (_INFINITY, ("const", "R")):
            return False
        if current[0] not in ("num", "sym", "const"):
            stack += [child for child in current[1:] if isinstance(child, tuple)]
    return True


def _is_name(node: Node) -> bool:
    """`x`, `x_1`, `f(x)`, words: what a value is assigned to."""
    if node[0] == "fn":  # but no factorial, floor or gcd
        return node[1].partition("_")[0] in ("f", "g", "h")
    if node[0] == "text":
        return _WORDS.fullmatch(node[1]) is not None and not takes_back(node[1])
    if node[0] == "group":  # (x, y) = (1, 2)
        return _are_in_order(node[2])
    product_of_symbols = node[0] == "*" and all(part[0] == "sym" for part in node[1:])  # AB = 5
    return node[0] == "sym" or product_of_symbols


def _are_in_order(symbols: Sequence[Node]) -> bool:
    """May these names be left out, as everyone puts them in this order? (x, y), but not (y, x) or (b, m)."""
    names = [symbol[1] for symbol in symbols if symbol[0] == "sym"]
    if len(names) < len(symbols):
        return False
    if all(len(name) == 1 for name in names):
        return "".join(names) in ascii_letters
    indexed = len({name.partition("_")[0] for name in names}) == 1
    return (indexed and names == sorted(names)) or names in _USUAL_ORDERS


def _assignments(node: Node) -> Node:
    """`(x, y) = (1, 2)` as `x = 1, y = 2`; other nodes as they are."""
    if node[0] != "rel" or node[1] != ("=",) or not node[2][0][0] == node[2][1][0] == "group":
        return node
    names, values = (side[2] for side in node[2])
    if len(names) != len(values) or any(name[0] != "sym" for name in names):
        return node
    return ("list", tuple(("rel", ("=",), pair) for pair in zip(names, values, strict=True)))


def _is_assignment(node: Node) -> bool:
    return node[0] == "rel" and set(node[1]) <= {"=", "≈"} and _is_name(node[2][0])


def _all_assignments(node: Node) -> bool:
    return node[0] in ("list", "set") and bool(node[1]) and all(_is_assignment(item) for item in node[1])


def _is_order(node: Node) -> bool:
    return node[0] == "rel" and all(operator in _BRACKETS for operator in node[1])


def _may_drop_names(answer: Node, gold: Node) -> bool:
    """Is what remains of two relations without their names worth a look? x >= 2 and x in [2, oo)."""
    if _is_range(answer) and _is_range(gold):
        return intervals.variables(answer) == intervals.variables(gold)
    if _is_assignment(gold):
        return _is_assignment(answer) and answer[2][0] == gold[2][0]
    return _is_order(gold)


def _is_range(node: Node) -> bool:
    return _is_order(node) or (node[0] == "rel" and node[1] == ("in",))


def _is_condition(node: Node) -> bool:
    return _is_order(node) or node[0] in ("all", "any")


def _one_relation(node: Node) -> tuple[str, Node, Node] | None:
    return (node[1][0], *node[2]) if len(node[1]) == 1 else None


def _as_interval(node: Node) -> Node | None:
    """`x > 5` or `1 < x <= 3` as an interval; None where it is not that simple."""
    operators, sides = node[1], node[2]
    if len(operators) == 1:
        left, right = sides
        if left[0] != "sym":
            return (
                _as_interval(("rel", (intervals.FLIPPED[operators[0]],), (right, left)))
                if right[0] == "sym"
                else None
            )
        opening, closing = _BRACKETS[operators[0]]
        if operators[0][0] == "<":
            return ("group", "(" + closing, (("neg", _INFINITY), right))
        return ("group", opening + ")", (right, _INFINITY))
    if len(operators) == 2 and sides[1][0] == "sym" and operators[0][0] == operators[1][0]:
        if operators[0][0] == ">":
            return _as_interval(
                ("rel", tuple(intervals.FLIPPED[op] for op in reversed(operators)), tuple(reversed(sides)))
            )
        return ("group", _BRACKETS[operators[0]][0] + _BRACKETS[operators[1]][1], (sides[0], sides[2]))
    return None


def _flatten(node: Node) -> list[Node]:
    if node[0] != "union":
        return [node]
    return [part for child in node[1:] for part in _flatten(child)]


def _has(node: Node, kind: str) -> bool:
    stack = [node]
    while stack:
        current = stack.pop()
        if current[0] == kind:
            return True
        stack += [child for child in current if isinstance(child, tuple) and child]
    return False


def _expand_signs(node: Node) -> Node:
    r"""An item with `\pm` as the list of its two readings; upper signs go together."""
    if not _has(node, "pm"):
        return node
    if node[0] in ("list", "set"):
        items: list[Node] = []
        for item in node[1]:
            expanded = _expand_signs(item)
            items += expanded[1] if _has(item, "pm") else [expanded]
        return (node[0], tuple(items))
    return ("list", (_choose_sign(node, 1), _choose_sign(node, -1)))


def _choose_sign(node, upper: int):
    if not isinstance(node, tuple):
        return node
    if node and node[0] == "pm":
        inner = _choose_sign(node[2], upper)
        return inner if node[1] * upper > 0 else ("neg", inner)
    return tuple(_choose_sign(child, upper) for child in node)


# -------------------------------------------------------------------------------------------------------
# Rounded decimals


def _places(node: Node) -> int | None:
    """The decimals of a written number, None where the node is not one."""
    if node[0] == "neg":
        node = node[1]
    return node[2] if node[0] == "num" else None


def _rounds_to(answer: Node, gold: Node) -> bool:
    """Is the gold a decimal that the answer rounds to?"""
    places = _places(gold)
    if not places or not _is_expression(answer):
        return False
    gold_value = -gold[1][1] if gold[0] == "neg" else gold[1]
    value = algebra.rational(answer)
    if value is None:
        real = evaluation.real_value(answer)
        if real is None:
            return False
        value = Fraction(real)
    return within_rounding(Fraction(value), Fraction(gold_value), places)
