"""Guards and tokens: what stands between the text of a model and the parser of `rewards.latex`.

The guards check length, alphabet, nesting and digits in one pass, before anything is built.
"""

import re

MAX_CHARS = 1000
MAX_NESTING = 30
MAX_CHAIN = 30  # signs after one another that nest the tree without brackets: 5!!!, 1/2/3
MAX_DIGITS = 400


class Unreadable(ValueError):
    """The text is not maths that this parser knows; it may still be words, or maths for another parser."""


class TooBig(ValueError):
    """The text passes a guard: too long, too deep, too many digits."""


FUNCTIONS = frozenset(
    [
        "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh",
        "ln", "log", "exp", "gcd", "lcm", "max", "min",
    ]
)  # fmt: skip
_WORDS = {
    "sqrt": "\\sqrt", "pi": "\\pi", "infinity": "\\infty", "infty": "\\infty", "inf": "\\infty",
    "oo": "\\infty",
    "or": "or", "and": "and", "asin": "\\arcsin", "acos": "\\arccos", "atan": "\\arctan", "abs": "abs",
    "theta": "\\theta", "alpha": "\\alpha", "beta": "\\beta", "lambda": "\\lambda", "phi": "\\phi",
    **{name: "\\" + name for name in FUNCTIONS},
}  # fmt: skip
_DROPPED = re.compile(
    r"(?<!\\)\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|biggl?|biggr?|displaystyle|textstyle|limits|quad|qquad|boldsymbol)(?![A-Za-z])"
    r"|(?<!\\)\\[,;:!> ]|~|\\phantom\{[^{}]*\}|\$"
)
_GROUPED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:\{,\}|,?\\[,!],?|\\ |~| )[0-9]{3})++(?![0-9])")
_UNION_LETTER = re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])")
_RAISED = re.compile(r"⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]++")
_LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_TIMES = re.compile(r"(?<=[0-9]) [xX] (?=[0-9])")  # 3 x 6 = 18, but 3 x 6 alone may be a shape
_LETTERS = re.compile(r"[A-Z](?:\s*,\s*[A-Z])++")
_IN_WORD = re.compile(r"(?<=[A-Za-z] )in(?= [\[(])")
_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "π": "\\pi ", "√": "\\sqrt ",
        "∞": "\\infty ", "∪": "\\cup ", "∩": "\\cap ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∈": "\\in ",
        "±": "\\pm ", "°": "^\\circ ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ",
        "½": "\\frac12 ", "¼": "\\frac14 ", "¾": "\\frac34 ", "⅓": "\\frac13 ", "⅔": "\\frac23 ",
        "⅛": "\\frac18 ",
        "∅": "\\emptyset ", "ℝ": "\\mathbb{R}",
        "（": "(", "）": ")", "，": ",", "′": "'",
    }
)  # fmt: skip
_TOKEN = re.compile(
    r"\s+|(?P<scientific>[0-9]+(?:\.[0-9]+)?[eE][-+]?[0-9]{1,4}(?![0-9]))|(?P<number>[0-9]+(?:\{,\}[0-9]{3})+(?![0-9])|[0-9]+(?:\.(?:[0-9]+|(?=\\(?:overline|bar))))?|\.[0-9]+)"
    r"|\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname|mathbb|mathcal)\*?\s*\{(?P<text>[^{}\\]*)\}"
    r"|(?P<env>\\(?:begin|end)\s*\{[a-zA-Z]+\*?\}(?:\{[lcr|]*\})?)"
    r"|(?P<token>\\\\|\\[A-Za-z]+|\\[{}|%$]|<=|>=|(?<![0-9])!=|==|\*\*|[-+*/^_=<>(){}\[\],;:!|%&'])"
    r"|(?P<word>[A-Za-z]+)"
)
_ALPHABET = re.compile(r"[\x20-\x7e\s]*+")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})++(?![0-9,])")
_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_BRACKETS = re.compile(r"[{}()\[\]]")


