"""Talk to a model: the terminal chat, and the model that it shares with the page (app.py).

    python -m inference.chat --model outputs/grpo/final
    python -m inference.chat --model outputs/grpo/final --question "12 + 34 + 56 = ?"
    python -m inference.chat --model outputs/grpo/final --engine_url http://127.0.0.1:8000/v1
    python -m inference.chat --model outputs/grpo/final --input problems.jsonl --output answers.jsonl

Torch or mlx-lm is imported only when a model is loaded, and neither where a server has it.
"""

import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import prompts
from data import read_problems
from inference import Engine, SamplingParams, StreamedToken
from inference.answer_file import answer_file
from inference.formats import reads_with_mlx, weights_stamp
from inference.reading import CompletionReader, Reading
from inference.search import Query, budget_stream
from inference.server_engine import ServerEngine
from runs.config import UserError, at_the_door, parse_config, require, run_script

# People see no more: a reading joins the whole text, and is made at most this often.
READINGS_PER_SECOND = 20

# A model this small has learned single problems and nothing of conversations (the built-in one has 0.44 M).
SINGLE_QUESTION_PARAMETERS = 10_000_000
# Behind a server its parameters cannot be counted; its tokens can.
SINGLE_QUESTION_VOCABULARY = 1_000

EXAMPLES = (
    "12 + 34 + 56 = ?",
    "Mia has 3 boxes of 12 pencils. She gives 7 pencils away. How many does she have left?",
    "For which x is x² − 5x + 6 = 0?",
)
# The built-in model knows nothing but sums.
SUMS = ("12 + 34 + 56 = ?", "7 + 81 + 15 = ?", "98 + 76 + 54 = ?")

# ------------------------------------------------------------------------------------------------------------
# A model to talk to


class InTurn:
    """A lock that lets threads in as they came, so that every stream gets its share of the engine."""

    def __init__(self) -> None:
        """Start with nobody inside."""
        self._changed = threading.Condition()
        self._next_ticket = 0
        self._now_serving = 0

    def __enter__(self) -> None:
        """Wait for one's turn."""
        with self._changed:
            ticket = self._next_ticket
            self._next_ticket += 1
            self._changed.wait_for(lambda: self._now_serving == ticket)

    def __exit__(self, *exception: object) -> None:
        """Let the next one in."""
        with self._changed:
            self._now_serving += 1
            self._changed.notify_all()


class TooLongError(UserError):
    """The conversation does not fit into the model's context; the message is for the person who asked."""


@dataclass(frozen=True)
class Turn:
    """A question and what became of it; `reading` is None before the first token.

    Attributes:
        question: as asked.
        reading: of its answer.
        votes: where several answers voted, all of them.
        model: that answered.
    """

    question: str
    reading: Reading | None = None
    votes: tuple[Reading, ...] = ()
    model: str = ""


