"""What a completion claims as its answer, and what a gold
text holds. Linear time on any text, and no parser yet.

Only text outside the thought counts. The places are tried in a fixed order, and the first kind that is there
is the one that counts: an answer box or an `<answer>` block, a `####` line, a phrase such as "the answer
is". So a second answer in a weaker place buys nothing; several in the same place are all returned, and the
strict judge wants them to agree.
"""

import re

from prompts import ANSWER_CLOSE, ANSWER_OPEN, parse_completion

# A completion longer than this is cut from the left before the weak places are searched; answers stand at
# the end.
TAIL_CHARS = 20_000
MAX_PHRASE_CHARS = 1_000
MAX_PHRASES = 8
MAX_COMPLETION_CHARS = 2_000_000
MAX_ANSWER_TAGS = 32

_BRACE_OR_BOX = re.compile(r"\\(?:boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*+([^\s{}$.,;]+)")
_HASHES = re.compile(r"^[ \t]*+####[ \t]*+(\S[^\n]*+)", re.MULTILINE)
_PHRASE = re.compile(r"\banswer\s*+(?:is\b|:|=)|^[ \t]*+A[ \t]*+:", re.IGNORECASE | re.MULTILINE)
_PHRASE_START = re.compile(r"[\s:=*_]*+")
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n|\*\*")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?(?:/\d++)?")
_CLAIM = re.compile(r"(?:[A-Za-z']++\s++){1,8}?(?:is|are|was|equals)\s++(?=[-+$\\\d(])")


def boxed(text: str) -> list[str]:
    r"""The contents of every outermost `\boxed{…}` or
    `\fbox{…}` in order, braces nested to any depth; one pass.
    """
    if "box" not in text:
        return []
    found: list[str] = []
    open_braces: list[bool] = []  # is this brace a box?
    boxes_open = start = 0
    for match in _BRACE_OR_BOX.finditer(text):
        token = match.group()
        if token == "}":
            if open_braces and open_braces.pop():
                boxes_open -= 1
                if not boxes_open:
                    found.append(text[start : match.start()])
        elif token == "{":
            open_braces.append(False)
        elif len(token) > 2:
            open_braces.append(True)
            if not boxes_open:
                start = match.end()
            boxes_open += 1
    return found or _BARE_BOX.findall(text)


def answer_blocks(text: str) -> list[str]:
    """The contents of every closed `<answer>` block; one pass."""
    pieces = text.split(ANSWER_CLOSE)[:-1]
    return [piece.split(ANSWER_OPEN, 1)[1] for piece in pieces if ANSWER_OPEN in piece]


def _phrases(text: str) -> list[str]:
    """What follows "the answer is", "answer:" or a line's "A:", up to the end of the sentence or line."""
    found = []
    for match in list(_PHRASE.finditer(text))[-MAX_PHRASES:]:
        start = _PHRASE_START.match(text, match.end()).end()
        phrase = text[start : start + MAX_PHRASE_CHARS]
        end = _SENTENCE_END.search(phrase)
        found.append(phrase[: end.start()] if end else phrase)
    return [phrase for phrase in found if phrase.strip()]


def _innermost_claim(text: str) -> str:
    """Of a sentence inside an answer's place ("the total is 18 apples"), the part after the verb."""
    if len(text) > MAX_PHRASE_CHARS:
        return text
    phrases = _phrases(text)
    if phrases:
        return phrases[-1]
    claim = _CLAIM.match(text)
    return text[claim.end() :] if claim else text


def candidates(completion: str, strict: bool = True) -> list[str]:
    """The answers that a completion gives in its strongest place, in order; empty where it gives none.

    Args:
        completion: starts with the prefilled `<think>`, where the template wrote one.
        strict: False also takes the last number where no answer is marked as one.
    """
    if len(completion) > MAX_COMPLETION_CHARS or completion.count(ANSWER_OPEN) > MAX_ANSWER_TAGS:
        return []
    text = parse_completion(completion).answer_text
    found: list[str] = []
    blocks = answer_blocks(text)
    for block in blocks:
        found += boxed(block) or [_innermost_claim(block.strip())]
        text = text.replace(block, "", 1)
    found += boxed(text)
    if found:
        return found
    text = text[-TAIL_CHARS:]
    marked = _HASHES.findall(text)[-1:] or _phrases(text)
    if marked or strict:
        return marked
    return _NUMBER.findall(text)[-1:]


def gold_answer(gold: str) -> str:
    r"""The answer in a gold text: bare, dollar-wrapped,
    `\boxed{…}`, or a worked solution that ends in `#### …`.
    """
    if "####" in gold:
        return gold.rpartition("####")[2]
    boxes = boxed(gold)
    return boxes[-1] if boxes else gold
