"""What a completion claims as its answer, and what a gold
text holds. Linear time on any text, and no parser yet.

Only text outside the thought counts. The places are tried in a fixed order, and the first kind that is there
is the one that counts: an answer box or an `<answer>` block, a `####` line, a phrase such as "the answer
is". So a second answer in a weaker place buys nothing; several in the same place are all returned, and the
strict judge wants them to agree.
"""

import re

from prompts import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, parse_completion
from rewards.units import takes_back

# A completion longer than this is cut from the left before the weak places are searched; answers stand at
# the end.
TAIL_CHARS = 20_000
MAX_PHRASE_CHARS = 1_000
MAX_PHRASES = 8
MAX_COMPLETION_CHARS = 2_000_000
MAX_ANSWER_TAGS = 32

_BRACE_OR_BOX = re.compile(r"\\(?:boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*+([^\s{}$.,;]+)")
_HASHES = re.compile(r"(?<![#\S])####[ \t]++([^\s#][^\n]*+)")
_HEADING = re.compile(r"[0-9]++[.)]\s|[A-Za-z]")  # a heading of the fourth rank, not GSM8K's mark
_PHRASE = re.compile(
    r"\banswer[ \t*_]*+(?:is\b|:|=)|^[ \t#*_]*+(?:final[ \t]++)?answer[ \t*_]*+$|^[ \t]*+A[ \t]*+:"
    r"|\bcorrect[ \t]++(?:option|choice|letter)[ \t]++is\b",
    re.IGNORECASE | re.MULTILINE,
)
_LEADS = re.compile(
    r"(?:nswer|orrect|NSWER|ORRECT)"
)  # where there is none of these, nor a colon, is no phrase
_OPTION_B = re.compile(r"^[ \t]*+B[ \t]*+:", re.MULTILINE)  # then "A:" is an option too, not "Answer:"
_PHRASE_START = re.compile(r"[\s:=*_]*+")
_LEAD_IN = re.compile(r"[A-Za-z\s*_]*+")
_SENTENCE_END = re.compile(r"(?<!\bi\.e)\.(?=\s|$)|\n|\*\*")
_NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?(?:/\d++)?")
# A sentence up to its number: "the total is", "it's", "she has"; "Total =".
_CLAIM = re.compile(
    r"(?:[A-Za-z']++\s++){0,10}?(?:[A-Za-z]*'s|is|are|was|were|equals|has|have|had|gets?|got|makes?|made"
    r"|earns?|earned|needs?|costs?|pays?|paid|takes?|took|spends?|spent|sold|bought|[A-Za-z]{4,}\s*+=)"
    r"\s++(?=[-+$\\\d(])",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"#{2,}\s++|(?:therefore|thus|hence|so|then|simply|exactly|indeed|now|just|only),?\s++"
    r"|(?:option|choice|letter)\s++(?=\(?[A-Z]\b)",
    re.IGNORECASE,
)
_REASON = re.compile(r",?\s++(?:because|since)\s.*+", re.DOTALL)
_THAT_IS = re.compile(r",?\s*+\bi\.e\.,?\s*+")
# A thought under another name is a thought.
_THOUGHT = re.compile(r"<\s*+(/?)\s*+(?i:think|thinking|thoughts?|reasoning)\s*+>")


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
    matches = list(_PHRASE.finditer(text))[-MAX_PHRASES:]
    found = []
    for match, following in zip(matches, [*matches[1:], None], strict=False):
        if match.group().strip() == "A:" and _OPTION_B.search(text):
            continue
        start = _PHRASE_START.match(text, match.end()).end()
        lead_in = text[start : following.start()] if following else "0"
        if _LEAD_IN.fullmatch(lead_in) and not takes_back(lead_in):
            continue  # "Final answer: the final answer is 18"
        phrase = text[start : start + MAX_PHRASE_CHARS]
        end = _SENTENCE_END.search(phrase)
        found.append(phrase[: end.start()] if end else phrase)
    return [_undressed(phrase) for phrase in found if phrase.strip()]


def _undressed(answer: str) -> str:
    """Without the words around an answer that add nothing to it."""
    answer = answer.strip()
    filler = _FILLER.match(answer)
    if filler:
        answer = answer[filler.end() :]
    if " " in answer:
        answer = _REASON.sub("", answer)
    return _THAT_IS.sub("=", answer) if "i.e." in answer else answer


def _innermost_claim(text: str) -> str:
    """Of a sentence inside an answer's place ("the total is 18 apples"), the part after the verb."""
    if len(text) > MAX_PHRASE_CHARS:
        return text
    if ":" in text or _LEADS.search(text):
        phrases = _phrases(text)
        if phrases:
            return phrases[-1]
    text = _undressed(text)
    claim = _CLAIM.match(text)
    return _undressed(text[claim.end() :]) if claim and not takes_back(claim.group()) else text


def _marked(text: str) -> list[str]:
    """What stands behind `####`; of headings, which look the same, the last where there is nothing else."""
    marks = _HASHES.findall(text)
    return [mark for mark in marks if not _HEADING.match(mark)] or marks[-1:]


def _outside_thoughts(completion: str) -> str:
    """What stands outside of thoughts, each of which leaves a
    new line; nothing before a tag that closes no thought,
    as the thought around another one ends there.
    """
    is_open, start, are_ours = False, 0, True
    for tag in _THOUGHT.finditer(completion):
        is_close = bool(tag.group(1))
        if is_close and not is_open:
            start = tag.end()
        is_open = not is_close
        are_ours = are_ours and tag.group() in (THINK_OPEN, THINK_CLOSE)
    text = completion[start:]
    if not are_ours:
        text = _THOUGHT.sub(r"<\1think>", text)
    return parse_completion(text.replace(THINK_CLOSE, THINK_CLOSE + "\n")).answer_text


def candidates(completion: str, strict: bool = True) -> list[str]:
    """The answers that a completion gives in its strongest place, in order; empty where it gives none.

    Args:
        completion: starts with the prefilled `<think>`, where the template wrote one.
        strict: False also takes the last number where no answer is marked as one.
    """
    if len(completion) > MAX_COMPLETION_CHARS or completion.count(ANSWER_OPEN) > MAX_ANSWER_TAGS:
        return []
    text = _outside_thoughts(completion) if "<" in completion else completion
    found: list[str] = []
    blocks = answer_blocks(text)
    for block in blocks:
        found += boxed(block) or [_innermost_claim(block.strip())]
        text = text.replace(block, "", 1)
    found += boxed(text)
    if found:
        return found
    text = text[-TAIL_CHARS:]
    marked = _marked(text) or _phrases(text)
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
