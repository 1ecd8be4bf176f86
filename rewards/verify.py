"""Is the final answer of a completion the gold answer? The judge behind the reward, for hostile input.

In order: extraction from outside the thought, plain numbers compared exactly, algebra of our own on a
guarded parse, and what is left to SymPy and Math-Verify in a process that can be killed. "Could not decide
in time" is a third outcome.
"""

import re
import time
from typing import NamedTuple

from rewards import symbolic
from rewards.equivalence import same
from rewards.extraction import candidates, gold_answer
from rewards.latex import Node, parse
from rewards.numeric import read_number, same_number
from rewards.tokens import MAX_CHARS, TooBig, Unreadable, check_guards, translate
from rewards.units import same_unit, split_unit, takes_back

DEADLINE_S = 2.0  # from the call on; where a fresh child has to start, up to symbolic.START_S on top
MAX_OTHERS = 4  # different ways to write the same answer twice in one completion


class Verdict(NamedTuple):
    """How a completion was judged.

    Attributes:
        correct: None where it could not be decided within the limits; never to be confused with wrong.
        extracted: the answer that was judged, None where the completion gave none.
        method: how it was decided: "no answer", "hedged", "number", "text", "algebra", "symbolic" …
    """

    correct: bool | None
    extracted: str | None
    method: str


def is_correct(completion: str, gold: str) -> bool:
    """The strict judgement; undecided counts as not correct."""
    return judge(completion, gold).correct is True


def judge(completion: str, gold: str, strict: bool = True) -> Verdict:
    r"""Judge the final answer of a completion.

    Args:
        completion: as the model wrote it, the prefilled `<think>` included. Never executed, whatever it says.
        gold: bare (`18`, `\frac{3}{4}`), dollar-wrapped, boxed, or a worked solution that ends in `#### 18`.
        strict: False also takes the last number of an unmarked answer, and the last of several that disagree.
    """
    answers = candidates(completion, strict)
    if not answers:
        return Verdict(False, None, "no answer")
    answer = clean(answers[-1])
    deadline = time.monotonic() + DEADLINE_S
    if strict and len(answers) > 1 and not _agree(answers, answer, deadline):
        return Verdict(False, answer, "hedged")
    correct, method = same_answer(answer, clean(gold_answer(gold)), deadline)
    return Verdict(correct, answer, method)


def final_answer(completion: str) -> str | None:
    """What the lenient judgement would judge; None where there is no answer."""
    answers = candidates(completion, strict=False)
    return clean(answers[-1]) if answers else None


def same_answers(first: str, second: str) -> bool:
    """Do two answers of a model say exactly the same? What cannot be decided is not the same."""
    deadline = time.monotonic() + DEADLINE_S
    return same_answer(clean(first), clean(second), deadline, rounding=False)[0] is True


def _agree(answers: list[str], answer: str, deadline: float) -> bool:
    """Do several marked answers say exactly the same as the last? One that cannot be decided is a hedge."""
    others = {clean(other) for other in answers[:-1]} - {answer}
    return len(others) <= MAX_OTHERS and all(
        same_answer(other, answer, deadline, rounding=False)[0] is True for other in others
    )


def is_readable(gold: str) -> bool:
    """Does the judge understand a gold, so that more than the very same text is right?

    It does a number, a word, a choice, and maths: by our parser, or by Math-Verify's where that is asked.
    """
    text = clean(gold_answer(gold))
    is_word = _CHOICE.fullmatch(text) or _WORDS.fullmatch(_plain_words(text))
    if read_number(text) or is_word:
        return True
    try:
        text = split_unit(text)[0] if len(text) <= MAX_CHARS else text
        if not text or _tree(text) is not None:
            return bool(text)
        if not _BEYOND.search(text) or _MISREAD.search(text) or _BARE_WORD.search(_TEXT_MACRO.sub("", text)):
            return False
        check_guards(translate(_TEXT_MACRO.sub(r"\1", text)))
    except (TooBig, Unreadable):
        return False
    return True


