"""The chat of the page: what one visitor asks and reads."""

import base64
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr

from inference import SamplingParams
from inference.chat import ChatModel, InTurn, TooLongError, Turn, describe, examples
from inference.markdown import INVISIBLE, as_markdown, as_typed
from inference.reading import CompletionReader, Reading
from inference.search import group_answers
from page import feedback
from page.checking import check
from page.settings import chatbot, question_box
from page.shelf import Shelf
from rewards.verify import final_answer, same_answers

# Each of these answers streams at its share of the model's speed; whoever comes later waits in the queue.
ANSWERS_AT_ONCE = 4

QUESTION_CHARACTERS = 8_000

# ------------------------------------------------------------------------------------------------------------
# What is shown


def chat_messages(turns: list[Turn]) -> list[tuple[int, gr.ChatMessage]]:
    """The messages that show a conversation, each with the number of its turn."""
    messages = []
    for number, turn in enumerate(turns):
        messages.append((number, _message("user", as_typed(turn.question))))
        if turn.reading:
            messages += [(number, message) for message in _completion_messages(turn.reading)]
        if turn.votes:
            messages.append((number, _vote_message(turn.votes)))
    return messages


def _completion_messages(reading: Reading) -> Iterator[gr.ChatMessage]:
    is_over = reading.finish_reason is not None
    thought, answer = (reading.thought or "").strip(), reading.answer.strip()
    if thought or reading.thinking:
        seconds = f"{reading.thought_seconds:.1f} s · {reading.thought_tokens} tokens"
        if not reading.thinking:
            metadata = {"title": f"Thought for {seconds}", "status": "done"}
        elif is_over:
            # There is no answer to see: leave the thought open.
            metadata = {"title": f"Thought for {seconds}, unfinished"}
        else:
            metadata = {"title": "Thinking…", "status": "pending"}
        yield _message("assistant", as_markdown(thought), metadata)
    if answer:
        yield _message("assistant", as_markdown(answer))
    elif is_over:
        yield _message("assistant", f"*{_no_answer(reading)}*")


def _vote_message(votes: Sequence[Reading]) -> gr.ChatMessage:
    """The count of the votes, and the chains that led elsewhere, one click away."""
    groups = sorted(_ballots(votes), key=len, reverse=True)
    count = " · ".join(f"{as_typed(_short(votes[group[0]].answer))} × {len(group)}" for group in groups)
    silent = len(votes) - sum(map(len, groups))
    count += f" · no answer × {silent}" if silent else ""
    others = [votes[group[0]] for group in groups[1:]]
    chains = "\n\n---\n\n".join(
        f"{as_markdown((other.thought or '').strip())}\n\n{as_markdown(other.answer.strip())}"
        for other in others
    )
    return _message("assistant", chains or "All agree.", {"title": f"Votes: {count}", "status": "done"})


def _ballots(votes: Sequence[Reading]) -> list[list[int]]:
    answers = [final_answer(vote.text) if vote.answer.strip() else None for vote in votes]
    return group_answers(answers, same_answers)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:40] + "…"


def elected(turn: Turn, votes: Sequence[Reading]) -> Turn:
    """The turn with the answer that most votes give, the first of equals; where none answers, the first."""
    groups = _ballots(votes)
    winner = max(groups, key=len)[0] if groups else 0
    return replace(turn, reading=votes[winner], votes=tuple(votes))


def _no_answer(reading: Reading) -> str:
    if reading.finish_reason == "cancelled":
        return "Stopped."
    if reading.finish_reason == "length":
        return f"No answer within {reading.tokens} tokens. The settings may allow more."
    return "The model ended without an answer."


def _message(role: str, text: str, metadata: dict | None = None) -> gr.ChatMessage:
    # Not the bare text: Gradio takes indentation out of that.
    return gr.ChatMessage(role=role, content=[{"type": "text", "text": text}], metadata=metadata or {})


def cancelled(turn: Turn, tokenizer: object) -> Turn:
    """A turn that was stopped, with what it had until then."""
    if turn.reading:
        return replace(turn, reading=replace(turn.reading, finish_reason="cancelled"))
    reader = CompletionReader(tokenizer)
    reader.finish("cancelled")
    return replace(turn, reading=reader.reading())


# ------------------------------------------------------------------------------------------------------------
# One visitor's chat


@dataclass
class Conversation:
    """What one visitor has asked and read. It stays on the server, so that no request can forge it."""

    turns: list[Turn] = field(default_factory=list)
    attempt: int = 0
    answering: bool = False  # also where the vote that is seen is whole, and others are not

    @property
    def is_answering(self) -> bool:
        """The last question still waits for the end of its answer."""
        is_open = bool(self.turns) and (
            self.turns[-1].reading is None or not self.turns[-1].reading.finish_reason
        )
        return self.answering or is_open

    def ask(self, question: str) -> None:
        """Add a question, checked."""
        if self.is_answering:
            raise refusal("An answer is being written. Wait for it, or stop it.")
        if not question.strip():
            raise refusal("Type a question first.")
        if len(question) > QUESTION_CHARACTERS:
            raise refusal(
                f"The question has {len(question):,} characters; at most {QUESTION_CHARACTERS:,} are taken."
            )
        self.turns.append(Turn(question.strip()))
        self.attempt = 0


