"""Both halves of a compression: prepare on every rank, then, on the verdict of all, commit on every rank.

Everything runs on the thread that drives the engine's steps, between two forwards; with the C++ shim the prepares have
run on the ranks' own threads by then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from . import native
from .errors import HostError, KvhookError
from .host import Candidate, Host
from .native import ffi
from .sequences import Tracked
from .views import RankCache

_logger = logging.getLogger("kvhook")


class SplitCommit(KvhookError):
    """Some of what had to change together changed, and the rest cannot: the sequences' rows are not usable."""

    def __init__(self, sequences: Sequence[Tracked], cause: Exception):
        super().__init__(
            f"sequences {[tracked.uid for tracked in sequences]} were committed in part: {cause}"
        )
        self.sequences = list(sequences)


class Prepares:
    """`KvhookPrepareSequence[]` for each rank, for sequences that are prepared in one call."""

    def __init__(
        self, caches: Sequence[RankCache], memory, due: Sequence[tuple[Tracked, int, int]]
    ):
        """Describes sequences as they will be when their tokens are computed.

        Args:
            caches: The ranks' caches.
            memory: Where the sequences' rows are.
            due: Each with its event (`KVHOOK_EVENT_*`) and the tokens still to be computed.
        """
        self.sequences = [tracked for tracked, _, _ in due]
        self.ranks = [ffi.new("KvhookPrepareSequence[]", len(due)) for _ in caches]
        self._views = []
        for place, (tracked, event, tokens) in enumerate(due):
            length = tracked.length + tokens
            shared, published = memory.protected(tracked, length)
            for cache, prepares in zip(caches, self.ranks):
                view = memory.view(cache, tracked, length)
                self._views.append(view)
                out = prepares[place]
                out.struct_size = ffi.sizeof("KvhookPrepareSequence")
                out.uid = tracked.uid
                out.event = event
                out.fresh = bool(shared or published)
                out.layers = native.array(view.raw)
                out.next_position = tracked.position + tokens
                out.shared_rows = shared
                out.published_rows = published

    def run(self, host: Host) -> None:
        """Prepares on one rank after the other, on this thread."""
        for rank, prepares in enumerate(self.ranks):
            host.prepare(rank, prepares)

    def drop(self, host: Host) -> None:
        """Gives up every ticket that a rank has opened."""
        give_up(host, {prepare.ticket for prepares in self.ranks for prepare in prepares})

    def ticket(self, tracked: Tracked) -> int:
        """The ticket on which all ranks agree; 0: the sequence is kept."""
        place = next(i for i, each in enumerate(self.sequences) if each is tracked)
        tickets = [prepares[place].ticket for prepares in self.ranks]
        return tickets[0] if all(tickets) else 0


def give_up(host: Host, tickets: Iterable[int]) -> None:
    """Drops those of the tickets that are open; 0 is none."""
    for ticket in tickets:
        if ticket and host.verdict(ticket).verdict != native.KVHOOK_VERDICT_DROPPED:
            host.drop(ticket, native.KVH_REASON_OTHER)


