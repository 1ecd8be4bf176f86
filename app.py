"""The chat page: talk to a model in the browser, see it think, stop it, ask again.

    python app.py --model outputs/grpo/final
    python app.py --model Qwen/Qwen2.5-1.5B-Instruct --max_completion_tokens 2048

It listens on this machine only, unless --host says otherwise; then give it a password with --auth_env.
Neither the server nor the page asks anything of other hosts. This is the only file that knows Gradio.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference import SamplingParams
from inference.chat import ChatModel, InTurn, TooLongError, Turn, describe, examples, load_chat_model
from inference.markdown import INVISIBLE, as_markdown, as_typed
from inference.reading import CompletionReader, Reading
from runs.config import UserError, at_the_door, parse_config, require, run_script

# Each of these answers streams at its share of the model's speed; whoever comes later waits in the queue.
ANSWERS_AT_ONCE = 4
QUEUE_LENGTH = 32

QUESTION_CHARACTERS = 8_000


@dataclass(frozen=True)
class AppConfig:
    """What the page is started with."""

    model: str
    """model folder, or a name on the Hugging Face Hub"""
    engine_url: str | None = None
    """an OpenAI-compatible server (vLLM, mlx_lm.server, llama.cpp) that has the model and answers, up to its
    /v1; the key in PONDER_API_KEY"""
    served_model: str | None = None
    """the model's name on that server, where it has several"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 lets other machines in"""
    port: int = 7860
    """port to listen on"""
    auth_env: str | None = None
    """name of an environment variable that holds user:password, asked of every visitor"""
    system_prompt: str | None = None
    """replaces the one saved with the model; the empty text takes it away"""
    trust_remote_code: bool = False
    """run Python code that the model brings; read it first"""
    temperature: float = 0.0
    """where the page's slider starts; 0 takes the likeliest token"""
    top_p: float = 1.0
    """where the page's slider starts; 1 keeps all tokens"""
    max_completion_tokens: int = 1024
    """most tokens that a visitor may ask for, thought included"""
    seed: int = 0
    """where the page's seed starts; same seed, same answers"""

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the field."""
        require(self, "port", "seed", at_least=0)
        SamplingParams(self.max_completion_tokens, self.temperature, top_p=self.top_p)


# ------------------------------------------------------------------------------------------------------------
# What is shown

LATEX_DELIMITERS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": r"\[", "right": r"\]", "display": True},
    {"left": r"\(", "right": r"\)", "display": False},
]


def chat_messages(turns: list[Turn]) -> list[tuple[int, gr.ChatMessage]]:
    """The messages that show a conversation, each with the number of its turn."""
    messages = []
    for number, turn in enumerate(turns):
        messages.append((number, _message("user", as_typed(turn.question))))
        if turn.reading:
            messages += [(number, message) for message in _completion_messages(turn.reading)]
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

    @property
    def is_answering(self) -> bool:
        """The last question still waits for the end of its answer."""
        return bool(self.turns) and (
            self.turns[-1].reading is None or not self.turns[-1].reading.finish_reason
        )

    def ask(self, question: str) -> None:
        """Add a question, checked."""
        if self.is_answering:
            raise _refusal("An answer is being written. Wait for it, or stop it.")
        if not question.strip():
            raise _refusal("Type a question first.")
        if len(question) > QUESTION_CHARACTERS:
            raise _refusal(
                f"The question has {len(question):,} characters; at most {QUESTION_CHARACTERS:,} are taken."
            )
        self.turns.append(Turn(question.strip()))
        self.attempt = 0


def _refusal(message: str) -> gr.Error:
    return gr.Error(message, duration=6, print_exception=False)


class ChatPage:
    """The chat: its components and what they do."""

    def __init__(self, model: ChatModel, config: AppConfig) -> None:
        """Serve `model`; see `build` for the page."""
        self.model = model
        self.config = config
        self.engine_turn = InTurn()

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
            raise _refusal("There is nothing to answer again.")
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
            raise _refusal("This question cannot be changed now.")
        kept = conversation.turns[: rows[index][0]]
        changed = Conversation(kept)
        changed.ask(str(event.value).replace(INVISIBLE, ""))
        conversation.turns, conversation.attempt = changed.turns, 0
        return self._busy(conversation)

    def undo(self, conversation: Conversation):
        """The last question goes back to where it was typed."""
        question = conversation.turns.pop().question if conversation.turns else ""
        return self._messages(conversation), "", question

    def clear(self, conversation: Conversation):
        """The conversation starts over."""
        conversation.turns, conversation.attempt = [], 0
        return self._idle(conversation)

    def answer(
        self,
        conversation: Conversation,
        temperature: float,
        top_p: float,
        max_completion_tokens: int,
        seed: int,
    ):
        """The last question is answered, a reading at a time."""
        params = SamplingParams(int(max_completion_tokens), temperature, top_p=top_p)
        turns = conversation.turns
        try:
            for reading in self._readings(turns, params, (int(seed or 0), conversation.attempt)):
                turns[-1] = replace(turns[-1], reading=reading)
                yield self._messages(conversation), describe(reading)
        except gr.Error:
            turns.pop()
            raise

    def settle(self, conversation: Conversation):
        """The answer is over; where it was stopped, it says so."""
        if conversation.is_answering:
            conversation.turns[-1] = cancelled(conversation.turns[-1], self.model.tokenizer)
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
            raise _refusal(f"seed must be >= 0, got {seed}")
        try:
            params = SamplingParams(int(limit), float(temperature), top_p=float(top_p))
        except ValueError as error:
            raise _refusal(str(error)) from error
        for reading in self._readings(conversation.turns, params, (int(seed), 0)):
            yield {
                "thought": reading.thought,
                "answer": reading.answer.strip(),
                "text": reading.text,
                "tokens": reading.tokens,
                "finish_reason": reading.finish_reason,
            }

    def _readings(self, turns: list[Turn], params: SamplingParams, seed: tuple) -> Iterator[Reading]:
        """The answer as it grows. Closing this closes the engine's stream: no other token is computed."""
        try:
            with closing(self.model.stream(turns, params, seed, self.engine_turn)) as readings:
                yield from readings
        except (TooLongError, ConnectionError) as error:
            raise _refusal(str(error)) from error

    def _messages(self, conversation: Conversation) -> list[gr.ChatMessage]:
        return [message for _, message in chat_messages(conversation.turns)]

    def _busy(self, conversation: Conversation, **textbox):
        return self._messages(conversation), "", gr.Textbox(submit_btn=False, stop_btn=True, **textbox)

    def _idle(self, conversation: Conversation):
        reading = conversation.turns[-1].reading if conversation.turns else None
        return (
            self._messages(conversation),
            describe(reading) if reading else "",
            gr.Textbox(submit_btn=True, stop_btn=False),
        )

    # The page

    def build(self) -> None:
        """Lay out the components and connect them; call it inside `gr.Blocks`."""
        conversation = gr.State(Conversation())
        settings = self._settings()
        with gr.Column(elem_id="chat-page"):
            chatbot = gr.Chatbot(
                show_label=False,
                container=False,
                elem_id="chat",
                layout="bubble",
                editable="user",
                latex_delimiters=LATEX_DELIMITERS,
                buttons=["copy", "copy_all"],
                placeholder="## What shall we work out?",
                examples=[{"text": text} for text in examples(self.model)],
            )
            status = gr.Markdown(elem_id="status", container=False)
            question = gr.Textbox(
                show_label=False,
                container=False,
                elem_id="question",
                placeholder="Ask a question",
                submit_btn=True,
                autofocus=True,
                max_lines=8,
            )

        shown = [chatbot, status, question]
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        started = [
            question.submit(self.send, [question, conversation], shown, **hidden),
            chatbot.example_select(self.send_example, conversation, shown, **hidden),
            chatbot.retry(self.retry, [conversation, settings[0]], shown, **hidden),
            chatbot.edit(self.edit, conversation, shown, **hidden),
        ]
        engine = {"concurrency_id": "engine", "concurrency_limit": ANSWERS_AT_ONCE}
        answering = [
            event.success(
                self.answer,
                [conversation, *settings],
                [chatbot, status],
                api_visibility="private",
                show_progress="minimal",
                **engine,
            )
            for event in started
        ]
        for event in answering:
            event.then(self.settle, conversation, shown, **hidden)
        question.stop(None, cancels=answering, **hidden)
        chatbot.undo(self.undo, conversation, shown, **hidden)
        chatbot.clear(None, cancels=answering, **hidden).then(self.clear, conversation, shown, **hidden)
        gr.api(self.answer_once, api_name="ask", **engine)

    def _settings(self) -> list[gr.components.Component]:
        config = self.config
        with gr.Sidebar(open=False, position="right", elem_id="settings"):
            gr.Markdown("### Settings")
            return [
                gr.Slider(
                    0,
                    2,
                    config.temperature,
                    step=0.05,
                    label="Temperature",
                    info="0 takes the likeliest token",
                ),
                gr.Slider(0.05, 1, config.top_p, step=0.05, label="Top-p", info="1 keeps every token"),
                gr.Slider(
                    1,
                    config.max_completion_tokens,
                    config.max_completion_tokens,
                    step=1,
                    label="Longest answer",
                    info="in tokens, the thought included",
                ),
                gr.Number(config.seed, label="Seed", info="same seed, same answer", precision=0, minimum=0),
            ]


