"""The engine behind an OpenAI-compatible server: vLLM, mlx_lm.server, llama.cpp's, and others like them.

Prompts are rendered and encoded here, as everywhere. They are sent as token ids where the server takes them,
else as a text that is read as those ids again. Completions come back as token ids where the server tells
them, else as text that is encoded anew: the text is the model's, how it was cut into tokens is a guess.
Log-probabilities are NaN: few servers tell those of the distribution that was sampled from.
"""

import hashlib
import itertools
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from inference import Completion, FinishReason, SamplingParams, StreamedToken, row_keys
from inference.http import RefusedError, get_json, post_json, read_key, stream_json
from prompts import THINK_CLOSE, THINK_OPEN, completion_prefix, encode_prompt

PARALLEL = 32  # requests in flight; a server that has fewer places lets the others wait

# A server would else take these from the model's generation config (vLLM does), or from settings of its own.
NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

# Through mlx_lm.server's chat a prompt goes as it is, by this template.
AS_IT_IS = {"chat_template": "{{ messages[0].content }}"}

FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "tool_calls": "stop", "length": "length"}

Body = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """What came of a completion at once; `token_ids` is None where the server tells text alone."""

    text: str
    token_ids: list[int] | None
    finish_reason: FinishReason | None


Grown = TypeVar("Grown", Piece, StreamedToken)