class Compression:
    """Compresses sequences of one engine."""

    def __init__(self, host: Host, caches: Sequence[RankCache]):
        self._host = host
        self._caches = caches

    def one(self, memory, tracked: Tracked, event: int, prepared: Prepares | None) -> bool:
        """Asks about a sequence and carries out what comes of it. Whether it was compressed.

        Args:
            event: `KVHOOK_EVENT_*`.
            prepared: What the ranks' threads prepared already.

        Raises `SplitCommit` where a rank cannot follow the others; any other `KvhookError` left the rows as they were.
        """
        if prepared is None:
            prepared = self._prepare(memory, [(tracked, event)])
        ticket = prepared.ticket(tracked) if prepared else 0
        return bool(ticket) and self._settle(memory, tracked, ticket)

    def together(
        self, memory, due: Sequence[tuple[Tracked, int]], prepared: Prepares | None
    ) -> bool:
        """As `one` for sequences that have one length in common: all are compressed or none."""
        if prepared is None:
            prepared = self._prepare(memory, due)
        if prepared is None:
            return False
        tickets = {tracked.uid: prepared.ticket(tracked) for tracked, _ in due}
        verdicts = [self._host.verdict(ticket) for ticket in tickets.values() if ticket]
        ready = [verdict for verdict in verdicts if verdict.verdict == native.KVHOOK_VERDICT_READY]
        if len(ready) < len(due) or any(verdict.counts != ready[0].counts for verdict in ready):
            give_up(self._host, tickets.values())
            return False
        for done, (tracked, _) in enumerate(due):
            try:
                self._settle(memory, tracked, tickets[tracked.uid])
            except Exception as error:
                if done:
                    raise SplitCommit([tracked for tracked, _ in due], error) from error
                give_up(self._host, list(tickets.values())[1:])
                raise
        return True

    def _prepare(self, memory, due: Sequence[tuple[Tracked, int]]) -> Prepares | None:
        """None: one of them is to be kept, for a reason that the host has counted."""
        for tracked, event in due:
            shared, published = memory.protected(tracked, tracked.length)
            lengths = [tracked.length if layer else 0 for layer in self._caches[0].geometry]
            candidate = Candidate(tracked.uid, event, lengths, tracked.position, shared, published)
            if self._host.ask(candidate).decision == native.KVHOOK_DECISION_KEEP:
                return None
        prepares = Prepares(self._caches, memory, [(tracked, event, 0) for tracked, event in due])
        prepares.run(self._host)
        return prepares

    def _settle(self, memory, tracked: Tracked, ticket: int) -> bool:
        verdict = self._host.verdict(ticket)
        if verdict.verdict != native.KVHOOK_VERDICT_READY:
            return False
        length = self._common(verdict.counts)
        memory.before_commit(tracked)
        fresh = None
        kept: list[int] = []
        if verdict.movement == native.KVHOOK_MOVE_FRESH:
            fresh = memory.take(tracked, length)
            if fresh is None:
                self._host.drop(ticket, native.KVH_REASON_NO_ROOM)
                return False
        elif verdict.movement == native.KVHOOK_MOVE_TABLE:
            edits = self._host.table_edit(ticket)
            kept = next(edit for edit, layer in zip(edits, self._caches[0].geometry) if layer)
        done = 0
        try:
            for rank in range(len(self._caches)):
                self._commit(rank, memory, tracked, ticket, fresh)
                done += 1
        except Exception as error:
            memory.give_back(fresh)
            if done:
                raise SplitCommit([tracked], error) from error
            raise
        # From here on the sequence is shorter, whatever else happens.
        tracked.dropped = tracked.position - length
        tracked.compressed = True
        if tracked.position == tracked.prompt_length:
            tracked.prompt_rows = length
        blocks = memory.committed(tracked, verdict.movement, fresh, kept)
        if blocks > 0:
            rows = blocks * self._caches[0].kind.block_size
            self._host.freed(tracked.uid, rows * sum(cache.row_bytes for cache in self._caches))
        _logger.debug("sequence %d: %d of %d rows are kept", tracked.uid, length, tracked.position)
        return True

    def _commit(self, rank: int, memory, tracked: Tracked, ticket: int, fresh) -> None:
        cache = self._caches[rank]
        layers = memory.view(cache, tracked, tracked.length)
        room = None if fresh is None else cache.view(len(fresh) * cache.kind.block_size, fresh)
        arguments = (rank, ticket, layers.raw, tracked.position, room and room.raw)
        try:
            self._host.commit(*arguments)
        except HostError:
            if rank == 0:
                raise
            # The host lets a rank that could not follow the others try again.
            self._host.commit(*arguments)

    def _common(self, counts: Sequence[int]) -> int:
        """The rows that every layer with a cache keeps."""
        lengths = {count for count, layer in zip(counts, self._caches[0].geometry) if layer}
        if len(lengths) != 1:
            raise KvhookError(
                f"layers would keep {sorted(lengths)} rows; InfiniLM gives all layers one length"
            )
        return lengths.pop()
