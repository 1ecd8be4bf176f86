"""Models side by side: before and after training, on the same question and seed."""

from collections.abc import Iterator
from contextlib import ExitStack, closing

import gradio as gr

from inference import SamplingParams
from inference.chat import InTurn, TooLongError, Turn
from inference.reading import Reading
from page.chat import ANSWERS_AT_ONCE, Conversation, chat_messages, refusal, told
from page.settings import chatbot
from page.shelf import Shelf


class ComparePage:
    """Two models answer one question."""

    def __init__(self, shelf: Shelf, engine_turn: InTurn) -> None:
        """Compare models of the shelf; see `build`."""
        self.shelf, self.engine_turn = shelf, engine_turn

    def answer(
        self,
        question: str,
        left: str,
        right: str,
        temperature: float,
        top_p: float,
        max_completion_tokens: int,
        seed: int,
        budget: int,
    ) -> Iterator[tuple]:
        """Both answers as they grow, in turn."""
        conversation = Conversation()
        conversation.ask(question)
        params = SamplingParams(int(max_completion_tokens), temperature, top_p=top_p)
        turns = [conversation.turns[0]] * 2
        models = [self.shelf.get(name) for name in (left, right)]
        try:
            with ExitStack() as streams:
                asked = (params, (int(seed or 0), 0), self.engine_turn, int(budget or 0) or None)
                growing: dict[int, Iterator[Reading]] = {
                    side: streams.enter_context(closing(model.stream([turns[side]], *asked)))
                    for side, model in enumerate(models)
                }
                while growing:
                    for side, readings in list(growing.items()):
                        if (reading := next(readings, None)) is None:
                            del growing[side]
                        else:
                            turns[side] = Turn(question.strip(), reading)
                    yield self._shown(turns)
        except (TooLongError, ConnectionError) as error:
            raise refusal(str(error)) from error

    def _shown(self, turns: list[Turn]) -> tuple:
        messages = [[message for _, message in chat_messages([turn])] for turn in turns]
        return (*messages, *map(told, turns))

    def build(self, settings: list[gr.components.Component]) -> None:
        """Lay out the components and connect them; call it inside `gr.Blocks`."""
        names = self.shelf.names
        chatbots, statuses, chosen = [], [], []
        with gr.Row():
            for side, name in (("Left", names[-1]), ("Right", names[0])):
                with gr.Column():
                    chosen.append(gr.Dropdown(names, value=name, label=f"{side} model"))
                    chatbots.append(chatbot(elem_id=f"compare-{side.lower()}"))
                    statuses.append(gr.Markdown(container=False))
        question = gr.Textbox(
            show_label=False,
            container=False,
            elem_id="compare-question",
            placeholder="Ask both the same question",
            submit_btn=True,
            stop_btn=True,
        )
        shown = [*chatbots, *statuses]
        answering = question.submit(
            self.answer,
            [question, *chosen, *settings[:-1]],  # one answer each, no vote
            shown,
            api_visibility="private",
            show_progress="minimal",
            concurrency_id="engine",
            concurrency_limit=ANSWERS_AT_ONCE,
        )
        question.stop(None, cancels=[answering], api_visibility="private")
