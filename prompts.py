"""The contract with the model: how a question is asked and how a completion is read.

Training, evaluation, the chat page and the Mac all ask and read through this one file, so that the bytes are
the same everywhere. It imports neither torch nor transformers: a tokenizer is handed in, and anything with a
Hugging Face chat template will do.

The prompt lives in the chat template. `prepare_tokenizer` puts our system prompt into it once, as the default
system message; the template is then saved with the model, so a folder asks the same way in vLLM or mlx-lm as
it did in training.
"""

import json
import re
from dataclasses import dataclass

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

SYSTEM_PROMPT = (
    "You solve problems by thinking first. Write your reasoning between <think> and </think>, "
    "then only the final answer between <answer> and </answer>."
)

# A template with this mark asks as the model was trained to be asked; nothing is added to it a second time.
PREPARED_MARK = "{#- asked by ponder -#}"

# For base models that come without a template (the prompt of R1-Zero, arXiv 2501.12948, table 1, in our
# words).
BASE_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content + '\n\n' }}"
    "{%- elif message.role == 'user' -%}{{ 'User: ' + message.content + '\n' }}"
    "{%- else -%}{{ 'Assistant: ' + message.content + eos_token + '\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant: ' }}{%- endif -%}"
)

Message = dict[str, str]


# ------------------------------------------------------------------------------------------------------------
# Asking


def prepare_tokenizer(tokenizer, system_prompt: str | None = None) -> None:
    """Give the tokenizer's chat template our system prompt as its default system message.

    Args:
        tokenizer: any Hugging Face tokenizer; one without a chat template gets `BASE_TEMPLATE`.
        system_prompt: None keeps a template that was prepared before and gives every other one
            `SYSTEM_PROMPT`;
            a text replaces what is there; the empty text adds nothing.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name: one for tools, say, and one for everything else
        template = template.get("default")
    template = template or BASE_TEMPLATE
    is_prepared = PREPARED_MARK in template
    if is_prepared and system_prompt is None:
        return
    original = template.rpartition(PREPARED_MARK)[2]
    text = SYSTEM_PROMPT if system_prompt is None else system_prompt
    default_system = ""
    if text:
        # Not escaped to ASCII: JSON writes an emoji as two halves, which Jinja would not put together again.
        literal = json.dumps(text, ensure_ascii=False)
        # Not `messages[0].role` alone: a template may be rendered with an empty list, as transformers does in
        # checks.
        default_system = (
            "{%- if not messages or messages[0]['role'] != 'system' -%}"
            "{%- set messages = [{'role': 'system', 'content': " + literal + "}] + messages -%}"
            "{%- endif -%}"
        )
    tokenizer.chat_template = default_system + PREPARED_MARK + original


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
    """What the template already wrote of the completion:
    `<think>` where it opens the thought itself, else nothing.

    Put it before the decoded completion before parsing: a format check that does not know of a prefilled
    `<think>` scores
    0 for ever.
    """
    return THINK_OPEN if prompt.rstrip().endswith(THINK_OPEN) else ""


def format_completion(thought: str, answer: str) -> str:
    """A completion in the form that the model is asked for; what `parse_completion` reads back."""
    return f"{THINK_OPEN}{thought}{THINK_CLOSE}{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


# ------------------------------------------------------------------------------------------------------------
# Reading

_THINK_TAGS = re.compile(f"({re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)})")


@dataclass(frozen=True)
class ParsedCompletion:
    """A completion, taken apart.

    Attributes:
        thought: the text inside the thought (thoughts joined, where there are several); None where there is
            none.
        answer_text: everything outside the thought; empty where a thought was never closed.
        answer: the text of the last `<answer>` block of `answer_text`; None where there is none.
        thought_open: the thought was opened and not closed (a truncated or rambling completion, or one
            mid-stream).
        well_formed: one thought with words in it, then one answer with words in it, nothing else but white
            space.
    """

    thought: str | None
    answer_text: str
    answer: str | None
    thought_open: bool
    well_formed: bool


def parse_completion(text: str) -> ParsedCompletion:
    """Take a completion apart; `text` starts with
    `completion_prefix(prompt)`. Never raises, whatever the text.

    Everything before a first `</think>` that nothing opened is a thought that began with the text (a
    prefilled tag that
    got lost); such a completion is not well formed. Text outside is never taken from a second or a nested
    thought either,
    and a thought left open voids what stands outside: the answer was never given.
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
    # Not a lazy pattern: from every tag that is never closed it would search to the end again.
    closed = [piece for piece in answer_text.split(ANSWER_CLOSE)[:-1] if ANSWER_OPEN in piece]
    answer = closed[-1].partition(ANSWER_OPEN)[2].strip() if closed else None
    counts = [text.count(tag) for tag in TAGS]
    body = text.strip()
    well_formed = (
        counts == [1, 1, 1, 1]
        and body.startswith(THINK_OPEN)
        and body.endswith(ANSWER_CLOSE)
        and bool(thought and thought.strip() and answer)
        and answer_text.strip().startswith(ANSWER_OPEN)
    )
    return ParsedCompletion(thought, answer_text, answer, thought_open, well_formed)
