"""The contract with the model: how a question is asked and how a completion is read.

Training, evaluation, the chat page and the Mac all ask and read through this one file, so that the bytes are
the same everywhere. It imports neither torch nor transformers: a tokenizer is handed in, and anything with a
Hugging Face chat template will do.

The prompt lives in the chat template. `prepare_tokenizer` puts our system prompt into it once, as the default
system message; the template is then saved with the model, so a folder asks the same way in vLLM or mlx-lm as
it did in training. How a completion is to be read stands in the prompt that asked for it: whether it opens
the thought itself (`completion_prefix`), and whether it wants a box (`answer_style`).
"""

import json
import re
from dataclasses import dataclass
from datetime import date
from typing import Literal

from jinja2 import TemplateError

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

AnswerStyle = Literal["tags", "boxed"]
_THINK_FIRST = "You solve problems by thinking first. Write your reasoning between <think> and </think>, "
SYSTEM_PROMPTS: dict[AnswerStyle, str] = {
    "tags": _THINK_FIRST + "then only the final answer between <answer> and </answer>.",
    "boxed": _THINK_FIRST + "then only the final answer in \\boxed{}.",
}
SYSTEM_PROMPT = SYSTEM_PROMPTS["tags"]

# A template with this mark asks as the model was trained to be asked; nothing is added to it a second time.
PREPARED_MARK = "{#- asked by ponder -#}"

# For base models (the prompt of R1-Zero, arXiv 2501.12948, table 1, in our words).
BASE_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content + '\n\n' }}"
    "{%- elif message.role == 'user' -%}{{ 'User: ' + message.content + '\n' }}"
    "{%- else -%}{{ 'Assistant: ' + message.content + eos_token + '\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant: ' }}{%- endif -%}"
)

# How a system prompt gets into a template: as a message of its own, or, where the template knows of none or
# refuses it (Gemma 2 does), before the first question. Not `messages[0].role` alone: a template may be
# rendered with an empty list, as transformers does in checks.
_AS_SYSTEM = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{%- set messages = [{'role': 'system', 'content': TEXT}] + messages -%}"
    "{%- endif -%}"
)
_AS_PREFACE = (
    "{%- if messages and messages[0]['role'] == 'user' -%}"
    "{%- set first = TEXT + '\n\n' + messages[0]['content'] -%}"
    "{%- set messages = [{'role': 'user', 'content': first}] + messages[1:] -%}"
    "{%- endif -%}"
)
# At the end of a template that is to open the thought for the model.
_OPEN_THOUGHT = "{%- if add_generation_prompt -%}{{ '" + THINK_OPEN + "' }}{%- endif -%}"

# Some templates tell the date, and no two days would ask alike: it is always the one that Llama 3's fall back
# on.
_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_DAY = date(2024, 7, 26)

Message = dict[str, str]


# ------------------------------------------------------------------------------------------------------------
# Asking