# -------------------------------------------------------------------------------------------------------
# Two answers


_WRAPPERS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("**", "**"),
    ("`", "`"),
    ('"', '"'),
    ("“", "”"),
)
_DRESSED_NUMBER = re.compile(
    r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|boldsymbol)\s*+\{\s*+([-+$]?[0-9][^{}]*+)\}"
)
_CHOICE = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*+\{)?\s*+\(?\s*+([A-Z])\s*+\)?\s*+\}?(?:[.):]\s*+(.*+))?",
    re.DOTALL,
)
# "B) 15, C) 16", "B) 15, c", but not the article of "B) A dog".
_OPTION = re.compile(r"(?<![A-Za-z\\])(?!A [a-z])[A-Z](?![A-Za-z])|[,;]\s*[a-z](?![A-Za-z])")
# What our parser leaves to Math-Verify, and what that misreads: it drops dots and takes \frac172 for 1/72.
_BEYOND = re.compile(r"\\(?:sum|prod|lim|i{0,3}nt|oint)(?![A-Za-z])")
_MISREAD = re.compile(r"\\[lcdv]?dots|\.\.|…|frac\s*+(?:\{[^{}]*+\}|[0-9])\s*+[0-9]\s*+[0-9]")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]++")
_EQUATION = re.compile(r"=|≈|\\(?:approx|equiv|sim|simeq|cong)(?![A-Za-z])")
# SymPy takes a limit from above alone where the text does not say from which side.
_TWO_SIDED = re.compile(r"\\lim(?![A-Za-z])(?!\s*_\s*\{[^{}]*(?:\\infty|\^\s*\{?[-+]))")
_BARE_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3}|[\"'`@#?]")  # maths has commands, not words
_VOWEL = re.compile(r"[aeiou]")
_NAMED = re.compile(r"^[A-Za-z](?:_[A-Za-z0-9])?\s*+=\s*+(?=[^=<>]*+$)")
_BRACED = re.compile(r"\{[^{}]*+\}")
_TEXT_MACRO = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mbox)\s*+\{([^{}]*+)\}")


def clean(text: str) -> str:
    """An answer without what only dresses it: white space,
    dollar signs of maths, bold marks, a closing point.
    """
    text = text.strip()
    if text[-1:].isalnum() and text[:1].isalnum():
        return text
    for _ in range(4):
        before = text
        text = text.strip().removesuffix("\\,").removesuffix("\\;").removesuffix("\\!")
        text = text.rstrip(".,;").strip()
        for left, right in _WRAPPERS:
            if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
                text = text[len(left) : len(text) - len(right)]
        number = _DRESSED_NUMBER.fullmatch(text)
        if number:
            text = number.group(1)
        if text == before:
            break
    return text.replace("−", "-")


def same_answer(answer: str, gold: str, deadline: float, rounding: bool = True) -> tuple[bool | None, str]:
    """Do two cleaned answers say the same? The verdict, and how it was reached.

    Args:
        answer: untrusted.
        gold: the truth; only its decimals may be rounded values.
        deadline: of `time.monotonic()`, for what needs computer algebra.
        rounding: may a decimal of the gold stand for a rounded value?
    """
    if not gold or not answer:
        return False, "empty"
    if ("=" in answer) is not ("=" in gold):  # `x = 5` for 5
        answer, gold = (_NAMED.sub("", text) for text in (answer, gold))
    gold_number = read_number(gold)
    if gold_number:
        answer_number = read_number(answer)
        if answer_number:
            return same_number(answer_number, gold_number, rounding), "number"
    if answer == gold:
        return True, "text"
    verdict = _same_words(answer, gold)
    return verdict if verdict else _same_maths(answer, gold, deadline, rounding)