# ------------------------------------------------------------------------------------------------------------
# The page around it


def theme() -> gr.themes.Base:
    """Quiet greys, one accent, and the fonts that the reader's system has: nothing is fetched."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill="white",
        body_text_color="*neutral_900",
        body_background_fill_dark="*neutral_900",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        border_color_primary_dark="*neutral_700",
    )


def build_page(model: ChatModel, config: AppConfig) -> gr.Blocks:
    """The whole page, not yet served."""
    with gr.Blocks(title="Ponder", analytics_enabled=False, fill_height=True) as page:
        gr.Markdown(f"# Ponder\n{as_markdown(model.name)}", elem_id="header")
        ChatPage(model, config).build()
    return page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=ANSWERS_AT_ONCE)


class Guard:
    """Stands before the page: the browser loads nothing from elsewhere, and nobody uploads."""

    POLICY = (
        "default-src 'self'; script-src 'self' 'unsafe-inline'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "worker-src 'self' blob:; object-src 'none'; form-action 'self'"
    )

    def __init__(self, app: ASGIApp) -> None:
        """Guard `app`."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with the policy in the answer's head."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if "/upload" in scope["path"]:
            return await PlainTextResponse("uploads are off", 403)(scope, receive, send)

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.POLICY.encode())]
            await send(message)

        return await self.app(scope, receive, send_with_policy)


