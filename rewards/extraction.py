"""What a completion claims as its answer, and what a gold text holds. Linear time on any text, no parser yet.

Only text outside the thought counts. The places are tried in a fixed order, and the first kind that is there
is the one that counts: boxes and `<answer>` blocks, `####` lines, phrases such as "the answer is". So a
second answer in a weaker place buys nothing.

Everything that the strongest place says is returned, the last answer last, and the strict judge wants it all
to agree. Only words of a closed vocabulary (`_PLAIN`) and the subject and verb of a sentence about a number
are taken off: what else stands beside an answer (another number, "not", "or 20") is a candidate of its own,
so that nothing said there is lost.
"""

import re

from prompts import ANSWER_OPEN, box_spans, parse_completion
from rewards.units import changes, denies, doubts, takes_back

# A completion longer than this is cut from the left before the weak places are searched; answers stand at
# the end.
TAIL_CHARS = 20_000
MAX_PHRASE_CHARS = 1_000
MAX_COMPLETION_CHARS = 2_000_000
MAX_ANSWER_TAGS = 32
MAX_ASIDE_CHARS = 100

# A thought under another name is a thought.
_THOUGHT = re.compile(
    r"<\s*+(/?)\s*+(?i:think|thinking|thoughts?|reasoning|reflection|analysis|scratch_?pad)\s*+>"
    r"|\[(/?)(?:THINK|think)\]"
)
_SPECIAL_TOKEN = re.compile(r"<\|[a-z_]{1,30}\|>|</s>")
_BLOCK_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
# What touches a box belongs to the number in it: `-\boxed{18}`, `\boxed{18}0`, `$\boxed{18}$ million`.
_TOUCHING_BEFORE = re.compile(r"(?:[=$(]\s*+[-−]\s*+|[-+−/^]|[0-9][0-9.,]*+)\$?$")
_TOUCHING_AFTER = re.compile(r"(?:[\^/+−-]|\*(?!\*)|[.,]?[0-9])[^\s$]*+|\$?\s*+(?:\\text\{\s*+)?([A-Za-z]++)")
_MARKED = re.compile(r"(?<![#\S])####[ \t]*+([^\s#][^\n]*+)")
# A heading of the fourth rank looks like GSM8K's mark.
_HEADING = re.compile(r"(?:(?i:step|part|case)\s\d++[.:)]?|[0-9]++[.)]\s)?[A-Za-z ,:'&-]*+")
_CLAIM = re.compile(
    r"\banswer[ \t*_]*+(?:(?:to|of|for)\b[^\n.:=?]{0,60}?\b)?(?:(?:would|will|must)[ \t]++be\b|is\b|:|=)"
    r"|^[ \t#*_]*+(?:final[ \t]++)?answer[ \t*_]*+$|\bfinal[ \t]++answer(?=[ \t]++[-+$\\\d(])"
    r"|^[ \t]*+A[ \t]*+:|\bcorrect[ \t]++(?:option|choice|letter)[ \t]++is\b",
    re.IGNORECASE | re.MULTILINE,
)
_MAY_CLAIM = re.compile(r"nswer|NSWER|orrect|ORRECT|A[ \t]*+:")
_OPTION_B = re.compile(r"^[ \t]*+B[ \t]*+:", re.MULTILINE)  # then "A:" is an option too, not "Answer:"
_DRESS = " \t\n:=*_#$\\()[]"
_ADVERBS = "therefore|thus|hence|so|then|simply|exactly|indeed|now|just|only"
# No lone "A", which is an option.
_PLAIN = re.compile(
    rf"(?:[\s:=*_#,$]|(?i:{_ADVERBS}|the|this|my|our|is|final|correct|answer|result|solution|that|it|option"
    r"|choice|letter|and|we|get|have|find|thats?|equals?)(?![A-Za-z]))*+"
)
# What leads up to an answer in its sentence: adverbs; before a number, subject and verb ("the total is",
# "it's", "she has", "Total =").
_LEAD = re.compile(
    rf"(?:#{{2,}}\s*+|(?:{_ADVERBS}),?\s++|(?:option|choice|letter)\s++(?=\(?(?-i:[A-Z])(?![A-Za-z])))*+"
    r"(?:(?:[a-z']++\s++){0,10}?(?:[a-z]*'s|is|are|was|were|equals|has|have|had|gets?|got|makes?|made"
    r"|earns?|earned|needs?|costs?|pays?|paid|takes?|took|spends?|spent|sold|bought|[a-z]{4,}\s*+=)"
    r"\s++(?=[-+$\\\d(]))?",
    re.IGNORECASE,
)
_START = re.compile(r"(?:[\s:=*_]|\\\[|\$\$(?=\s))*+")
_SENTENCE_END = re.compile(r"(?<!\bi\.e)\.(?=\s|$)|\n|\*\*")
_CLAUSE_END = re.compile(r".*[.,;!?\n]", re.DOTALL)
_REASON = re.compile(r",?\s++(?:because|since)\s.*+", re.DOTALL)
_THAT_IS = re.compile(r",?\s*+\bi\.e\.,?\s*+")
# A later sentence, or number on a line of its own, that takes the answer back or offers another.
_SECOND = re.compile(
    r"(?:^|[.;!?\n])[\s*_(]{0,20}+(?:(?i:or|not|wait|actually|sorry|oops|hmm|rather|instead|maybe|perhaps"
    r"|alternatively|corrected|correction|edit|nope|no(?=\s*+(?:[,.:;!]|$)))(?![A-Za-z]).*+"
    r"|\$?[-+]?[0-9][0-9.,/]{0,40}+[ \t*$]{0,20}+$)",
    re.MULTILINE,
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?(?:/\d++)?")


# -------------------------------------------------------------------------------------------------------
# Boxes and blocks


def boxed(text: str) -> list[str]:
    r"""The contents of every outermost `\boxed{…}` or `\fbox{…}` in order, braces nested to any depth."""
    return [content for _, _, content in box_spans(text)]


def _boxes_in_place(text: str) -> list[str]:
    """The boxes of a text, each with the sign, digits or word beside it that make another number of it."""
    found = []
    for start, end, content in box_spans(text):
        before = _TOUCHING_BEFORE.search(text[max(0, start - 20) : start])
        after = _TOUCHING_AFTER.match(text[end : end + MAX_ASIDE_CHARS])
        if after and after.group(1) and not changes(after.group(1)):
            after = None
        found.append((before.group() if before else "") + content + (after.group() if after else ""))
    return found


def _split_blocks(text: str) -> tuple[list[str], str]:
    """The contents of the closed `<answer>` blocks, and the text around them; one pass."""
    blocks: list[str] = []
    around: list[str] = []
    start, opened = 0, None
    for tag in _BLOCK_TAG.finditer(text):
        if not tag.group(1):
            opened = opened or tag
        elif opened:
            blocks.append(text[opened.end() : tag.start()])
            around.append(text[start : opened.start()])
            start, opened = tag.end(), None
    return blocks, "\n".join([*around, text[start:]])


def _of_block(block: str) -> list[str]:
    """What a block says: its boxes, where nothing but plain words stands around them, else all of it."""
    boxes = box_spans(block)
    if not boxes:
        return _claims(block.strip(), is_block=True)
    contents = [content for _, _, content in boxes]
    starts = [0, *(end for _, end, _ in boxes)]
    ends = [*(start for start, _, _ in boxes), len(block)]
    gaps = [block[start:end] for start, end in zip(starts, ends, strict=True)]
    if all(_is_plain(gap) for gap in gaps):
        return contents
    pieces = [piece for pair in zip(gaps, [*contents, ""], strict=True) for piece in pair]
    return _claims("".join(pieces).strip(), is_block=True) + contents


# -------------------------------------------------------------------------------------------------------
# Sentences


def _is_plain(text: str) -> bool:
    """Do these words add nothing to an answer and take nothing from it?"""
    return _PLAIN.fullmatch(text.strip(_DRESS + ".")) is not None


def _claims(text: str, is_block: bool = False) -> list[str]:
    """What each "the answer is", "answer:" or line's "A:" claims, and what stands beside it.

    Args:
        text: a block, or all that stands outside of thoughts.
        is_block: what stands before the first claim, and a text without one, is an answer too.
    """
    if is_block and len(text) > MAX_PHRASE_CHARS:
        return [text]
    marks = list(_CLAIM.finditer(text)) if _MAY_CLAIM.search(text) else []
    if any(mark.group().strip() == "A:" for mark in marks) and _OPTION_B.search(text):
        marks = [mark for mark in marks if mark.group().strip() != "A:"]
    if not marks:
        return [_undressed(text)] if is_block else []
    found = []
    before = text[: marks[0].start()]
    if is_block and not _is_plain(before):
        sentences = _CLAUSE_END.match(before)
        words = before[sentences.end() :] if sentences else before
        found.append(_undressed(before[: -len(words)] if words and _is_plain(words) else before))
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        found += _claim(text, mark, following.start() if following else len(text), following is None)
    return found or ([text] if is_block else [])


def _claim(text: str, mark: re.Match, end: int, is_last: bool) -> list[str]:
    """What one mark claims, behind what takes it back."""
    after = text[mark.end() : end]
    if _is_plain(after) and not is_last:
        return []  # "Final answer: the final answer is 18"
    after = after[_START.match(after).end() :]
    stop = _SENTENCE_END.search(after, 0, MAX_PHRASE_CHARS)
    claim, rest = (after[: stop.start()], after[stop.start() :]) if stop else (after[:MAX_PHRASE_CHARS], "")
    if not claim.strip():
        return []
    second = _SECOND.search(rest)
    found = [second.group()] if second else []
    before = text[max(0, mark.start() - MAX_ASIDE_CHARS) : mark.start()]
    clause = _CLAUSE_END.sub("", before)
    return [*found, clause + mark.group() + claim if denies(clause) else _undressed(claim)]


def _undressed(answer: str) -> str:
    """An answer without the words around it that add nothing to it."""
    answer = answer.strip()
    if answer.isdigit():
        return answer
    lead = _LEAD.match(answer)
    if not takes_back(lead.group()):
        answer = answer[lead.end() :]
    if answer.startswith("\\("):  # "\(18\) dollars", but not two numbers side by side
        inside, _, words = answer[2:].partition("\\)")
        answer = inside + words if words.lstrip()[:1].isalpha() else answer
    if " " in answer:
        reason = _REASON.search(answer)
        if reason and not doubts(reason.group()):
            answer = answer[: reason.start()]
    return _THAT_IS.sub("=", answer) if "i.e." in answer else answer


def _marks(text: str) -> list[str]:
    """What stands behind `####`, and what takes it back; headings only where nothing else is marked."""
    marks = list(_MARKED.finditer(text)) if "####" in text else []
    if not marks:
        return []
    found = [mark.group(1) for mark in marks]
    found = [mark for mark in found if not _HEADING.fullmatch(mark)] or found
    second = _SECOND.search(text, marks[-1].end())
    return [second.group(), *found] if second else found


# -------------------------------------------------------------------------------------------------------
# Completions


def _outside_thoughts(completion: str) -> str:
    """What stands outside of thoughts, each of which leaves a new line; nothing before a tag that closes no
    thought, as the thought around another one ends there.
    """
    is_open = False
    start = 0
    for tag in _THOUGHT.finditer(completion):
        is_close = bool(tag.group(1) or tag.group(2))
        if is_close and not is_open:
            start = tag.end()
        is_open = not is_close
    return parse_completion(_THOUGHT.sub(r"<\1\2think>\n", completion[start:])).answer_text


def candidates(completion: str, strict: bool = True) -> list[str]:
    """All that a completion says in its strongest place, the last answer last; empty where it gives none.

    Args:
        completion: starts with the prefilled `<think>`, where the template wrote one.
        strict: False also takes the last number where no answer is marked as one.
    """
    if len(completion) > MAX_COMPLETION_CHARS or completion.count(ANSWER_OPEN) > MAX_ANSWER_TAGS:
        return []
    text = _outside_thoughts(completion) if _THOUGHT.search(completion) else completion
    if "<|" in text or "</s>" in text:
        text = _SPECIAL_TOKEN.sub("\n", text)
    blocks, text = _split_blocks(text) if "<" in text else ([], text)
    found = [answer for block in blocks for answer in _of_block(block)] + _boxes_in_place(text)
    if found:
        return found
    text = text[-TAIL_CHARS:]
    found = _marks(text) or _claims(text)
    return found if found or strict else _NUMBER.findall(text)[-1:]


def gold_answer(gold: str) -> str:
    r"""The answer in a gold text: bare, dollar-wrapped,
    `\boxed{…}`, or a worked solution that ends in `#### …`.
    """
    if "####" in gold:
        return gold.rpartition("####")[2]
    boxes = boxed(gold)
    return boxes[-1] if boxes else gold
