"""The slots of the cache: keys and values of the rows that decode together, one slot a row."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SlotCache:
    """Keys and values in one block of memory, reserved once.

    The live rows always fill the first slots, so a layer's keys are a view and nothing is copied to read
    them. Every row has a length of its own: rows come and go in the middle of the others' text.

    Attributes:
        live: how many rows there are.
        lengths: `[slots]` positions that each row has filled; of the first `live`.
    """

    def __init__(self, layers: int, slots: int, heads: int, positions: int, like: Tensor) -> None:
        """Reserve the memory; on the CPU, what is never written is never taken.

        Args:
            layers: of the model.
            slots: rows at most.
            heads: of keys and values.
            positions: that a row may fill.
            like: keys `[..., D]` of the model, for the size of a head, dtype and device.
        """
        # Keys apart from values: side by side, each would be read with the other's bytes between.
        self.block = like.new_empty(layers, 2, slots, heads, positions, like.shape[-1])
        self.lengths = torch.zeros(slots, dtype=torch.long, device=like.device)
        self.live = 0
        self.reached = 0  # positions that have been read or written in any slot

    def _reach(self, positions: int) -> None:
        """Give what is read before it is written a number: no mask and no weight of 0 takes a NaN away."""
        if positions > self.reached:
            self.block[..., self.reached : positions, :] = 0
            self.reached = positions

    def admit(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Tensor, copies: Tensor
    ) -> None:
        """Give prompts slots behind the live rows.

        Args:
            keys: of each layer, `[P, heads, L, D]`, padded on the right.
            values: likewise.
            lengths: `[P]` positions that count.
            copies: `[P]` rows that begin with each prompt.
        """
        source = torch.arange(len(lengths), device=lengths.device).repeat_interleave(copies)
        slots = slice(self.live, self.live + len(source))
        self._reach(keys[0].shape[2])
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.block[layer, 0, slots, :, : key.shape[2]] = key[source]
            self.block[layer, 1, slots, :, : key.shape[2]] = value[source]
        self.lengths[slots] = lengths[source]
        self.live = slots.stop

    def select(self, order: Tensor) -> None:
        """Let row `i` go on from what was row `order[i]`; a row may go on several times, or not at all."""
        self.live = len(order)
        moved = (order != torch.arange(len(order), device=order.device)).nonzero().squeeze(1)
        if len(moved):
            source = order[moved]
            longest = int(self.lengths[source].max())
            self.block[:, :, moved, :, :longest] = self.block[:, :, source, :, :longest]
            self.lengths[moved] = self.lengths[source]

    def lengthen(self) -> Tensor:
        """Make every live row one longer; `[live]`, where its new position stands."""
        lengths = self.lengths[: self.live]
        places = lengths.clone()
        lengths += 1
        return places

    def extend(self) -> tuple[Tensor, int, Tensor | None]:
        """Make every live row one longer.

        Returns:
            Where `append` writes; how many positions `append` reads; and what hides those that a row has not
            filled, `[live, 1, 1, positions]` to be added to attention scores, None where there are none.
        """
        slots, heads, positions = self.block.shape[2:5]
        lengths = self.lengths[: self.live]
        rows = torch.arange(self.live * heads, device=lengths.device) * positions
        places = rows + self._place(self.lengthen()).repeat_interleave(heads)
        places = torch.cat([places, places + slots * heads * positions])
        shortest, longest = self._filled(lengths).aminmax()
        self._reach(int(longest))
        if shortest == longest:
            return places, int(longest), None
        unfilled = torch.arange(int(longest), device=lengths.device) >= lengths[:, None]
        hidden = torch.zeros(unfilled.shape, dtype=self.block.dtype, device=lengths.device)
        return places, int(longest), hidden.masked_fill_(unfilled, -torch.inf)[:, None, None]

    def _place(self, position: Tensor) -> Tensor:
        """Where a position stands in its slot."""
        return position

    def _filled(self, lengths: Tensor) -> Tensor:
        """How many places of a slot hold something."""
        return lengths

    def append(
        self, layer: int, key: Tensor, value: Tensor, places: Tensor, longest: int
    ) -> tuple[Tensor, Tensor]:
        """Write one position `[live, heads, D]` of a layer, and read all, `[live, heads, longest, D]`."""
        block = self.block[layer]
        written = torch.cat([key, value]).view(len(places), -1)
        block.view(-1, written.shape[-1]).index_copy_(0, places, written)
        return block[:, : self.live, :, :longest].unbind()

    def leave(self, done: Tensor) -> Tensor:
        """Let rows go; the last of the others move into their slots.

        Args:
            done: `[live]`, True where a row leaves.

        Returns:
            The old slot of every row that stays, `[live]` in the new order.
        """
        staying = int((~done).sum())
        order = torch.arange(self.live, device=done.device)
        holes = order[:staying][done[:staying]]
        movers = order[staying:][~done[staying:]]
        if len(movers):
            longest = int(self.lengths[movers].max())
            self.block[:, :, holes, :, :longest] = self.block[:, :, movers, :, :longest]
            self.lengths[holes] = self.lengths[movers]
            order[holes] = movers
        self.live = staying
        return order[:staying]


class WindowCache(SlotCache):
    """Keeps of every row the first positions, the attention sinks, and the newest, the window.

    The window is a ring, in which the newest position takes the place of the oldest. Keys stay turned to the
    positions that they were read at, which `lengths` goes on counting.

    Source: StreamingLLM, arXiv 2309.17453.
    """

    def __init__(self, sinks: int, layers: int, slots: int, heads: int, positions: int, like: Tensor) -> None:
        """Reserve `positions` for `sinks` and the window together; the others as for `SlotCache`."""
        super().__init__(layers, slots, heads, positions, like)
        self.sinks, self.window = sinks, positions - sinks

    def admit(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Tensor, copies: Tensor
    ) -> None:
        """As `SlotCache.admit`; of longer prompts, what the window would hold had they been read in it."""
        places = torch.arange(min(keys[0].shape[2], self.sinks + self.window), device=lengths.device)
        rounds = (lengths[:, None] - 1 - places).div(self.window, rounding_mode="floor")
        newest = (places + rounds * self.window).clamp(min=0)
        # [P, 1, places, 1]: the position that each place holds.
        held = torch.where(places < self.sinks, places, newest)[:, None, :, None]
        kept = [[part.take_along_dim(held, 2) for part in parts] for parts in (keys, values)]
        super().admit(*kept, lengths, copies)

    def _place(self, position: Tensor) -> Tensor:
        return torch.where(
            position < self.sinks, position, self.sinks + (position - self.sinks) % self.window
        )

    def _filled(self, lengths: Tensor) -> Tensor:
        return lengths.clamp(max=self.sinks + self.window)