def launch(page: gr.Blocks, config: AppConfig, auth: tuple[str, str] | None) -> str:
    """Serve the page from a thread, and return its address."""
    try:
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port,
            auth=auth,
            theme=theme(),
            css_paths=Path(__file__).with_name("app.css"),
            footer_links=[],
            share=False,
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
            ssr_mode=False,
            app_kwargs={"middleware": [Middleware(Guard)]},
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise UserError(
            f"port {config.port} of {config.host} cannot be used; choose another: {error}"
        ) from error
    return address


def read_auth(name: str | None) -> tuple[str, str] | None:
    """The user and password in an environment variable."""
    if name is None:
        return None
    user, colon, password = os.environ.get(name, "").partition(":")
    if not (user and colon and password):
        raise ValueError(
            f"auth_env: the environment variable {name} must hold user:password; export it first"
        )
    return user, password


def main(config: AppConfig) -> None:
    """Load the model and serve the page until Ctrl-C."""
    with at_the_door():
        auth = read_auth(config.auth_env)
        served = (config.engine_url, config.served_model)
        model = load_chat_model(config.model, config.system_prompt, config.trust_remote_code, *served)
    page = build_page(model, config)
    print(f"{config.model} is at {launch(page, config, auth)} (Ctrl-C ends it)")
    if auth is None and config.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"Whoever reaches {config.host} can use it: --auth_env asks for a password.", file=sys.stderr)
    page.block_thread()


if __name__ == "__main__":
    run_script(main, lambda: parse_config(AppConfig))