def told(turn: Turn) -> str:
    """How long an answer is, how fast it came, and whether it is right where that can be checked."""
    if turn.reading is None:
        return ""
    is_right = check(turn.question, turn.reading.text) if turn.reading.finish_reason == "stop" else None
    verdict = {True: " · checked: right", False: " · checked: wrong", None: ""}[is_right]
    return describe(turn.reading) + verdict


def export_link(turns: Sequence[Turn]) -> str:
    """A link that holds the finished answers as a file: nobody's conversation stays on the server's disk."""
    if not (lines := feedback.lines(turns)):
        return ""
    encoded = base64.b64encode(lines.encode()).decode()
    return (
        f'<a download="conversation.jsonl" href="data:application/jsonl;base64,{encoded}">Export as JSONL</a>'
    )


def counted(votes: Sequence[Reading]) -> str:
    """How far the votes are that grow side by side."""
    are_in = sum(vote.finish_reason is not None for vote in votes)
    return f"{are_in} of {len(votes)} votes are in · {sum(vote.tokens for vote in votes)} tokens"


def refusal(message: str) -> gr.Error:
    """What a visitor is told instead of an answer."""
    return gr.Error(message, duration=6, print_exception=False)


class ChatPage:
    """The chat: its components and what they do."""

    def __init__(self, shelf: Shelf, config: Any, engine_turn: InTurn) -> None:
        """Serve the models of a shelf; see `build` for the page.

        Args:
            shelf: the models.
            config: an `app.AppConfig`.
            engine_turn: shared by all that compute on this machine.
        """
        self.shelf, self.config, self.engine_turn = shelf, config, engine_turn

    # Events: each returns what its components show next.

    def send(self, question: str, conversation: Conversation):
        """A question is sent."""
        conversation.ask(question)
        return self._busy(conversation, value="")

    def send_example(self, conversation: Conversation, event: gr.SelectData):
        """An example is clicked."""
        conversation.ask(str(event.value["text"]))
        return self._busy(conversation)

    def retry(self, conversation: Conversation, temperature: float):
        """The last question is asked again, with other random numbers."""
        if not conversation.turns or conversation.is_answering:
            raise refusal("There is nothing to answer again.")
        if temperature == 0:
            gr.Info("At temperature 0 the answer is always the same; the settings can raise it.", duration=5)
        conversation.turns[-1] = Turn(conversation.turns[-1].question)
        conversation.attempt += 1
        return self._busy(conversation)

    def edit(self, conversation: Conversation, event: gr.EditData):
        """A question is changed: what came after it goes, and it is asked anew."""
        index = event.index[0] if isinstance(event.index, list | tuple) else event.index
        rows = chat_messages(conversation.turns)
        if conversation.is_answering or not 0 <= index < len(rows):
            raise refusal("This question cannot be changed now.")
        kept = conversation.turns[: rows[index][0]]
        changed = Conversation(kept)
        changed.ask(str(event.value).replace(INVISIBLE, ""))
        conversation.turns, conversation.attempt = changed.turns, 0
        return self._busy(conversation)

    def undo(self, conversation: Conversation):
        """The last question goes back to where it was typed."""
        if conversation.is_answering:
            raise refusal("An answer is being written. Stop it first.")
        question = conversation.turns.pop().question if conversation.turns else ""
        return self._messages(conversation), "", question, export_link(conversation.turns)

    def clear(self, conversation: Conversation):
        """The conversation starts over."""
        conversation.turns, conversation.attempt = [], 0
        return self._idle(conversation)

    def like(self, conversation: Conversation, event: gr.LikeData):
        """An answer is liked or disliked: it is kept for the next cold start, or as a warning."""
        if event.liked not in (True, False):  # a choice taken back
            return
        index = event.index[0] if isinstance(event.index, list | tuple) else event.index
        rows = chat_messages(conversation.turns)
        turn = conversation.turns[rows[index][0]] if 0 <= index < len(rows) else None
        if turn is None or turn.reading is None or conversation.is_answering:
            raise refusal("There is no finished answer to judge.")
        if event.liked and turn.reading.finish_reason != "stop":
            raise refusal("An answer that was cut or stopped is no example to learn from.")
        try:
            file = feedback.keep(Path(self.config.feedback), event.liked, turn)
        except OSError as error:
            raise refusal(f"The answer could not be kept: {error}") from error
        gr.Info(f"Kept in {file}.", duration=3)

    def answer(
        self,
        conversation: Conversation,
        name: str,
        temperature: float,
        top_p: float,
        max_completion_tokens: int,
        seed: int,
        budget: int = 0,
        votes: int = 1,
    ):
        """The last question is answered, a reading at a time; answers that vote, all side by side."""
        params = SamplingParams(int(max_completion_tokens), temperature, top_p=top_p)
        turns, key, votes = conversation.turns, (int(seed or 0), conversation.attempt), int(votes)
        cast: list[Reading] = []
        conversation.answering = True
        try:
            if votes > 1 and temperature == 0:
                raise refusal("At temperature 0 all votes would be the same; the settings can raise it.")
            model = self.shelf.get(name)
            for cast in self._readings(model, turns, votes, params, key, int(budget or 0) or None):
                # The first is seen as it grows; the others are heard when all are in.
                turns[-1] = replace(turns[-1], reading=cast[0], model=name)
                yield self._messages(conversation), told(turns[-1]) if votes == 1 else counted(cast)
            if votes > 1:
                turns[-1] = elected(turns[-1], cast)
                yield self._messages(conversation), told(turns[-1])
        except gr.Error:
            turns.pop()
            raise
        except GeneratorExit:  # stopped: the votes that are in count
            if votes > 1 and (are_in := [vote for vote in cast if vote.finish_reason]):
                turns[-1] = elected(turns[-1], are_in)
            raise
        finally:
            conversation.answering = False

    def settle(self, conversation: Conversation):
        """The answer is over; where it was stopped, it says so."""
        if conversation.is_answering:
            conversation.turns[-1] = cancelled(conversation.turns[-1], self.shelf.first.tokenizer)
        return self._idle(conversation)

    def answer_once(
        self,
        question: str,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_completion_tokens: int = 512,
        seed: int = 0,
    ) -> dict:
        """Answer one question, for programs: a stream of {thought, answer, text, tokens, finish_reason}."""
        conversation = Conversation()
        conversation.ask(str(question))
        limit = min(max_completion_tokens, self.config.max_completion_tokens)
        if seed < 0:
            raise refusal(f"seed must be >= 0, got {seed}")
        try:
            params = SamplingParams(int(limit), float(temperature), top_p=float(top_p))
        except ValueError as error:
            raise refusal(str(error)) from error
        for [reading] in self._readings(self.shelf.first, conversation.turns, 1, params, (int(seed), 0)):
            yield {
                "thought": reading.thought,
                "answer": reading.answer.strip(),
                "text": reading.text,
                "tokens": reading.tokens,
                "finish_reason": reading.finish_reason,
            }

    def _readings(
        self,
        model: ChatModel,
        turns: list[Turn],
        votes: int,
        params: SamplingParams,
        seed: tuple,
        thinking_tokens: int | None = None,
    ) -> Iterator[list[Reading]]:
        """The answers as they grow. Closing this closes the engine's stream: no other token is computed."""
        asked = (params, seed, self.engine_turn, thinking_tokens)
        try:
            with closing(model.stream_votes(turns, votes, *asked)) as readings:
                yield from readings
        except (TooLongError, ConnectionError) as error:
            raise refusal(str(error)) from error

    def _messages(self, conversation: Conversation) -> list[gr.ChatMessage]:
        return [message for _, message in chat_messages(conversation.turns)]

    def _busy(self, conversation: Conversation, **textbox):
        box = gr.Textbox(submit_btn=False, stop_btn=True, **textbox)
        return self._messages(conversation), "", box, export_link(conversation.turns)

    def _idle(self, conversation: Conversation):
        return (
            self._messages(conversation),
            told(conversation.turns[-1]) if conversation.turns else "",
            gr.Textbox(submit_btn=True, stop_btn=False),
            export_link(conversation.turns),
        )

    # The page

    def build(self, settings: list[gr.components.Component]) -> None:
        """Lay out the components and connect them; call it inside `gr.Blocks`."""
        conversation = gr.State(Conversation())
        names = self.shelf.names
        with gr.Column(elem_id="chat-page"):
            name = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1, elem_id="model")
            bot = chatbot(
                elem_id="chat",
                editable="user",
                feedback_options=("Like", "Dislike"),
                placeholder="## What shall we work out?",
                examples=[{"text": text} for text in examples(self.shelf.first)],
            )
            status = gr.Markdown(elem_id="status", container=False)
            question = question_box("Ask a question", elem_id="question", autofocus=True, max_lines=8)
        export = gr.Markdown(
            sanitize_html=False, latex_delimiters=[], elem_id="export"
        )  # only a link of our own

        shown = [bot, status, question, export]
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        started = [
            question.submit(self.send, [question, conversation], shown, **hidden),
            bot.example_select(self.send_example, conversation, shown, **hidden),
            bot.retry(self.retry, [conversation, settings[0]], shown, **hidden),
            bot.edit(self.edit, conversation, shown, **hidden),
        ]
        engine = {"concurrency_id": "engine", "concurrency_limit": ANSWERS_AT_ONCE}
        answering = [
            event.success(
                self.answer,
                [conversation, name, *settings],
                [bot, status],
                api_visibility="private",
                show_progress="minimal",
                **engine,
            )
            for event in started
        ]
        for event in answering:
            event.then(self.settle, conversation, shown, **hidden)
        question.stop(None, cancels=answering, **hidden)
        bot.like(self.like, conversation, None, **hidden)
        bot.undo(self.undo, conversation, shown, **hidden)
        bot.clear(None, cancels=answering, **hidden).then(self.clear, conversation, shown, **hidden)
        gr.api(self.answer_once, api_name="ask", **engine)
