"""The models that a visitor may choose from: those named at the start, each loaded when first asked for."""

import threading
from collections.abc import Callable, Sequence

from inference.chat import ChatModel

# A page that compares base, SFT and GRPO keeps all three; a fourth takes the place of the one unused for
# longest.
HELD = 3


class Shelf:
    """Loads models by name, and holds the latest."""

    def __init__(self, names: Sequence[str], load: Callable[[str], ChatModel]) -> None:
        """Begin with the first model loaded, so that what is wrong with it is told at the start.

        Args:
            names: all that may be chosen.
            load: a model by its name.
        """
        self.names = list(dict.fromkeys(names))
        self._load = load
        self._held: dict[str, ChatModel] = {}
        self._lock = threading.Lock()  # one loads, whoever else asks waits
        self.first = self.get(self.names[0])

    def get(self, name: str) -> ChatModel:
        """A model of the shelf.

        Raises:
            ValueError: there is no such model here, whatever the disk has.
        """
        if name not in self.names:
            raise ValueError(f"model {name!r} is not among those this page was started with")
        with self._lock:
            model = self._held.pop(name, None) or self._load(name)
            self._held[name] = model  # the latest stands last
            for oldest in list(self._held)[:-HELD]:
                del self._held[oldest]
            return model
