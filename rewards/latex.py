r"""A small parser of our own for answers in LaTeX or plain maths: text to a tree of tuples, nothing computed.

A tree is `(kind, …)`:

    ("num", value, places)   ("sym", name)   ("const", "pi" | "e" | "i" | "inf" | "R")   ("text", words)
    ("+", a, b, …)   ("*", a, b, …)   ("/", a, b)   ("^", a, b)   ("neg", a)   ("pm", sign, a)
    ("fn", name, a, …)   ("deg", a)   ("base", digits, base)
    ("group", brackets, items)      (1, 2) and [0, 1): a tuple or an interval
    ("set", items)   ("list", items)   ("ratio", items)   ("matrix", rows)
    ("union" | "cap" | "minus", a, b)
    ("rel", operators, sides)       a < x <= b
    ("all" | "any", conditions)     x > 1 and x < 2; x < 1 or x > 2

The guards of `rewards.tokens` come first. The parser's recursion and the depth of the tree are bounded by
`enter` and `MAX_CHAIN`.
"""

import re
from fractions import Fraction

from rewards.tokens import (
    FUNCTIONS,
    MAX_CHAIN,
    MAX_CHARS,
    MAX_NESTING,
    TooBig,
    Unreadable,
    check_guards,
    join_thousands,
    tokenize,
    translate,
)

Node = tuple

_GREEK = frozenset(
    [
        "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta",
        "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi",
        "omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega", "ell",
    ]
)  # fmt: skip
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "\\lt": "<", "\\gt": ">", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=",
    "\\ge": ">=",
    "\\geq": ">=", "\\geqslant": ">=", "\\ne": "!=", "\\neq": "!=", "<=": "<=", ">=": ">=", "!=": "!=",
    "==": "=",
    "\\in": "in", "\\approx": "≈", "\\equiv": "≡",
}  # fmt: skip
_ENDS_TERM = frozenset(
    [
        "", "+", "-", ",", ";", ")", "]", "}", "\\}", "&", "\\\\", "\\pm", "\\mp", "\\cup", "\\cap",
        "\\setminus", "and", "or", ":", "\\rangle", "\\rfloor", "\\rceil", "\\mid", "\\rvert", "!", "%",
        "'", "\\%", "^", "_", "\\circ", *_RELATIONS,
    ]
)  # fmt: skip
_LETTER_DIGITS = re.compile(r"\s*+(?=[A-Fa-f]*[0-9])([0-9A-Fa-f]++)_\{?\s*+(1[1-6])\s*+\}?\s*+")
_HALF = ("num", Fraction(1, 2), None)
_MULTIPLY = frozenset(["*", "\\cdot", "\\times", "\\ast"])
_DIVIDE = frozenset(["/", "\\div"])
_MATRICES = frozenset(["pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array"])
_SETS = {"\\cup": "union", "\\cap": "cap", "\\setminus": "minus"}
_ACCENTS = frozenset(["\\overline", "\\vec", "\\hat", "\\bar", "\\tilde", "\\widehat", "\\overrightarrow"])
_TRANSPARENT = frozenset(["\\boxed", "\\fbox", "\\underline", "\\mathop", "\\rm", "\\bf"])


def parse(text: str) -> Node:
    """The tree of an answer.

    Raises:
        Unreadable: not maths that this parser knows.
        TooBig: a guard.
    """
    text = text[: MAX_CHARS + 1] if len(text) > 4 * MAX_CHARS else text
    text = translate(text)
    check_guards(text)
    if "," in text:
        text = join_thousands(text)
    digits = _LETTER_DIGITS.fullmatch(text) if "_" in text else None
    if digits:
        return ("base", digits.group(1).upper().lstrip("0"), int(digits.group(2)))
    parser = _Parser(tokenize(text))
    tree = parser.parse_list()
    if parser.peek():
        raise Unreadable(f"unexpected {parser.peek()!r}")
    return tree


def _is_inequality(node: Node) -> bool:
    return node[0] == "rel" and any(operator in ("<", ">", "<=", ">=", "!=") for operator in node[1])


def _is_variable(node: Node) -> bool:
    """`x`, or `x \\in \\mathbb{R}`: what a set by condition may start with."""
    if node[0] == "rel" and node[1] == ("in",) and node[2][1] == ("const", "R"):
        return _is_variable(node[2][0])
    return node[0] == "sym"