def request_seed(key: Sequence[int]) -> int:
    """One number for (*seed, prompt, sample), of 31 bits, which every server takes."""
    digest = hashlib.sha256(repr([int(number) for number in key]).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


class ServerEngine:
    """Samples from the model behind a server; see `inference.Engine`.

    Attributes:
        served_model: its name there.
        context_tokens: of prompt and completion together at most; None where the server does not say.
    """

    def __init__(self, url: str, tokenizer: Any, model: str, served_model: str | None = None) -> None:
        """Get to know a server, by requests of one token.

        Args:
            url: of the server, up to its `/v1`. The key is read from the environment (`http.KEY_VARIABLE`).
            tokenizer: the Hugging Face tokenizer of the model that is served.
            model: folder or Hub name of that model here; it is looked for among those that are served.
            served_model: its name there, where it cannot be found so.

        Raises:
            ConnectionError: the server does not answer.
            ValueError: it refuses, serves no such model, or reads prompts with another tokenizer.
        """
        self.url = url.rstrip("/")
        self._key = read_key()
        self._tokenizer = tokenizer
        self.served_model, self.context_tokens = self._find(model, served_model)
        prompt = encode_prompt(tokenizer, "12 + 34 + 56 = ?")
        counted = self._count({"prompt": self._text_of(prompt), "add_special_tokens": False})
        # Some servers put a token of their own before a text.
        if counted not in (None, len(prompt), len(prompt) + 1):
            raise ValueError(
                f"{self.url} reads a prompt as {counted} tokens that has {len(prompt)} for the tokenizer of "
                f"{model!r}; name the model that is served there"
            )
        self._takes_tokens = self._grants(self._as_tokens(prompt), prompt)
        self._stream_form, self._tells_tokens = self._as_tokens, True
        if not self._takes_tokens:
            self._tells_tokens = self._grants(self._as_text(prompt) | {"logprobs": True}, prompt)
            # mlx_lm.server leaves thoughts out of streamed completions; its chat tells them.
            tells_thoughts = self._grants(self._as_message(prompt), prompt)
            self._stream_form = self._as_message if tells_thoughts else self._as_text

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: Sequence[int],
        first_prompt: int = 0,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `n` completions of each prompt, a request each; see `inference.Engine.generate`.

        Raises:
            ConnectionError: the server is gone, refused a prompt, or did not finish a completion.
        """
        results: list[list[Completion | None]] = [[None] * n for _ in prompts]
        keys = row_keys(seed, len(prompts), n, first_prompt)
        told: defaultdict[int, list[Piece]] = defaultdict(list)

        def ask(row: int) -> Iterator[Piece]:
            return self._pieces(prompts[row // n], params, keys[row], is_streamed=self._takes_tokens)

        with closing(_as_they_come(len(keys), ask)) as arriving:
            for row, piece in arriving:
                told[row].append(piece)
                if piece.finish_reason:
                    prompt, sample = divmod(row, n)
                    results[prompt][sample] = completion = self._completion(told.pop(row))
                    if on_completion:
                        on_completion(prompt, sample, completion)
        return results

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, seed: Sequence[int]
    ) -> Iterator[StreamedToken]:
        """Sample one completion token by token; closing the iterator closes the connection."""
        return self._tokens(prompt, params, (*seed, 0, 0))

    def stream_group(
        self, prompt: Sequence[int], n: int, params: SamplingParams, seed: Sequence[int]
    ) -> Iterator[list[tuple[int, StreamedToken]]]:
        """Sample completions of a prompt side by side, a request each; see `inference.Engine.stream_group`.

        Raises:
            ConnectionError: see `generate`.
        """
        keys = row_keys(seed, 1, n)
        with closing(_as_they_come(n, lambda row: self._tokens(prompt, params, keys[row]))) as arriving:
            for sample, token in arriving:
                yield [(sample, token)]

    def _tokens(
        self, prompt: Sequence[int], params: SamplingParams, key: tuple[int, ...]
    ) -> Iterator[StreamedToken]:
        held = None  # until it is known whether another one follows
        with closing(self._pieces(prompt, params, key, is_streamed=True)) as pieces:
            for piece in pieces:
                for token_id in self._tokens_of(piece):
                    if held is not None:
                        yield StreamedToken(held, math.nan, None)
                    held = token_id
                if piece.finish_reason:
                    # A completion without a token ends with the EOS, which reads as nothing, too.
                    last = self._tokenizer.eos_token_id if held is None else held
                    yield StreamedToken(last, math.nan, piece.finish_reason)

    def _completion(self, pieces: Sequence[Piece]) -> Completion:
        told = [piece.token_ids for piece in pieces]
        token_ids = None if None in told else list(itertools.chain(*told))
        whole = Piece("".join(piece.text for piece in pieces), token_ids, pieces[-1].finish_reason)
        tokens = self._tokens_of(whole)
        return Completion(tokens, [math.nan] * len(tokens), whole.finish_reason)

    # Getting to know the server

    def _find(self, model: str, served_model: str | None) -> tuple[str, int | None]:
        """The name of the model there, and its context."""
        answer = get_json(f"{self.url}/models", self._key)
        listed = answer.get("data") if isinstance(answer, dict) else None
        served = {str(entry.get("id")): entry for entry in listed or []}
        wanted = (served_model,) if served_model else (model, str(Path(model).resolve()))
        name = next((name for name in wanted if name in served), None)
        if name is None and len(served) == 1 and not served_model:
            (name,) = served
        if name is None and not served:  # some list nothing; whether this is there, a request will tell
            name = wanted[0]
        if name is None:
            raise ValueError(
                f"served_model: {self.url} does not serve {wanted[0]!r}, but "
                f"{', '.join(map(repr, served))}; name the one to ask with --served_model"
            )
        return name, served.get(name, {}).get("max_model_len")

    def _count(self, body: Body) -> int | None:
        """How many tokens the prompt of a request has for the server; None where it does not say."""
        body = body | {"model": self.served_model, "max_tokens": 1, "temperature": 0}
        answer = post_json(self._address(body), body, self._key)
        self._choices(answer)
        return (answer.get("usage") or {}).get("prompt_tokens")

    def _grants(self, body: Body, prompt: Sequence[int]) -> bool:
        """Whether the server takes a request of this form, and reads the prompt as it is."""
        try:
            return self._count(body) in (None, len(prompt))
        except RefusedError:
            return False

    # Asking

    def _address(self, body: Body) -> str:
        return f"{self.url}/chat/completions" if "messages" in body else f"{self.url}/completions"

    def _as_tokens(self, prompt: Sequence[int]) -> Body:
        return {"prompt": list(prompt), "return_token_ids": True}

    def _as_text(self, prompt: Sequence[int]) -> Body:
        """The text that the server, which begins it as its tokenizer likes, reads as this prompt."""
        whole = self._text_of(prompt)
        for text in (whole, whole.removeprefix(self._tokenizer.bos_token or "")):
            if self._tokenizer.encode(text) == list(prompt):
                return {"prompt": text}
        raise ValueError(
            f"{self.url} takes prompts as text alone, and no text is read as the tokens of this one: "
            f"{whole[:60]!r}; ask a server that takes token ids"
        )

    def _as_message(self, prompt: Sequence[int]) -> Body:
        message = {"role": "user", "content": self._text_of(prompt)}
        return {"messages": [message], "chat_template_kwargs": AS_IT_IS}

    def _text_of(self, prompt: Sequence[int]) -> str:
        return self._tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _request(self, body: Body, params: SamplingParams, key: Sequence[int]) -> Body:
        request = body | NO_PENALTIES | {"model": self.served_model, "temperature": params.temperature}
        request["max_tokens"] = params.max_completion_tokens
        if params.temperature > 0:  # a seed keeps mlx_lm.server from answering several at once
            request |= {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
            request["seed"] = request_seed(key)
        return request

    def _answers(self, request: Body) -> Iterator[Any]:
        """What the server answers, at once or as it grows."""
        try:
            if "stream" in request:
                yield from stream_json(self._address(request), request, self._key)
            else:
                yield post_json(self._address(request), request, self._key)
        except RefusedError as error:
            # It granted such requests before: this is nothing that the user got wrong.
            raise ConnectionError(str(error)) from error

    # Reading

    def _pieces(
        self, prompt: Sequence[int], params: SamplingParams, key: Sequence[int], is_streamed: bool
    ) -> Iterator[Piece]:
        """The pieces of a completion, up to the one with the finish reason."""
        if is_streamed:
            body = self._stream_form(prompt) | {"stream": True}
        else:
            body = self._as_text(prompt) | ({"logprobs": True} if self._tells_tokens else {})
        is_thinking = bool(completion_prefix(self._text_of(prompt)))
        with closing(self._answers(self._request(body, params, key))) as answers:
            for choice in (choice for answer in answers for choice in self._choices(answer)):
                text, token_ids = choice.get("text") or "", choice.get("token_ids")
                if "delta" in choice:
                    text, is_thinking = with_tags(choice["delta"], is_thinking)
                elif token_ids is None and choice.get("logprobs"):
                    token_ids = [token["id"] for token in choice["logprobs"]["content"]]
                reason = choice.get("finish_reason")
                if reason not in (None, *FINISH_REASONS):
                    raise ConnectionError(f"{self.url} gave a completion up: its finish reason is {reason!r}")
                yield Piece(text, token_ids, reason and FINISH_REASONS[reason])
                if reason:
                    return
        raise ConnectionError(f"{self.url} ended a completion without a reason; is the server alive?")

    def _choices(self, answer: Any) -> list[dict[str, Any]]:
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise ConnectionError(
                f"{self.url} answered with something else than a completion: {answer!r:.300}"
            )
        return answer["choices"]

    def _tokens_of(self, piece: Piece) -> list[int]:
        """The tokens of a piece, the EOS among them where the model stopped."""
        if piece.token_ids is not None:
            return piece.token_ids
        # Behind a token, as some tokenizers put a space before what begins a text.
        text = self._tokenizer.eos_token + piece.text
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)[1:]
        return [*token_ids, self._tokenizer.eos_token_id] if piece.finish_reason == "stop" else token_ids


def _as_they_come(rows: int, ask: Callable[[int], Iterator[Grown]]) -> Iterator[tuple[int, Grown]]:
    """What `ask` yields for each row up to its finish reason, with the row's number; `PARALLEL` at a time.

    Where this is closed early, nobody waits for what a silent server still does, and neither does the process
    to end: hence daemons, where the threads of a pool are joined.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    arrived: SimpleQueue[tuple[int, Grown | Exception]] = SimpleQueue()
    abandoned = threading.Event()

    def work() -> None:
        while not abandoned.is_set():
            try:
                row = waiting.get_nowait()
            except Empty:
                return
            try:
                with closing(ask(row)) as growing:
                    for grown in growing:
                        if abandoned.is_set():
                            return
                        arrived.put((row, grown))
            except Exception as error:  # noqa: BLE001 - raised where the rows are asked for
                arrived.put((row, error))

    for row in range(rows):
        waiting.put(row)
    for _ in range(min(rows, PARALLEL)):
        threading.Thread(target=work, daemon=True).start()
    try:
        unfinished = rows
        while unfinished:
            row, grown = arrived.get()
            if isinstance(grown, Exception):
                raise grown
            unfinished -= grown.finish_reason is not None
            yield row, grown
    finally:
        abandoned.set()


def with_tags(delta: dict[str, Any], is_thinking: bool) -> tuple[str, bool]:
    """The text of a chat's piece, the tags of the thought put back that the server took out.

    Args:
        delta: thoughts under `reasoning`, everything else under `content`.
        is_thinking: the thought is open.

    Returns:
        The text, and whether the thought is open after it.
    """
    thought, answer = delta.get("reasoning") or "", delta.get("content") or ""
    if thought:
        thought = thought if is_thinking else THINK_OPEN + thought
        is_thinking = True
    if answer:
        answer = THINK_CLOSE + answer if is_thinking else answer
        is_thinking = False
    return thought + answer, is_thinking
