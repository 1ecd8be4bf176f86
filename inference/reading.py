"""A completion as it streams: token ids to text, and text to thought and answer, a piece at a time.

Torch-free; the terminal chat and the page read through it. `prompts.parse_completion` reads what is complete.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import prompts
from inference import FinishReason

# ------------------------------------------------------------------------------------------------------------
# From token ids to text


class TokenDecoder:
    """Decodes a stream of token ids without ever showing half a character.

    A character may span several tokens (bytes), and some decoders treat a text's first token differently. So
    each token is decoded after a few that came before it, and what does not end in a whole character waits.
    The window that is decoded again is bounded: a token costs the same late in a stream as early.
    """

    _CONTEXT = 4
    _CHARACTER = 4  # tokens that one character of UTF-8 takes at most
    _PATIENCE = 16  # tokens that may wait before broken bytes are taken for what they are

    def __init__(self, tokenizer: Any) -> None:
        """Start a stream; `tokenizer` has Hugging Face's `decode`."""
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; often, but not always, the token's own."""
        self._waiting.append(token_id)
        if not self._decode(self._context + self._waiting).endswith("\N{REPLACEMENT CHARACTER}"):
            return self._release(len(self._waiting))
        if len(self._waiting) >= self._PATIENCE:
            # Bytes that are no text at all: cut them where no character spans the cut, and keep as many at
            # the end as a character may still grow from.
            whole = self._decode(self._waiting)
            for cut in range(len(self._waiting) - self._CHARACTER, 0, -1):
                if self._decode(self._waiting[:cut]) + self._decode(self._waiting[cut:]) == whole:
                    return self._release(cut)
        return ""

    def flush(self) -> str:
        """What is left at the end of the stream, broken characters included."""
        return self._release(len(self._waiting))

    def _release(self, count: int) -> str:
        ready = self._context + self._waiting[:count]
        text = self._decode(ready)[len(self._decode(self._context)) :]
        self._context, self._waiting = ready[-self._CONTEXT :], self._waiting[count:]
        return text

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ------------------------------------------------------------------------------------------------------------
# From text to thought and answer

_TAG = re.compile("|".join(map(re.escape, prompts.TAGS)))
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)", re.DOTALL)


def _fence_after(fence: str, line: str) -> str:
    """The code fence that is open after a line, given the one open before it; empty where none is."""
    match = _FENCE.match(line)
    if match is None:
        return fence
    mark, rest = match.groups()
    if not fence:
        return "" if mark[0] == "`" and "`" in rest else mark
    return "" if mark.startswith(fence) and not rest.strip() else fence


class ThoughtSplitter:
    """Splits streamed text into thought and answer, as `prompts.parse_completion` splits it at once.

    However the text is cut into pieces, the end is the same. One difference: in the answer, tags inside a
    code fence are text, for there the model writes about tags.

    Attributes:
        thinking: a thought is open.
        thoughts: how many there have been.
        held: the end of the text, held back because it may still become a tag.
    """

    def __init__(self) -> None:
        """Start outside any thought."""
        self.thinking = False
        self.thoughts = 0
        self._inside: list[str] = []
        self._outside: list[str] = []  # with the answer's tags, for a thought whose opening tag got lost
        self._answer: list[str] = []  # the same without them
        self.held = ""
        self._fence = ""
        self._line = ""

    @property
    def thought(self) -> str | None:
        """The thought so far; None before there is one."""
        return "".join(self._inside) if self.thoughts else None

    @property
    def answer(self) -> str:
        """What stands outside the thought, without the answer's tags; empty while a thought is open."""
        return "" if self.thinking else "".join(self._answer)

    def feed(self, text: str) -> None:
        """Take the next piece of text."""
        text = self.held + text
        position = 0
        for match in _TAG.finditer(text):
            self._put(text[position : match.start()])
            self._take(match.group())
            position = match.end()
        rest = text[position:]
        longest = max(map(len, prompts.TAGS)) - 1
        keep = next(
            (
                n
                for n in range(min(longest, len(rest)), 0, -1)
                if any(t.startswith(rest[-n:]) for t in prompts.TAGS)
            ),
            0,
        )
        self._put(rest[: len(rest) - keep])
        self.held = rest[len(rest) - keep :]

    def finish(self) -> None:
        """The stream has ended: what was held back was no tag."""
        self._put(self.held)
        self.held = ""

    def _take(self, tag: str) -> None:
        is_code = not self.thinking and bool(_fence_after(self._fence, self._line))
        if is_code or (self.thinking and tag in (prompts.ANSWER_OPEN, prompts.ANSWER_CLOSE)):
            self._put(tag)
        elif tag == prompts.THINK_OPEN:
            self.thoughts += not self.thinking
            self.thinking = True
        elif tag == prompts.THINK_CLOSE:
            if not self.thoughts:
                self.thoughts, self._inside, self._outside, self._answer = 1, self._outside, [], []
            self.thinking = False
            self._fence = self._line = ""
        else:
            self._outside.append(tag)
            if self._fence:
                # The line closed its fence, and must not open another with what follows the tag.
                self._fence, self._line = "", "."

    def _put(self, text: str) -> None:
        if not text:
            return
        if self.thinking:
            self._inside.append(text)
            return
        self._outside.append(text)
        self._answer.append(text)
        *lines, rest = text.split("\n")
        for line in lines:
            self._fence = _fence_after(self._fence, self._line + line)
            self._line = ""
        # Only the start of a line tells a fence, and a line may be long.
        self._line = (self._line + rest)[:200]