@dataclass(frozen=True)
class ChatModel:
    """An engine with what a chat needs to know of its model.

    Attributes:
        name: folder or Hub name, for people.
        context_tokens: tokens of prompt and completion together at most; None where the model does not say.
        single_question: the model knows single questions only; what was said before would confuse it.
        computes_here: several streams have to share this machine; a server shares itself out.
    """

    name: str
    engine: Engine
    tokenizer: Any
    context_tokens: int | None = None
    single_question: bool = False
    computes_here: bool = True

    def messages(self, turns: Sequence[Turn]) -> list[prompts.Message]:
        """What is sent: questions and answers, no thoughts; earlier turns without an answer are left out."""
        *earlier, last = turns
        messages: list[prompts.Message] = []
        for turn in [] if self.single_question else earlier:
            answer = prompts.parse_completion(turn.reading.text).answer_text.strip() if turn.reading else ""
            if answer:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": last.question}]

    def stream(
        self,
        turns: Sequence[Turn],
        params: SamplingParams,
        seed: Sequence[int],
        step: AbstractContextManager = nullcontext(),  # noqa: B008 - stateless, so one for all calls is fine
        thinking_tokens: int | None = None,
    ) -> Iterator[Reading]:
        """Answer the last of `turns` once; see `stream_votes`."""
        with closing(self.stream_votes(turns, 1, params, seed, step, thinking_tokens)) as steps:
            for [reading] in steps:
                yield reading

    def stream_votes(
        self,
        turns: Sequence[Turn],
        votes: int,
        params: SamplingParams,
        seed: Sequence[int],
        step: AbstractContextManager = nullcontext(),  # noqa: B008 - as above
        thinking_tokens: int | None = None,
    ) -> Iterator[list[Reading]]:
        """Answer the last of `turns` so many times side by side, readings of all at a time.

        Closing the iterator stops the computation.

        Args:
            turns: the conversation; the last one is asked.
            votes: answers.
            params: `max_completion_tokens` is lowered to what the context has room for.
            seed: same seed, same answers.
            step: entered around the computation of a token of each answer, so that several streams can share
                one engine.
            thinking_tokens: a thought of so many is closed; None for any number.

        Raises:
            TooLongError: the conversation does not fit into the model's context.
            ConnectionError: the server that has the model is gone, or refused.
        """
        if not self.computes_here:
            step = nullcontext()
        messages = self.messages(turns)
        prompt = prompts.render_prompt(self.tokenizer, messages)
        prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        params = self.fitted(params, len(prompt_ids))
        readers = [CompletionReader(self.tokenizer, prompts.completion_prefix(prompt)) for _ in range(votes)]
        growing, shown_at = votes, -1.0
        if thinking_tokens is not None:
            query = Query(self.engine, self.tokenizer, messages, params)
            # Not (*seed, vote): the parts of a budgeted completion are keyed so.
            seeds = [(*seed, 0, vote) if vote else seed for vote in range(votes)]
            stream = _side_by_side([budget_stream(replace(query, seed=s), thinking_tokens) for s in seeds])
        elif votes == 1:
            stream = _side_by_side([self.engine.stream(prompt_ids, params, seed)])
        else:
            stream = self.engine.stream_group(prompt_ids, votes, params, seed)
        with closing(stream) as steps:
            while growing:
                with step:
                    grown = next(steps)
                for vote, token in grown:
                    readers[vote].push(token.token_id)
                    if token.finish_reason:
                        readers[vote].finish(token.finish_reason)
                        growing -= 1
                if not growing or time.monotonic() - shown_at >= 1 / READINGS_PER_SECOND:
                    yield [reader.reading() for reader in readers]
                    shown_at = time.monotonic()

    def fitted(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        """`params` with no more tokens than the context has room for.

        Raises:
            TooLongError: it has none.
        """
        if self.context_tokens is None:
            return params
        room = self.context_tokens - prompt_tokens
        if room < 1:
            raise TooLongError(
                f"the conversation has {prompt_tokens} tokens and the model reads at most "
                f"{self.context_tokens}: clear the chat or ask something shorter"
            )
        return replace(params, max_completion_tokens=min(params.max_completion_tokens, room))


def _side_by_side(streams: Sequence[Iterator[StreamedToken]]) -> Iterator[list[tuple[int, StreamedToken]]]:
    """Streams as `Engine.stream_group` has them, where each is computed on its own."""
    growing = dict(enumerate(streams))
    with ExitStack() as closes:
        for stream in streams:
            closes.enter_context(closing(stream))
        while growing:
            grown = [(number, next(stream)) for number, stream in growing.items()]
            yield grown
            for number, token in grown:
                if token.finish_reason:
                    del growing[number]


def load_chat_model(
    name: str,
    system_prompt: str | None = None,
    trust_remote_code: bool = False,
    engine_url: str | None = None,
    served_model: str | None = None,
) -> ChatModel:
    """Load a model folder or Hub name for chatting, onto the accelerator where there is one.

    Args:
        name: see `models.load_model`; behind a server its tokenizer alone is loaded; what was converted for
            mlx-lm, and anything where there is no torch, goes to mlx-lm.
        system_prompt: see `prompts.prepare_tokenizer`.
        trust_remote_code: run Python code that the model brings.
        engine_url: an OpenAI-compatible server that has the model, up to its `/v1`; None computes here.
        served_model: the model's name there, see `ServerEngine`.
    """
    from tokenizer import load_tokenizer

    if served_model and not engine_url:
        raise ValueError("served_model is a name on a server; give engine_url, too")
    tokenizer = load_tokenizer(name, system_prompt, trust_remote_code=trust_remote_code)
    if engine_url:
        engine = ServerEngine(engine_url, tokenizer, name, served_model)
        is_small = len(tokenizer) < SINGLE_QUESTION_VOCABULARY
        return ChatModel(name, engine, tokenizer, engine.context_tokens, is_small, computes_here=False)
    if reads_with_mlx(name):
        return _load_with_mlx(name, tokenizer)
    import torch

    import models
    from inference.engine import TorchEngine

    models.require_gpus()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = models.load_model(name, device=device, trust_remote_code=trust_remote_code)
    if device.type == "cuda":
        model = model.to(torch.bfloat16)
    return ChatModel(
        name=name,
        engine=TorchEngine(model, tokenizer),
        tokenizer=tokenizer,
        context_tokens=getattr(model.config, "max_position_embeddings", None),
        single_question=model.num_parameters() < SINGLE_QUESTION_PARAMETERS,
    )


def examples(model: ChatModel) -> Sequence[str]:
    """Questions that fit the model."""
    return SUMS if model.single_question else EXAMPLES


def _load_with_mlx(name: str, tokenizer: Any) -> ChatModel:
    from mlx_lm.utils import get_total_parameters

    from inference.mlx_engine import load_engine

    engine, config = load_engine(name, tokenizer)
    return ChatModel(
        name=name,
        engine=engine,
        tokenizer=tokenizer,
        context_tokens=config.get("max_position_embeddings"),
        single_question=get_total_parameters(engine.model) < SINGLE_QUESTION_PARAMETERS,
    )


# ------------------------------------------------------------------------------------------------------------
# The terminal

HELP = (
    "/retry answers again, /budget N closes thoughts of N tokens (alone: of none), /system TEXT changes the "
    "system prompt, /clear starts over, /quit leaves; Ctrl-C stops an answer"
)


# Of the settings; one file holds no answers of others.
ANSWERS_DEPEND_ON = (
    *("max_completion_tokens", "temperature", "top_p", "seed", "system_prompt"),
    *("engine_url", "served_model"),
)


@dataclass(frozen=True)
class ChatConfig:
    """What the chat is started with."""

    model: str
    """model folder, or a name on the Hugging Face Hub"""
    engine_url: str | None = None
    """an OpenAI-compatible server (vLLM, mlx_lm.server, llama.cpp) that has the model and answers, up to its
    /v1; the key in PONDER_API_KEY"""
    served_model: str | None = None
    """the model's name on that server, where it has several"""
    system_prompt: str | None = None
    """replaces the one saved with the model; the empty text takes it away"""
    trust_remote_code: bool = False
    """run Python code that the model brings; read it first"""
    temperature: float = 0.0
    """0 takes the likeliest token; higher is more varied"""
    top_p: float = 1.0
    """draw from the likeliest tokens that together reach this probability; 1 keeps all"""
    max_completion_tokens: int = 512
    """longest completion, thought included"""
    seed: int = 0
    """same seed, same answers"""
    budget: int | None = None
    """thoughts of so many tokens are closed, and the answer has to follow; if not given, of none"""
    question: str | None = None
    """answer this and exit"""
    demo: bool = False
    """answer a handful of examples and exit"""
    input: str | None = None
    """answer every question of this JSONL, CSV or Parquet file and exit; not those that `output` answers"""
    output: str | None = None
    """the JSONL file that the answers to `input` are added to"""

    def __post_init__(self) -> None:
        """Refuse what cannot be done, naming the field."""
        require(self, "seed", at_least=0)
        if self.budget is not None:
            require(self, "budget", at_least=0)
            if self.input:
                raise ValueError("budget is for a conversation, a question or the demo, got input as well")
        SamplingParams(self.max_completion_tokens, self.temperature, top_p=self.top_p)
        given = [name for name in ("question", "demo", "input") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} cannot be done at once; give one of them")
        if bool(self.input) != bool(self.output):
            raise ValueError("input and output belong together: questions and answers; give both")
        if self.output and Path(self.output).resolve() == Path(self.input).resolve():
            raise ValueError(f"output {self.output!r} is the input; give another file for the answers")
        if self.output and (Path(self.output).is_dir() or not Path(self.output).parent.is_dir()):
            raise ValueError(
                f"output {self.output!r} cannot be written; give a file in a folder that is there"
            )


class Transcript:
    """Writes a completion as it grows: the thought dimmed where a person looks on, plain in a pipe."""

    # What a model writes must not steer the terminal.
    _CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

    def __init__(self, out: TextIO) -> None:
        """Write to `out`."""
        self._out = out
        self._is_terminal = out.isatty()
        self._thought = self._answer = ""

    def show(self, reading: Reading) -> None:
        """Write what is new since the last reading."""
        thought, answer = (reading.thought or "").lstrip(), reading.answer.strip()
        if not answer.startswith(self._answer):
            # What was written was a thought whose opening tag got lost; or a second thought has begun.
            if not self._thought and thought.startswith(self._answer):
                self._thought = self._answer
            else:
                self._write("\n\n")
            self._answer = ""
        self._write(thought[len(self._thought) :], is_dim=True)
        if answer and not self._answer and thought:
            self._write("\n\n")
        self._write(answer[len(self._answer) :])
        self._thought, self._answer = thought, answer

    def end(self, note: str) -> None:
        """End the completion; `note` goes to a person only."""
        self._write("\n")
        if self._is_terminal:
            self._write(f"[{note}]\n\n", is_dim=True)

    def _write(self, text: str, is_dim: bool = False) -> None:
        text = self._CONTROL.sub("", text)
        if is_dim and text and self._is_terminal:
            text = f"\x1b[2m{text}\x1b[0m"
        self._out.write(text)
        self._out.flush()


def answer_turn(
    model: ChatModel,
    turns: Sequence[Turn],
    params: SamplingParams,
    seed: Sequence[int],
    out: TextIO,
    thinking_tokens: int | None = None,
) -> Turn:
    """Answer the last of `turns` on `out`, and return it with its reading; Ctrl-C ends the answer early."""
    transcript = Transcript(out)
    reading, note = None, "stopped"
    try:
        with closing(model.stream(turns, params, seed, thinking_tokens=thinking_tokens)) as readings:
            for reading in readings:
                transcript.show(reading)
        note = describe(reading)
    except KeyboardInterrupt:
        pass
    transcript.end(note)
    return Turn(turns[-1].question, reading)


def describe(reading: Reading) -> str:
    """How long a completion is and how fast it came; and that it was cut, where it was."""
    speed = f" · {reading.tokens_per_second:.0f} tokens/s" if reading.tokens_per_second else ""
    cut = " · cut at the limit" if reading.finish_reason == "length" else ""
    return f"{reading.tokens} tokens{speed}{cut}"


def converse(model: ChatModel, config: ChatConfig, params: SamplingParams, out: TextIO) -> None:
    """Ask and answer until /quit or the end of the input."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - its import gives `input` a history and editing keys
        print(f"{model.name}: {HELP}\n", file=out)
    turns: list[Turn] = []
    attempt, thinking_tokens = 0, config.budget
    while (line := read_line(out)) not in (None, "/quit"):
        if line == "/clear":
            turns = []
            continue
        if line.split(maxsplit=1)[:1] == ["/system"]:
            print(change_system_prompt(model, line.removeprefix("/system").strip()), file=out)
            continue
        if line.split(maxsplit=1)[:1] == ["/budget"]:
            thinking_tokens = read_budget(line.removeprefix("/budget").strip(), thinking_tokens, out)
            continue
        if line == "/retry" and turns:
            attempt += 1
            if config.temperature == 0:
                print("The temperature is 0, so the answer will be the same.", file=out)
        elif line and not line.startswith("/"):
            attempt = 0
            turns.append(Turn(line))
        else:
            print(HELP, file=out)
            continue
        try:
            seed = (config.seed, attempt)
            turns[-1] = answer_turn(model, turns, params, seed, out, thinking_tokens)
        except (TooLongError, ConnectionError) as error:
            print(f"\n{error}", file=out)
            turns.pop()


def read_budget(text: str, before: int | None, out: TextIO) -> int | None:
    """The budget of thoughts that a person typed; tells what it is from now on."""
    if text and not text.isdecimal():
        print(f"/budget takes a number of tokens, got {text!r}.", file=out)
        return before
    print(
        f"Thoughts are closed after {text} tokens." if text else "Thoughts take as long as they do.", file=out
    )
    return int(text) if text else None


def change_system_prompt(model: ChatModel, text: str) -> str:
    """Ask with another system prompt from now on, or with none; returns what to tell of it."""
    from tokenizer import set_system_prompt

    try:
        set_system_prompt(model.tokenizer, text, model.name)
    except ValueError as error:
        return str(error)
    return "The next answer follows it." if text else "No system prompt from now on."


def read_line(out: TextIO) -> str | None:
    """The next line that is typed; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=out)
        return ""


def main(config: ChatConfig) -> None:
    """Load the model, then answer what was asked, or chat."""
    params = SamplingParams(
        max_completion_tokens=config.max_completion_tokens, temperature=config.temperature, top_p=config.top_p
    )
    with at_the_door():
        problems = read_problems(config.input) if config.input else []
        served = (config.engine_url, config.served_model)
        model = load_chat_model(config.model, config.system_prompt, config.trust_remote_code, *served)
    if config.input:
        sampling = {name: getattr(config, name) for name in ANSWERS_DEPEND_ON}
        sampling["weights"] = weights_stamp(config.model)
        answer_file(model, problems, params, sampling, Path(config.output))
    elif config.demo:
        for question in examples(model):
            print(f"> {question}")
            answer_turn(model, [Turn(question)], params, (config.seed, 0), sys.stdout, config.budget)
    elif config.question is None:
        converse(model, config, params, sys.stdout)
    else:
        answer_turn(model, [Turn(config.question)], params, (config.seed, 0), sys.stdout, config.budget)


if __name__ == "__main__":
    run_script(main, lambda: parse_config(ChatConfig))
