"""One call of `InferEngine.generate`: a batch without a scheduler, all of one arm."""

from __future__ import annotations

from collections.abc import Sequence

from . import native
from .lengths import tensor_i32, tensor_i64
from .memory import BatchMemory, StaticMemory
from .sequences import Part, Step, Tracked
from .views import CacheKind


class Batch:
    """The sequences of the call. Used by the thread that made it."""

    def __init__(self, adapter, shape: Sequence[int], new_tokens: int, arm: str, key: str):
        """Begins the sequences.

        Args:
            adapter: The engine's `Adapter`.
            shape: Of the prompts, `[batch, tokens]`.
            new_tokens: The most that are generated for each.
            arm: Name of the arm; empty: by weight.
            key: What the arm is chosen by: the same for all.
        """
        self._adapter = adapter
        self._kind: CacheKind = adapter.kind
        self._size = shape[0]
        size = self._kind.block_size
        # InfiniLM gives each sequence a stretch of blocks of its own.
        blocks = -(-(shape[1] + (new_tokens or 0)) // size) if size else 0
        self._memory = BatchMemory(size) if self._kind.paged else StaticMemory()
        self._tokens = 0
        self._sequences: list[Tracked | None] = []
        for row in range(self._size):
            tracked = Tracked(adapter.host.begin(key, arm, shape[1], []), shape[1], row=row)
            if self._kind.paged:
                tracked.blocks = list(range(row * blocks, (row + 1) * blocks))
            self._sequences.append(adapter.keep(tracked))

    def dropped(self, input_ids) -> list[int]:
        """These tokens come next. Gives the rows that each sequence lacks."""
        self._tokens = input_ids.numel() // self._size
        return [tracked.dropped if tracked else 0 for tracked in self._sequences]

    def step(self) -> Step:
        """The forward of the tokens that come."""
        live = self._adapter.live
        parts = [
            Part(one, self._tokens, one is not None and one.uid in live) for one in self._sequences
        ]
        first = self._sequences[0]
        together = not self._kind.paged and self._size > 1
        return Step(parts, first is not None and first.position == 0, self._memory, together)

    def placed(self) -> dict:
        """The arguments of a forward that say where rows are, as InfiniLM derives them from positions."""
        if not self._kind.paged:
            return {}
        size = self._kind.block_size
        slots = []
        for one in self._sequences:
            rows = range(one.length, one.length + self._tokens)
            slots += [one.table[row // size] * size + row % size for row in rows]
        tables = [one.table for one in self._sequences]
        return {"slot_mapping": tensor_i64(slots), "block_tables": tensor_i32(tables)}

    def end(self) -> None:
        """The call is over."""
        for tracked in self._sequences:
            if tracked is not None:
                self._adapter.free(tracked, native.KVH_FREE_FINISHED)