# ------------------------------------------------------------------------------------------------------------
# A completion as it streams


@dataclass(frozen=True)
class Reading:
    """A completion so far, as a person reads it.

    Attributes:
        text: everything the model wrote, the prefilled tag before it; for `prompts.parse_completion`.
        thought: the thought without its tags; None where there is none yet.
        answer: what stands outside the thought, without the answer's tags.
        thinking: the thought is open.
        thought_seconds: from the question to the end of the thought, or to now.
        thought_tokens: tokens of the thought, tags included.
        tokens: tokens in all.
        tokens_per_second: from the first token to the last; 0 before the second.
        finish_reason: set when the stream has ended.
    """

    text: str
    thought: str | None
    answer: str
    thinking: bool
    thought_seconds: float
    thought_tokens: int
    tokens: int
    tokens_per_second: float
    finish_reason: FinishReason | None


class CompletionReader:
    """Reads a completion token by token."""

    def __init__(self, tokenizer: Any, prefix: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """Start reading, and the clock.

        Args:
            tokenizer: has Hugging Face's `decode`.
            prefix: what the template already wrote of the completion (`prompts.completion_prefix`).
            clock: seconds, never going back.
        """
        self._decoder = TokenDecoder(tokenizer)
        self._splitter = ThoughtSplitter()
        self._clock = clock
        self._pieces: list[str] = []
        self._asked = self._latest = clock()
        self._first = 0.0
        self._tokens = self._thought_tokens = 0
        self._thought_seconds = 0.0
        self._finish_reason: FinishReason | None = None
        self._feed(prefix)

    def push(self, token_id: int) -> None:
        """Take the next token."""
        now = self._clock()
        self._tokens += 1
        self._first = self._first or now
        had_thoughts, was_thinking = self._splitter.thoughts, self._splitter.thinking
        self._feed(self._decoder.push(token_id))
        if self._splitter.thoughts and not had_thoughts:
            # The first thought starts with the question: a late tag turns all before it into thought.
            self._thought_tokens, self._thought_seconds = self._tokens, now - self._asked
        elif was_thinking or self._splitter.thinking:
            self._thought_tokens += 1
            self._thought_seconds += now - self._latest
        self._latest = now

    def finish(self, reason: FinishReason) -> None:
        """The stream has ended."""
        self._feed(self._decoder.flush())
        self._splitter.finish()
        self._finish_reason = reason

    def reading(self) -> Reading:
        """What there is so far. It joins the whole text: ask a few times a second, not for every token."""
        elapsed = self._latest - self._first
        return Reading(
            text="".join(self._pieces),
            thought=self._splitter.thought,
            answer=self._splitter.answer,
            thinking=self._splitter.thinking,
            thought_seconds=self._thought_seconds,
            thought_tokens=self._thought_tokens,
            tokens=self._tokens,
            tokens_per_second=(self._tokens - 1) / elapsed if self._tokens > 1 and elapsed > 0 else 0.0,
            finish_reason=self._finish_reason,
        )

    def _feed(self, text: str) -> None:
        self._pieces.append(text)
        self._splitter.feed(text)
