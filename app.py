"""The chat page: talk to a model in the browser, see it think, stop it, ask again.

    python app.py --model outputs/grpo/final
    python app.py --model outputs/grpo/final --compare '[outputs/sft/final]'     # before beside after
    python app.py --model Qwen/Qwen2.5-1.5B-Instruct --max_completion_tokens 2048

It listens on this machine only, unless --host says otherwise; then give it a password with --auth_env.
Neither the server nor the page asks anything of other hosts.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference import SamplingParams
from inference.chat import ChatModel, InTurn, load_chat_model
from inference.markdown import as_markdown
from page.chat import ANSWERS_AT_ONCE, ChatPage
from page.compare import ComparePage
from page.runs import RunsPage
from page.settings import sidebar
from page.shelf import Shelf
from runs.config import UserError, at_the_door, parse_config, require, run_script

QUEUE_LENGTH = 32


@dataclass(frozen=True)
class AppConfig:
    """What the page is started with."""

    model: str
    """model folder, or a name on the Hugging Face Hub"""
    compare: list[str] = field(default_factory=list)
    """further models, to choose from and to compare with; no visitor can choose any other"""
    runs: str = "outputs"
    """folder of the runs that visitors may look into"""
    feedback: str = "outputs/feedback"
    """folder for the answers that visitors like and dislike, as examples for train_sft.py"""
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
        if self.engine_url and self.compare:
            raise ValueError("engine_url answers for one model, got compare as well; give one of the two")
        SamplingParams(self.max_completion_tokens, self.temperature, top_p=self.top_p)


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


def build_page(shelf: Shelf, config: AppConfig) -> gr.Blocks:
    """The whole page, not yet served."""
    engine_turn = InTurn()
    with gr.Blocks(title="Ponder", analytics_enabled=False, fill_height=True) as page:
        gr.Markdown(f"# Ponder\n{as_markdown(shelf.first.name)}", elem_id="header")
        settings = sidebar(config)
        with gr.Tab("Chat"):
            ChatPage(shelf, config, engine_turn).build(settings)
        if len(shelf.names) > 1:
            with gr.Tab("Side by side"):
                ComparePage(shelf, engine_turn).build(settings)
        with gr.Tab("Runs"):
            RunsPage(Path(config.runs)).build()
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

        def load(name: str) -> ChatModel:
            return load_chat_model(name, config.system_prompt, config.trust_remote_code, *served)

        shelf = Shelf([config.model, *config.compare], load)
    page = build_page(shelf, config)
    print(f"{config.model} is at {launch(page, config, auth)} (Ctrl-C ends it)")
    if auth is None and config.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"Whoever reaches {config.host} can use it: --auth_env asks for a password.", file=sys.stderr)
    page.block_thread()


if __name__ == "__main__":
    run_script(main, lambda: parse_config(AppConfig))
