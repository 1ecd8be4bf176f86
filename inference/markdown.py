"""Text as Markdown that a browser may show: nothing in it is HTML, nothing loads an image.

A page's sanitizer and its content policy stand behind this. It comes first because it lets tags show as the
text that they are.
"""

import re

INVISIBLE = "\N{ZERO WIDTH SPACE}"

_TAG_START = re.compile(r"<(?=[a-zA-Z/!?])")
_FENCE = r"^ {0,3}(?P<fence>`{3,}|~{3,}).*?(?:^ {0,3}(?P=fence)|\Z)"
_CODE = rf"(?P<code>{_FENCE}|(?P<tick>`+)(?!`).{{1,1000}}?(?<!`)(?P=tick)(?!`))"
# Bounded, so that hostile text costs no more than a thousand times its length.
_MATHS = r"(?P<maths>\$\$.{1,1000}?\$\$|\\\(.{1,1000}?\\\)|\\\[.{1,1000}?\\\])"
# Pandoc's rule for single dollars, so that prices stay prices.
_DOLLARS = r"(?<![\\$\w])\$(?P<dollars>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?![\d$])"
_SPECIAL = re.compile(f"{_CODE}|{_MATHS}|{_DOLLARS}", re.DOTALL | re.MULTILINE)


def as_markdown(text: str) -> str:
    r"""A model's words: images become links, mermaid diagrams (may hold HTML) stay code, $...$ is \(...\)."""
    text = text.replace("```mermaid", "```text")
    parts, position = [], 0
    for match in _SPECIAL.finditer(text):
        parts.append(_as_prose(text[position : match.start()]))
        maths = match["maths"] or (match["dollars"] and rf"\({match['dollars']}\)")
        parts.append(_TAG_START.sub("< ", maths) if maths else match["code"])
        position = match.end()
    return "".join([*parts, _as_prose(text[position:])])


def _as_prose(text: str) -> str:
    return _TAG_START.sub("&lt;", text).replace("![", "&#33;[")


def as_typed(question: str) -> str:
    """A person's words, to be edited later: taking out `INVISIBLE` gives them back."""
    question = question.replace("![", f"!{INVISIBLE}[").replace("```mermaid", f"```{INVISIBLE}mermaid")
    return _TAG_START.sub(f"<{INVISIBLE}", question)
