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
        self._sequences = []
        for row in range(self._size):
            tracked = Tracked(adapter.host.begin(key, arm, shape[1], []), shape[1], row=row)
            if self._kind.paged:
                tracked.blocks = list(range(row * blocks, (row + 1) * blocks))
            self._sequences.append(adapter.keep(tracked))

    def step(self, input_ids) -> Step:
        """The forward of these tokens."""
        tokens = input_ids.numel() // self._size
        parts = [
            Part(tracked, tokens, tracked is not None and tracked.uid in self._adapter.live)
            for tracked in self._sequences
        ]
        first = self._sequences[0]
        together = not self._kind.paged and self._size > 1
        return Step(parts, first is not None and first.position == 0, self._memory, together)

    def placed(self, step: Step) -> dict:
        """The arguments of a forward that say where rows are, as InfiniLM derives them from positions."""
        if not self._kind.paged:
            return {}
        size = self._kind.block_size
        slots = []
        for part in step.parts:
            rows = range(part.tracked.length, part.tracked.length + part.tokens)
            slots += [part.tracked.table[row // size] * size + row % size for row in rows]
        tables = [part.tracked.table for part in step.parts]
        return {"slot_mapping": tensor_i64(slots), "block_tables": tensor_i32(tables)}

    def end(self) -> None:
        """The call is over."""
        for tracked in self._sequences:
            if tracked is not None:
                self._adapter.free(tracked, native.KVH_FREE_FINISHED)