def prepare_tokenizer(
    tokenizer,
    system_prompt: str | None = None,
    *,
    answer_style: AnswerStyle | None = None,
    plain_template: bool = False,
    prefill_think: bool | None = None,
) -> None:
    """Give the tokenizer's chat template our system prompt as its default system message.

    Args:
        tokenizer: any Hugging Face tokenizer; one without a chat template gets `BASE_TEMPLATE`.
        system_prompt: None keeps a template that was prepared before and gives every other one the prompt of
            `answer_style`; a text replaces what is there; the empty text adds nothing.
        answer_style: which of `SYSTEM_PROMPTS`; None is "tags", or what is there.
        plain_template: take `BASE_TEMPLATE` in place of the tokenizer's own.
        prefill_think: open the thought for the model; None does so where it was done before.

    Raises:
        ValueError: `answer_style` beside a `system_prompt`; or a template that takes no system prompt.
    """
    if answer_style and system_prompt is not None:
        raise ValueError(f"answer_style {answer_style!r} picks a system_prompt of ours; give one of the two")
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name: one for tools, say, and one for everything else
        template = template.get("default")
    ours, mark, theirs = (template or BASE_TEMPLATE).rpartition(PREPARED_MARK)
    is_open = theirs.endswith(_OPEN_THOUGHT) if prefill_think is None else prefill_think
    theirs = BASE_TEMPLATE if plain_template else theirs.removesuffix(_OPEN_THOUGHT)
    theirs = _DATE.sub(lambda call: json.dumps(f"{_DAY:{call[2]}}"), theirs)
    text, ways = "", [ours]
    if not mark or system_prompt is not None or answer_style:
        text = SYSTEM_PROMPTS[answer_style or "tags"] if system_prompt is None else system_prompt
        # Not escaped to ASCII: JSON writes an emoji as two halves, which Jinja would not put together again.
        literal = json.dumps(text, ensure_ascii=False)
        ways = [way.replace("TEXT", literal) for way in (_AS_SYSTEM, _AS_PREFACE)] if text else [""]
    _take_first_way(tokenizer, [way + PREPARED_MARK + theirs for way in ways], text)
    if is_open and not completion_prefix(render_prompt(tokenizer, "")):
        tokenizer.chat_template += _OPEN_THOUGHT


def _take_first_way(tokenizer, templates: list[str], text: str) -> None:
    """Give the tokenizer the first template whose prompts have a text in them."""
    why = "it leaves the system prompt out"
    for template in templates:
        tokenizer.chat_template = template
        try:
            if text.strip() in render_prompt(tokenizer, ""):
                return
        except TemplateError as error:
            why = str(error)
    raise ValueError(
        f"the chat template cannot be used with a system prompt: {why}; give an empty system_prompt"
    )


