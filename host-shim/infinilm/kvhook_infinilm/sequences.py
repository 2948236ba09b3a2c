"""What the adapter remembers of a sequence that an arm serves."""

from __future__ import annotations

from dataclasses import dataclass

from . import native
from .host import Began


@dataclass
class Tracked:
    """A sequence of an arm. Only the thread that drives the engine's steps uses it."""

    wants: Began
    prompt_length: int
    request: object | None = None
    """InfiniLM's `InferenceRequest`; None in `InferEngine.generate`."""
    row: int = 0
    """Its place in a static batch."""
    blocks: list[int] | None = None
    """Its block table, where there is no request to hold it."""
    position: int = 0
    """Tokens whose keys and values were computed: the position of the next one."""
    dropped: int = 0
    """By how much the cache is shorter than the position."""
    mark: int = 0
    """Where growth is counted from."""
    prompt_rows: int | None = None
    """Rows that the compression of its prompt left; None: it was not compressed."""
    compressed: bool = False
    """Whether rows of it were moved, dropped or rewritten: from then on nothing of it is published."""

    def __post_init__(self) -> None:
        self.mark = self.prompt_length

    @property
    def uid(self) -> int:
        """Its name in the host."""
        return self.wants.uid

    @property
    def length(self) -> int:
        """Rows that the cache holds of it."""
        return self.position - self.dropped

    @property
    def table(self) -> list[int] | None:
        """Its blocks, for a paged cache."""
        return self.blocks if self.request is None else self.request.block_table

    @table.setter
    def table(self, blocks: list[int]) -> None:
        if self.request is None:
            self.blocks = blocks
        else:
            self.request.block_table = blocks
            self.request.num_blocks = len(blocks)

    def event(self, tokens: int, is_prefill: bool) -> int | None:
        """What a plugin is asked about (`KVHOOK_EVENT_*`) once so many more tokens are computed, if anything."""
        after = self.position + tokens
        if is_prefill:
            ends = after >= self.prompt_length and self.wants.on_prefill_done
            return native.KVHOOK_EVENT_PREFILL_DONE if ends else None
        every = self.wants.grown_every
        return native.KVHOOK_EVENT_GROWN if every and after - self.mark >= every else None


@dataclass
class Part:
    """A sequence's part of one forward."""

    tracked: Tracked | None
    """None: no arm ever served it."""
    tokens: int
    is_live: bool = False
    """Whether an arm serves it now."""


@dataclass
class Step:
    """One forward."""

    parts: list[Part]
    """As the engine orders them."""
    is_prefill: bool
    memory: object
    """Where the sequences' rows are (`memory.py`)."""
    together: bool = False
    """The sequences have one length in common: all are compressed or none."""
    ran: bool = False
    """The forward came back."""

    def live(self) -> list[tuple[Tracked, int]]:
        """The sequences that an arm serves, each with its new tokens."""
        return [(part.tracked, part.tokens) for part in self.parts if part.is_live]

    def due(self) -> list[tuple[Tracked, int, int]]:
        """Those that a plugin is to be asked about once the step has run: with event and new tokens."""
        found = []
        for tracked, tokens in self.live():
            event = tracked.event(tokens, self.is_prefill)
            if event is not None:
                found.append((tracked, event, tokens))
        return found