class _Parser:
    """Recursive descent over the tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars_open = 0
        self.is_set = False  # inside the braces of a set, where a colon is no ratio

    def peek(self) -> str:
        return self.tokens[self.at]

    def take(self) -> str:
        token = self.tokens[self.at]
        if token:
            self.at += 1
        return token

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise TooBig("nesting")

    def expect(self, token: str) -> None:
        got = self.take()
        if got != token:
            raise Unreadable(f"expected {token!r}, got {got!r}")

    # Lists, relations, sets

    def parse_list(self) -> Node:
        """Items between commas, semicolons, "and", "or"; a single item is itself."""
        items = [self.relation()]
        joints = set()
        while self.peek() in (",", ";", "and", "or"):
            joint = self.take()
            if joint in (",", ";") and self.peek() in ("and", "or"):  # "1, 2, and 3"
                joint = self.take()
            joints.add(joint)
            items.append(self.relation())
        if len(items) == 1:
            return items[0]
        if not joints & {"and", "or"} or not any(_is_inequality(item) for item in items):
            return ("list", tuple(items))
        if len(joints) > 1 or not all(item[0] == "rel" for item in items):
            raise Unreadable("conditions joined in several ways")
        return ("all" if joints == {"and"} else "any", tuple(items))

    def relation(self) -> Node:
        sides = [self.ratio()]
        operators = []
        while self.peek() in _RELATIONS:
            operators.append(_RELATIONS[self.take()])
            sides.append(self.ratio())
        return ("rel", tuple(operators), tuple(sides)) if operators else sides[0]

    def ratio(self) -> Node:
        items = [self.set_expression()]
        while self.peek() == ":" and not self.is_set:
            self.take()
            items.append(self.set_expression())
        return items[0] if len(items) == 1 else ("ratio", tuple(items))

    def set_expression(self) -> Node:
        node = self.sum()
        for _ in range(MAX_CHAIN):
            if self.peek() not in _SETS:
                return node
            node = (_SETS[self.take()], node, self.sum())
        raise TooBig("unions")

    # Arithmetic

    def sum(self) -> Node:
        terms = [self.signed_term()]
        while self.peek() in ("+", "-", "\\pm", "\\mp"):
            terms.append(self.signed_term())
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def signed_term(self) -> Node:
        sign = self.peek()
        if sign in ("+", "-", "\\pm", "\\mp"):
            self.take()
            self.enter()
            node = self.signed_term()
            self.depth -= 1
            if sign == "+":
                return node
            return ("neg", node) if sign == "-" else ("pm", 1 if sign == "\\pm" else -1, node)
        return self.term()

    def term(self) -> Node:
        factors = [self.factor()]
        divisions = 0
        while True:
            token = self.peek()
            if token in _MULTIPLY:
                self.take()
                factors.append(self.signed_factor())
            elif token in _DIVIDE:
                self.take()
                divisor = self.signed_factor()
                divisions += 1
                if divisions > MAX_CHAIN:
                    raise TooBig("divisions")
                left = factors[0] if len(factors) == 1 else ("*", *factors)
                factors = [("/", left, divisor)]
            elif token in _ENDS_TERM or (token == "|" and self.bars_open) or token.startswith("\\end"):
                break
            else:
                factors.append(self.implicit_factor(factors[-1]))
        return factors[0] if len(factors) == 1 else ("*", *factors)

    def signed_factor(self) -> Node:
        if self.peek() == "-":
            self.take()
            return ("neg", self.factor())
        return self.factor()

    def implicit_factor(self, before: Node) -> Node:
        """A factor written next to another; two bare numbers never are, but for a mixed number."""
        if self.peek()[0] in "0123456789.":
            raise Unreadable("two numbers side by side")
        if self.peek()[0] == '"' or before[0] == "text":
            raise Unreadable("words beside maths")
        return self.factor()

    def factor(self) -> Node:
        node = self.atom()
        for _ in range(MAX_CHAIN):
            token = self.peek()
            if token in ("^", "**"):
                self.take()
                if self.peek() == "\\circ" or self.tokens[self.at : self.at + 3] == ["{", "\\circ", "}"]:
                    self.at += 1 if self.peek() == "\\circ" else 3
                    node = ("deg", node)
                else:
                    node = ("^", node, self.exponent())
            elif token == "!":
                self.take()
                if self.peek() == "!":
                    raise Unreadable("a double factorial")
                node = ("fn", "factorial", node)
            elif token in ("%", "\\%"):
                self.take()
                node = ("/", node, ("num", 100, None))
            else:
                return node
        raise TooBig("signs")

    def exponent(self) -> Node:
        if self.peek() == "-":
            self.take()
            return ("neg", self.exponent_atom())
        return self.exponent_atom()

    def exponent_atom(self) -> Node:
        node = self.atom()
        if self.peek() in ("^", "**"):  # 2^3^4 is 2^(3^4) in plain text
            self.take()
            self.enter()
            node = ("^", node, self.exponent())
            self.depth -= 1
        return node

    # Atoms

    def atom(self) -> Node:
        self.enter()
        node = self.any_atom()
        self.depth -= 1
        return node

    def any_atom(self) -> Node:
        token = self.take()
        first = token[:1]
        if first.isdigit() or first == ".":
            return self.number(token)
        if first == "\\":
            return self.command(token)
        if first == '"':
            return ("text", " ".join(token[1:].lower().split()))
        if token in ("(", "["):
            return self.bracketed(token)
        if token == "{":
            return self.braced()
        if token == "|":
            return self.absolute("|")
        if token == "abs":
            return ("fn", "abs", self.argument())
        if first.isalpha():
            return self.symbol(token)
        raise Unreadable(f"unexpected {token!r}")

    def number(self, token: str) -> Node:
        if self.peek() == "_":
            self.take()
            base = self.argument()
            if base[0] != "num" or "." in token:
                raise Unreadable("a subscript on a number")
            return ("base", token.lstrip("0"), base[1])
        whole, point, decimals = token.partition(".")
        if self.peek() == "\\bar" or (self.peek() == "\\overline" and self.tokens[self.at + 1] == "{"):
            return self.repeating(whole, decimals)
        if point:
            return ("num", Fraction(int(whole + decimals), 10 ** len(decimals)), len(decimals))
        node = ("num", int(whole), None)
        if self.peek() in ("\\frac", "\\tfrac", "\\dfrac"):
            return self.mixed(node)
        return node

    def repeating(self, whole: str, decimals: str) -> Node:
        r"""`0.1\overline{6}` exactly; the point may stand before the bar alone."""
        self.take()
        is_braced = self.peek() == "{"
        if is_braced:
            self.take()
        period = self.take()
        if not period.isdigit() or not (is_braced or len(period) == 1):
            raise Unreadable("a bar over a number")
        if is_braced:
            self.expect("}")
        scale = 10 ** len(decimals)
        return (
            "num",
            Fraction(int(whole + decimals), scale) + Fraction(int(period), (10 ** len(period) - 1) * scale),
            None,
        )

    def mixed(self, whole: Node) -> Node:
        r"""`2\frac{1}{3}` is two and a third where the fraction
        is a proper one of plain integers, else a product.
        """
        fraction = self.atom()
        _, top, bottom = fraction
        proper = top[0] == bottom[0] == "num" and top[2] is bottom[2] is None and top[1] < bottom[1]
        return ("+", whole, fraction) if proper else ("*", whole, fraction)

    def symbol(self, token: str) -> Node:
        if token == "i":
            return ("const", "i")
        if token == "e":
            return ("const", "e")
        name = token + self.subscript()
        if token in "fgh" and self.peek() == "(":
            self.take()
            return ("fn", name, *self.items_until(")"))
        return ("sym", name)

    def subscript(self) -> str:
        if self.peek() != "_":
            return ""
        self.take()
        token = self.take()
        if token != "{":
            return "_" + token
        parts = []
        while self.peek() not in ("}", ""):
            parts.append(self.take())
        self.expect("}")
        return "_" + "".join(parts)

    def bracketed(self, opening: str) -> Node:
        bars, self.bars_open = self.bars_open, 0
        inner = self.parse_list()
        self.bars_open = bars
        closing = self.take()
        if closing not in (")", "]"):
            raise Unreadable("a bracket left open")
        if inner[0] == "list":
            return ("group", opening + closing, inner[1])
        if opening == "(" and closing == ")":
            is_whole = inner[0] == "num" and inner[2] is None
            return self.number(str(inner[1])) if is_whole and self.peek() == "_" else inner
        if opening == "[" and closing == "]":
            return ("group", "[]", (inner,))
        raise Unreadable("brackets that do not match")

    def braced(self) -> Node:
        inner = self.parse_list()
        self.expect("}")
        return ("set", inner[1]) if inner[0] == "list" else inner

    def items_until(self, closing: str) -> tuple[Node, ...]:
        inner = self.parse_list()
        self.expect(closing)
        return inner[1] if inner[0] == "list" else (inner,)

    def absolute(self, closing: str) -> Node:
        self.bars_open += 1
        inner = self.sum()
        self.bars_open -= 1
        self.expect(closing)
        return ("fn", "abs", inner)

    def argument(self) -> Node:
        """What a command takes: a group, or the next single
        sign; of a number only its first digit (`\\frac72`).
        """
        token = self.peek()
        if token[:1].isdigit() and len(token) > 1 and token.isdigit():
            self.tokens[self.at] = token[1:]
            return ("num", int(token[0]), None)
        if token == "-" or token in _ENDS_TERM:
            raise Unreadable(f"expected an argument, got {token!r}")
        return self.atom()

    def command(self, token: str) -> Node:
        name = token[1:]
        if name in ("frac", "tfrac", "dfrac", "cfrac"):
            return ("/", self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        if name == "pi":
            return ("const", "pi")
        if name == "infty":
            return ("const", "inf")
        if name in _GREEK:
            return ("sym", name.removeprefix("var") + self.subscript())
        if name in ("binom", "dbinom", "tbinom"):
            return ("fn", "binom", self.argument(), self.argument())
        if token in _TRANSPARENT:
            return self.argument()
        return self.rare_command(token)

    def rare_command(self, token: str) -> Node:
        if token == "\\{":
            return self.set_braces()
        if token in ("\\emptyset", "\\varnothing"):
            return ("set", ())
        if token == "\\langle":
            return ("group", "()", self.items_until("\\rangle"))
        if token in ("\\lfloor", "\\lceil"):
            name = token.removeprefix("\\l")
            return ("fn", name, *self.items_until("\\r" + name))
        if token in ("\\lvert", "\\|", "\\vert"):
            return self.absolute({"\\lvert": "\\rvert"}.get(token, token))
        if token.startswith("\\begin{"):
            return self.matrix(token)
        if token in _ACCENTS:
            return ("fn", token[1:], self.argument())
        if token.startswith("\\mathbb") and len(token) == 8:
            return ("const", "R") if token[7] == "R" else ("sym", token[1:])
        raise Unreadable(f"the command {token[:20]!r}")

    def set_braces(self) -> Node:
        if self.peek() == "\\}":
            self.take()
            return ("set", ())
        self.bars_open += 1  # so that the bar of {x | x > 0} ends the first part
        was_set, self.is_set = self.is_set, True
        inner = self.parse_list()
        self.bars_open -= 1
        if self.peek() in ("|", "\\mid", ":"):
            self.take()
            is_variable = _is_variable(inner)
            inner = self.parse_list()
            if inner[0] not in ("rel", "all", "any") or not is_variable:
                raise Unreadable("a set by condition")
        else:
            inner = ("set", inner[1] if inner[0] == "list" else (inner,))
        self.is_set = was_set
        self.expect("\\}")
        return inner

    def root(self) -> Node:
        if self.peek() == "[":
            self.take()
            degree = self.sum()
            self.expect("]")
            return ("^", self.argument(), ("/", ("num", 1, None), degree))
        return ("^", self.argument(), _HALF)

    def function(self, name: str) -> Node:
        base = power = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.argument()
            else:
                power = self.exponent()
        if name in ("gcd", "lcm", "max", "min"):
            self.expect("(")
            return ("fn", name, *self.items_until(")"))
        argument = self.function_argument()
        if power == ("neg", ("num", 1, None)) and name in ("sin", "cos", "tan"):
            name, power = "arc" + name, None
        node = ("fn", name, argument) if base is None else ("fn", name, argument, base)
        return node if power is None else ("^", node, power)

    def function_argument(self) -> Node:
        r"""Of `\sin 2x \cos x`: the factors side by side up to
        the next function or sign; of `\sin(x)y` the bracket.
        """
        if self.peek() == "-":
            self.take()
            return ("neg", self.factor())
        is_group = self.peek() in ("(", "{")
        factors = [self.factor()]
        while not is_group and not self.ends_argument(self.peek()):
            factors.append(self.implicit_factor(factors[-1]))
        if self.peek() in _DIVIDE and not is_group:  # \sin \pi/6, \cos x/2
            self.take()
            product = factors[0] if len(factors) == 1 else ("*", *factors)
            return ("/", product, self.factor())
        return factors[0] if len(factors) == 1 else ("*", *factors)

    def ends_argument(self, token: str) -> bool:
        return (
            token in _ENDS_TERM
            or token in _MULTIPLY
            or token in _DIVIDE
            or token in ("(", "[", "|", "\\rvert")
            or token[1:] in FUNCTIONS
            or token.startswith("\\end")
        )

    def matrix(self, token: str) -> Node:
        name = token[token.index("{") + 1 : token.index("}")]
        if name not in _MATRICES:
            raise Unreadable(f"the environment {name!r}")
        rows = [[self.relation()]]
        while True:
            separator = self.take()
            if separator == "&":
                rows[-1].append(self.relation())
            elif separator == "\\\\":
                if self.peek().startswith("\\end"):
                    continue
                rows.append([self.relation()])
            elif separator == f"\\end{{{name}}}":
                break
            else:
                raise Unreadable("a matrix left open")
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("rows of different lengths")
        return ("matrix", tuple(tuple(row) for row in rows))