def check_guards(text: str) -> None:
    """Refuse text that no honest short answer looks like, in one pass and before any parser sees it.

    Raises:
        TooBig: length, nesting or digits.
        Unreadable: characters outside of plain ASCII, once the usual signs are translated.
    """
    if len(text) > MAX_CHARS:
        raise TooBig(f"{len(text)} characters")
    if not _ALPHABET.fullmatch(text):
        raise Unreadable("characters outside of the alphabet")
    if _LONG_NUMBER.search(text):
        raise TooBig("digits")
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += 1 if match.group() in "{([" else -1
        if depth > MAX_NESTING:
            raise TooBig("nesting")


def translate(text: str) -> str:
    """The usual Unicode signs of maths as LaTeX, spacing commands dropped."""
    if not text.isascii():
        text = _RAISED.sub(lambda match: f"^{{{match.group().translate(_LOWERED)}}}", text).translate(
            _UNICODE
        )
    if "+/-" in text:
        text = text.replace("+/-", "\\pm ")
    if "=" in text:
        text = _TIMES.sub("*", text)
    if "\\" in text or "~" in text or "$" in text:
        text = _GROUPED.sub(lambda match: re.sub("[^0-9]", "", match.group()), text)
        text = _DROPPED.sub(" ", text)
    if " in " in text:
        text = _IN_WORD.sub("\\\\in", text)
    return _UNION_LETTER.sub("\\\\cup", text) if "U" in text else text


def join_thousands(text: str) -> str:
    """`1,234` is one number where no bracket stands around it; inside brackets the comma separates."""
    bare = text.replace("{,}", "")
    if any(bracket in bare for bracket in "([{"):
        return bare
    return _THOUSANDS.sub(lambda match: match.group().replace(",", ""), bare)


def tokenize(text: str) -> list[str]:
    """Tokens: numbers, commands, single letters, signs, `"words` for text, "" at the end."""
    tokens: list[str] = []
    position = 0
    length = len(text)
    while position < length:
        match = _TOKEN.match(text, position)
        if not match:
            raise Unreadable(f"unexpected {text[position]!r}")
        position = match.end()
        kind = match.lastgroup
        if kind == "token":
            tokens.append(match.group())
        elif kind == "number":
            tokens.append(match.group().replace("{,}", ""))
        elif kind == "scientific":
            tokens += _split_scientific(match.group())
        elif kind == "word":
            tokens += _split_word(match.group())
        elif kind == "text":
            tokens += _split_text(match.group(), match.group("text"))
        elif kind == "env":
            tokens.append(match.group().replace(" ", ""))
    if len(tokens) > MAX_CHARS:
        raise TooBig("tokens")
    tokens.append("")
    return tokens


def _split_scientific(number: str) -> list[str]:
    mantissa, _, exponent = number.lower().partition("e")
    sign = ["-"] if exponent[0] == "-" else []
    return ["(", mantissa, "*", "10", "^", "(", *sign, exponent.lstrip("+-"), ")", ")"]


def _split_word(word: str) -> list[str]:
    if len(word) == 1:
        return [word]
    if word in _WORDS:
        return [_WORDS[word]]
    if word.lower() in ("or", "and", "infinity"):
        return [_WORDS[word.lower()]]
    if len(word) > 3:
        raise Unreadable(f"the word {word[:20]!r}")
    return list(word)


def _split_text(command: str, words: str) -> list[str]:
    words = words.strip()
    if command.startswith("\\mathbb"):
        return ["\\mathbb" + words]
    if len(words) == 1 and words.isalpha() and command.startswith("\\math"):
        return [words]
    lowered = words.lower()
    if lowered in ("or", "and"):
        return [lowered]
    if _LETTERS.fullmatch(words):
        return list("".join(words.split()))
    if command.startswith("\\operatorname") and words in _WORDS:
        return [_WORDS[words]]
    return ['"' + words]
