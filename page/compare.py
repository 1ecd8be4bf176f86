"""Models side by side, before and after training (base, SFT, GRPO).

All are asked the same question with the same seed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing

import gradio as gr

from inference import SamplingParams
from inference.chat import InTurn, TooLongError, Turn
from inference.reading import Reading
from page.chat import ANSWERS_AT_ONCE, Conversation, chat_messages, refusal, told
from page.settings import chatbot, question_box
from page.shelf import HELD, Shelf

COLUMNS = HELD  # whoever answers is held


class ComparePage:
    """Models answer one question."""

    def __init__(self, shelf: Shelf, engine_turn: InTurn) -> None:
        """Compare models of the shelf; see `build`."""
        self.shelf, self.engine_turn = shelf, engine_turn

    def answer(
        self,
        question: str,
        temperature: float,
        top_p: float,
        max_completion_tokens: int,
        seed: int,
        budget: int,
        *names: str,
    ) -> Iterator[tuple]:
        """The answers of the models as they grow, in turn."""
        conversation = Conversation()
        conversation.ask(question)
        params = SamplingParams(int(max_completion_tokens), temperature, top_p=top_p)
        turns = [conversation.turns[0]] * len(names)
        models = [self.shelf.get(name) for name in names]
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
            # Before stands left of after: the page's own model is the last.
            for place, name in enumerate([*names[1:COLUMNS], names[0]], start=1):
                with gr.Column(min_width=200):
                    chosen.append(gr.Dropdown(names, value=name, label=f"Model {place}"))
                    chatbots.append(chatbot(elem_id=f"compare-{place}"))
                    statuses.append(gr.Markdown(container=False))
        question = question_box("Ask all the same question", elem_id="compare-question", stop_btn=True)
        shown = [*chatbots, *statuses]
        answering = question.submit(
            self.answer,
            [question, *settings[:-1], *chosen],  # one answer each, no vote
            shown,
            api_visibility="private",
            show_progress="minimal",
            concurrency_id="engine",
            concurrency_limit=ANSWERS_AT_ONCE,
        )
        question.stop(None, cancels=[answering], api_visibility="private")
