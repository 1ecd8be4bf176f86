"""Answers that can be checked without a gold: to arithmetic that the question spells out."""

import re

from rewards.verify import judge

_ARITHMETIC = re.compile(
    r"(?:what is|calculate|compute)?+\s*+([\d\s.+*/()×÷·−-]*\d[\d\s.+*/()×÷·−-]*)=?\s*+\??", re.IGNORECASE
)
_OPERATION = re.compile(r"\d[\s)]*[+*/×÷·−-]")
CHARACTERS = 200  # of a question that is looked at


def arithmetic(question: str) -> str | None:
    """The expression that a question asks the value of; None where it asks anything else."""
    match = _ARITHMETIC.fullmatch(question.strip()) if len(question) <= CHARACTERS else None
    if match is None or not _OPERATION.search(match[1]):
        return None
    return match[1].strip().translate(str.maketrans("×÷·−", "*/*-"))


def check(question: str, completion: str) -> bool | None:
    """Is the answer the value of the question's expression? None where that cannot be told."""
    expression = arithmetic(question)
    return None if expression is None else judge(completion, expression, strict=False).correct