def render_prompt(tokenizer, question: str | list[Message]) -> str:
    """The text of a prompt, up to and including the words that open the model's turn.

    Args:
        tokenizer: has a chat template (see `prepare_tokenizer`).
        question: a question, or a whole conversation as messages with `role` and `content`.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompt(tokenizer, question: str | list[Message]) -> list[int]:
    """The token ids of a prompt; the template writes its own special tokens, so none are added."""
    return tokenizer.encode(render_prompt(tokenizer, question), add_special_tokens=False)


def completion_prefix(prompt: str) -> str:
    """What the template already wrote of the completion: `<think>` where it opens the thought itself.

    Put it before the decoded completion before parsing: a format check that does not know of a prefilled
    `<think>` scores 0 for ever.
    """
    return THINK_OPEN if prompt.rstrip().endswith(THINK_OPEN) else ""


def answer_style(prompt: str) -> AnswerStyle:
    """How a prompt asks for the answer, be the words ours or the user's: in a box, where it names one and no
    tag.
    """
    return "boxed" if "\\boxed" in prompt and ANSWER_OPEN not in prompt else "tags"


def format_completion(thought: str, answer: str, style: AnswerStyle = "tags") -> str:
    """A completion in the form that the model is asked for; what `parse_completion` reads back."""
    told = f"\\boxed{{{answer}}}" if style == "boxed" else f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"
    return f"{THINK_OPEN}{thought}{THINK_CLOSE}{told}"


def in_style(completion: str, style: AnswerStyle) -> str:
    """A worked completion in the style that is asked for, where it is well formed in the other."""
    parsed = parse_completion(completion, "tags" if style == "boxed" else "boxed")
    return format_completion(parsed.thought, parsed.answer, style) if parsed.well_formed else completion


# ------------------------------------------------------------------------------------------------------------
# Reading

_THINK_TAGS = re.compile(f"({re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)})")
_BRACE_OR_BOX = re.compile(
    r"\\(?:boxed|fbox)\s*+(?:\{|((?:\\(?!boxed|fbox)|[^\s{}$.,;\\])++))|\\.|[{}]", re.DOTALL
)
# What may follow the box of an answer: the end of its formula and of its sentence.
_AFTER_BOX = re.compile(r"(?:[\s$.*]|\\[\])])*+")


@dataclass(frozen=True)
class ParsedCompletion:
    """A completion, taken apart.

    Attributes:
        thought: the text inside the thought (thoughts joined, where there are several); None where there is
            none.
        answer_text: everything outside the thought; empty where a thought was never closed.
        answer: the text of the last `<answer>` block, or box, of `answer_text`; None where there is none.
        thought_open: the thought was opened and not closed (a truncated or rambling completion, or one
            mid-stream).
        well_formed: one thought with words in it, then one answer with words in it, nothing else but white
            space; a box may stand at the end of a sentence.
    """

    thought: str | None
    answer_text: str
    answer: str | None
    thought_open: bool
    well_formed: bool


def parse_completion(text: str, style: AnswerStyle = "tags") -> ParsedCompletion:
    """Take a completion apart. Never raises, whatever the text.

    Everything before a first `</think>` that nothing opened is a thought that began with the text (a
    prefilled tag that got lost); such a completion is not well formed. Text outside is never taken from a
    second or a nested thought either, and a thought left open voids what stands outside: the answer was never
    given.

    Args:
        text: starts with `completion_prefix(prompt)`.
        style: `answer_style(prompt)`, how the answer was asked for.
    """
    outside: list[str] = []
    inside: list[str] = []
    thought_open = False
    thoughts = 0
    for piece in _THINK_TAGS.split(text):
        if piece == THINK_OPEN:
            thoughts += not thought_open
            thought_open = True
        elif piece == THINK_CLOSE:
            if not thoughts:
                thoughts, inside, outside = 1, outside, []
            thought_open = False
        else:
            (inside if thought_open else outside).append(piece)
    thought = "".join(inside) if thoughts else None
    answer_text = "" if thought_open else "".join(outside)
    reads = _boxed_answer if style == "boxed" else _tagged_answer
    answer, is_alone = reads(answer_text)
    well_formed = (
        [text.count(tag) for tag in TAGS] == ([1, 1, 0, 0] if style == "boxed" else [1, 1, 1, 1])
        and text.lstrip().startswith(THINK_OPEN)
        and bool(thought and thought.strip() and answer)
        and is_alone
    )
    return ParsedCompletion(thought, answer_text, answer, thought_open, well_formed)


def _tagged_answer(text: str) -> tuple[str | None, bool]:
    """The last block's text, and whether the tags stand around all that there is."""
    # Not a lazy pattern: from every tag that is never closed it would search to the end again.
    closed = [piece for piece in text.split(ANSWER_CLOSE)[:-1] if ANSWER_OPEN in piece]
    answer = closed[-1].partition(ANSWER_OPEN)[2].strip() if closed else None
    body = text.strip()
    return answer, body.startswith(ANSWER_OPEN) and body.endswith(ANSWER_CLOSE)


def _boxed_answer(text: str) -> tuple[str | None, bool]:
    """The last box's contents, and whether it is the only one and ends the text."""
    spans = box_spans(text)
    if not spans:
        return None, False
    _, end, contents = spans[-1]
    return contents.strip(), len(spans) == 1 and _AFTER_BOX.fullmatch(text, end) is not None


def box_spans(text: str) -> list[tuple[int, int, str]]:
    r"""Start, end and contents of every outermost `\boxed{…}` or `\fbox{…}`, closed or without braces.

    One pass, whatever the text; braces may nest to any depth.
    """
    found: list[tuple[int, int, str]] = []
    open_braces: list[int] = []  # where the box of this brace begins, -1 where it is none
    boxes_open = inside = 0
    for match in _BRACE_OR_BOX.finditer(text) if "box" in text else ():
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else -1
            if start >= 0:
                boxes_open -= 1
                if not boxes_open:
                    found.append((start, match.end(), text[inside : match.start()]))
        elif token == "{":
            open_braces.append(-1)
        elif match.group(1):
            if not boxes_open:
                found.append((*match.span(), match.group(1)))
        elif len(token) > 2:
            open_braces.append(match.start())
            if not boxes_open:
                inside = match.end()
            boxes_open += 1
    return found
