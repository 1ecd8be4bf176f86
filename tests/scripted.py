"""A model that says what a test tells it to: a byte tokenizer, and an engine that streams given texts."""

import threading
import time
from collections.abc import Callable

from inference import SamplingParams, StreamedToken
from inference.chat import ChatModel, _side_by_side


class ByteTokenizer:
    """One token a byte, so that every character outside ASCII spans several tokens; 256 ends a completion."""

    eos_token_id = 256

    def __init__(self, opens_thought: bool = False) -> None:
        self.opens_thought = opens_thought

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = "".join(f"[{message['role']}] {message['content']}\n" for message in messages) + "[assistant] "
        return text + ("<think>" if self.opens_thought else "")

    def encode(self, text, add_special_tokens=False):
        return list(text.encode())

    def decode(self, token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")


class ScriptedEngine:
    """Streams `reply(prompt)` byte by byte.

    Attributes:
        prompts: the text of every prompt that was asked.
        computed: tokens computed so far, by the prompt's text.
        tokens: computed so far for all prompts.
        closed: prompts whose stream was closed before its end.
        most_at_once: the most token steps that ran at the same time.
    """

    def __init__(self, reply: Callable[[str], str], seconds_per_token: float = 0.0) -> None:
        self.reply = reply
        self.seconds_per_token = seconds_per_token
        self.prompts: list[str] = []
        self.seeds: list[tuple[int, ...]] = []
        self.computed: dict[str, int] = {}
        self.tokens = 0
        self.closed: list[str] = []
        self.most_at_once = 0
        self._running = 0
        self._lock = threading.Lock()

    def stream(self, prompt, params: SamplingParams, seed):
        asked = bytes(prompt).decode()
        self.prompts.append(asked)
        self.seeds.append(tuple(seed))
        token_ids = [*self.reply(asked).encode(), ByteTokenizer.eos_token_id]
        try:
            for count, token_id in enumerate(token_ids[: params.max_completion_tokens], start=1):
                self._compute()
                self.computed[asked] = count
                self.tokens += 1
                is_end = token_id == ByteTokenizer.eos_token_id
                is_cut = count == params.max_completion_tokens
                yield StreamedToken(token_id, 0.0, "stop" if is_end else "length" if is_cut else None)
        except GeneratorExit:
            if not (is_end or is_cut):
                self.closed.append(asked)
            raise

    def stream_group(self, prompt, n, params: SamplingParams, seed):
        yield from _side_by_side([self.stream(prompt, params, (*seed, 0, sample)) for sample in range(n)])

    def _compute(self) -> None:
        with self._lock:
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        time.sleep(self.seconds_per_token)
        with self._lock:
            self._running -= 1


def scripted_model(
    reply: Callable[[str], str] | str, seconds_per_token: float = 0.0, opens_thought: bool = False, **about
) -> ChatModel:
    """A chat model that answers with `reply`, a text or a function of the prompt."""
    say = reply if callable(reply) else lambda prompt: reply
    return ChatModel(
        "scripted", ScriptedEngine(say, seconds_per_token), ByteTokenizer(opens_thought), **about
    )
