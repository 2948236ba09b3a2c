"""Where a sequence's rows are, and what becomes of the room that a commit frees: one class for each way in.

`InferEngine.generate` and the static scheduler own their rows alone. The paged scheduler shares blocks between requests
and keeps full ones for later: those are never written, the kept rows go into fresh blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import native
from .sequences import Tracked
from .views import RankCache


class StaticMemory:
    """A static cache: rows move in place, and the room serves the same sequence for longer."""

    def __init__(self, scheduler=None):
        self._scheduler = scheduler
        self._shorter: Tracked | None = None

    @property
    def any_shorter(self) -> bool:
        """Whether the running request's cache is shorter than its position."""
        tracked = self._shorter
        return tracked is not None and tracked.request is self._scheduler.running_request

    def dropped(self, table) -> int:
        """By how much the cache of the request with this table is shorter than its position."""
        return 0

    def forget_finished(self) -> None:
        """Requests have ended."""

    def protected(self, tracked: Tracked, length: int) -> tuple[int, int]:
        """Leading rows that others use, and that are published, once `length` rows are stored."""
        return 0, 0

    def view(self, cache: RankCache, tracked: Tracked, length: int):
        """The sequence's layers on one rank."""
        return cache.view(length, row=tracked.row)

    def take(self, tracked: Tracked, rows: int) -> list[int] | None:
        """Fresh blocks for so many rows; None: there are none."""
        return None

    def give_back(self, fresh: Sequence[int] | None) -> None:
        """Fresh blocks are not used after all."""

    def before_commit(self, tracked: Tracked) -> None:
        """All of the sequence that others may find is published now: from here on nothing of it is."""
        if self._scheduler is not None:
            # The next request must not take compressed rows for this prompt's prefix.
            self._scheduler.cached_block_hashes.clear()

    def committed(
        self, tracked: Tracked, movement: int, fresh: list[int] | None, kept: Sequence[int]
    ) -> int:
        """The rows have moved, and the sequence has its new length: the table follows.

        Args:
            movement: `KVHOOK_MOVE_*`.
            fresh: What `take` gave.
            kept: Ordinals of the blocks that stay, for an edit of the table.

        Returns the number of blocks that became free.
        """
        if self._scheduler is not None:
            self._shorter = tracked
        return 0


class BatchMemory(StaticMemory):
    """The paged cache of one `InferEngine.generate`: fixed blocks for each sequence, used by nobody else."""

    def __init__(self, block_size: int):
        super().__init__()
        self._block_size = block_size

    def view(self, cache: RankCache, tracked: Tracked, length: int):
        return cache.view(length, tracked.table)

    def committed(self, tracked, movement, fresh, kept):
        if movement == native.KVHOOK_MOVE_TABLE:
            # The blocks that leave the front are used again behind it.
            stay = set(kept)
            table = tracked.table
            tracked.table = [table[i] for i in kept] + [
                block for i, block in enumerate(table) if i not in stay
            ]
        return 0


class PagedMemory:
    """The blocks of InfiniLM's paged scheduler."""

    def __init__(self, scheduler, publish):
        """Args: publish: `Scheduler.commit_computed_tokens` as InfiniLM has it."""
        from infinilm.llm.prefix_cache import EMPTY_BLOCK_HASH

        self._scheduler = scheduler
        self._manager = scheduler.cache_manager
        self._publish = publish
        self._no_hash = EMPTY_BLOCK_HASH
        self._shorter: dict[int, Tracked] = {}

    @property
    def any_shorter(self) -> bool:
        """Whether some request's cache is shorter than its position."""
        return bool(self._shorter)

    def dropped(self, table: list[int]) -> int:
        """By how much the cache of the request with this very table is shorter than its position. InfiniLM's block manager
        is given the table, not the request."""
        tracked = self._shorter.get(id(table))
        return tracked.dropped if tracked is not None and tracked.table is table else 0

    def forget_finished(self) -> None:
        """Requests that have ended need no slots."""
        for key, tracked in list(self._shorter.items()):
            if tracked.request.is_finished() or id(tracked.table) != key:
                del self._shorter[key]

    @property
    def _block_size(self) -> int:
        return self._manager.block_size

    def protected(self, tracked: Tracked, length: int) -> tuple[int, int]:
        blocks = [self._manager.blocks[block] for block in tracked.table]
        shared = max((i + 1 for i, block in enumerate(blocks) if block.ref_count > 1), default=0)
        published = max(
            (i + 1 for i, block in enumerate(blocks) if block.hash != self._no_hash), default=0
        )
        if not tracked.compressed and self._publishes(tracked.request):
            # Full blocks are published before they are read.
            published = max(
                published, min(length // self._block_size, len(tracked.request.block_hashes))
            )
        return min(shared * self._block_size, length), min(published * self._block_size, length)

    def view(self, cache: RankCache, tracked: Tracked, length: int):
        return cache.view(length, tracked.table)

    def take(self, tracked: Tracked, rows: int) -> list[int] | None:
        allocated = self._manager.allocate_slots(rows)
        return None if allocated is None else allocated[0]

    def give_back(self, fresh: Sequence[int] | None) -> None:
        if fresh:
            self._manager.free_blocks(fresh)

    def before_commit(self, tracked: Tracked) -> None:
        if not tracked.compressed:
            self._publish(self._scheduler, tracked.request, tracked.position)

    def committed(self, tracked, movement, fresh, kept):
        before = tracked.table
        if movement == native.KVHOOK_MOVE_FRESH:
            after, left = fresh, list(before)
        elif movement == native.KVHOOK_MOVE_TABLE:
            stay = set(kept)
            after = [before[i] for i in kept]
            left = [block for i, block in enumerate(before) if i not in stay]
        else:
            count = -(-tracked.length // self._block_size)
            after, left = before[:count], before[count:]
        # A list of its own, by whose identity the length is found.
        tracked.table = after = list(after)
        self._shorter[id(after)] = tracked
        self._manager.free_blocks(left)
        freed = sum(self._manager.blocks[block].ref_count == 0 for block in left)
        return freed - (len(after) if movement == native.KVHOOK_MOVE_FRESH else 0)

    def _publishes(self, request) -> bool:
        return self._scheduler.enable_prefix_caching and not self._scheduler.has_mamba_cache
