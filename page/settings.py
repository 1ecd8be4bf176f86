"""How a visitor wants to be answered."""

from typing import Any

import gradio as gr

LATEX_DELIMITERS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": r"\[", "right": r"\]", "display": True},
    {"left": r"\(", "right": r"\)", "display": False},
]


def chatbot(**more: Any) -> gr.Chatbot:
    """A conversation as all tabs show it."""
    look = {"show_label": False, "container": False, "layout": "bubble", "latex_delimiters": LATEX_DELIMITERS}
    return gr.Chatbot(buttons=["copy", "copy_all"], **look | more)


def question_box(placeholder: str, **more: Any) -> gr.Textbox:
    """Where a question is typed."""
    look = {"show_label": False, "container": False, "submit_btn": True}
    return gr.Textbox(placeholder=placeholder, **look, **more)


def sidebar(config: Any) -> list[gr.components.Component]:
    """Temperature, top-p, the longest answer, the seed, the longest thought and the number of votes, where
    `config` has them begin.
    """
    with gr.Sidebar(open=False, position="right", elem_id="settings"):
        gr.Markdown("### Settings")
        return [
            gr.Slider(
                0, 2, config.temperature, step=0.05, label="Temperature", info="0 takes the likeliest token"
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
            gr.Number(
                0,
                label="Longest thought",
                info="in tokens; it is closed there, and the answer has to follow. 0 for any",
                precision=0,
                minimum=0,
                elem_id="budget",
            ),
            gr.Slider(
                1,
                16,
                1,
                step=1,
                label="Votes",
                info="so many answers, and the one most of them give; needs a temperature",
                elem_id="votes",
            ),
        ]