def _same_words(answer: str, gold: str) -> tuple[bool, str] | None:
    """Words and choices; None where the gold may be maths."""
    if _CHOICE.fullmatch(gold):
        choice = _same_choice(answer, gold)
        return None if choice is None else (choice, "choice")
    gold = _plain_words(gold).casefold()
    if not _WORDS.fullmatch(gold):
        return None
    answer = _plain_words(answer).casefold()
    if answer == gold:
        return True, "text"
    # Short words without a vowel may be products: xyz is zyx, but cat is not act.
    return (False, "text") if len(gold) > 2 and _VOWEL.search(gold) and _WORDS.fullmatch(answer) else None


def _plain_words(text: str) -> str:
    """Words without their macro, closing point and double spaces; other texts unharmed."""
    if len(text) > MAX_CHARS:
        return text
    return " ".join(_TEXT_MACRO.sub(r"\1", text).split()).rstrip(".")


def _same_choice(answer: str, gold: str) -> bool | None:
    """Multiple choice: the same letter, whatever brackets or
    repeated option stand around it; None if it is not that.

    What follows the letter must neither name a second option nor take the first one back.
    """
    chosen, right = _CHOICE.fullmatch(answer), _CHOICE.fullmatch(gold)
    if not right or not chosen:
        return None
    rest = chosen.group(2)
    if rest and rest != right.group(2) and (right.group(2) or _OPTION.search(rest) or takes_back(rest)):
        return None
    return chosen.group(1) == right.group(1)


def _same_maths(answer: str, gold: str, deadline: float, rounding: bool) -> tuple[bool | None, str]:
    if len(answer) <= MAX_CHARS:
        answer, unit = split_unit(answer)
        gold, gold_unit = split_unit(gold)
        if not same_unit(unit, gold_unit):
            return False, "unit"
    try:
        tree, gold_tree = _tree(answer), _tree(gold)
    except TooBig:
        return None, "too big"
    if tree is None or gold_tree is None:
        unreadable = [text for text, read in ((answer, tree), (gold, gold_tree)) if read is None]
        if not all(_BEYOND.search(text) for text in unreadable) or _MISREAD.search(answer + gold):
            return False, "text"
        return _same_unreadable(answer, gold, deadline)
    asked = False

    def prove(left: Node, right: Node) -> bool | None:
        nonlocal asked
        asked = True
        return symbolic.prove_equal(left, right, deadline - time.monotonic())

    try:
        verdict = same(tree, gold_tree, prove, rounding, deadline)
    except (TooBig, RecursionError):  # the caller may stand deep in the stack
        return None, "too big"
    except ValueError:  # not a comparison that means anything, such as a tuple inside a sum
        return False, "algebra"
    return verdict, "symbolic" if asked else "algebra"


def _tree(text: str) -> Node | None:
    try:
        return parse(text)
    except Unreadable:
        return None
    except RecursionError:
        raise TooBig("the stack") from None


def _same_unreadable(answer: str, gold: str, deadline: float) -> tuple[bool | None, str]:
    """Words, or LaTeX beyond our parser (sums, integrals, limits), which is left to Math-Verify."""
    if _WORDS.fullmatch(_plain_words(gold)):
        return False, "text"
    if _TWO_SIDED.search(answer + " " + gold):
        return None, "symbolic"
    equations, gold_equations = (len(_EQUATION.findall(_BRACED.sub("", text))) for text in (answer, gold))
    if equations > gold_equations:  # it may contradict itself, and Math-Verify would read its last part alone
        return False, "text"
    if any(_BARE_WORD.search(_TEXT_MACRO.sub("", text)) for text in (answer, gold)):
        return False, "text"
    texts = [translate(_TEXT_MACRO.sub(r"\1", text)) for text in (answer, gold)]
    try:
        for text in texts:
            check_guards(text)
    except Unreadable:
        return False, "text"
    except TooBig:
        return None, "too big"
    if texts[0].split() == texts[1].split():
        return True, "text"
    return symbolic.compare_latex(*texts, deadline - time.monotonic()), "symbolic"
