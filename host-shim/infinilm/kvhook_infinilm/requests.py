"""The requests of InfiniLM's schedulers: their sequences, from the first step to the end."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence

from . import native
from .errors import KvhookError
from .memory import PagedMemory, StaticMemory
from .model import max_positions
from .segments import SegmentsError, image_bounds, image_segments
from .sequences import Part, Step, Tracked
from .server import requested_arm, requested_key

_logger = logging.getLogger("kvhook")


class Requests:
    """What a scheduler has given to the engine. Used by the thread that drives the engine's steps; `queued` by any."""

    def __init__(self, adapter, scheduler, publish, processor):
        """A scheduler drives the engine.

        Args:
            adapter: The engine's `Adapter`.
            scheduler: InfiniLM's `Scheduler` or `StaticScheduler`.
            publish: Its `commit_computed_tokens` as InfiniLM has it.
            processor: The model's processor.
        """
        self._adapter = adapter
        self._processor = type(processor).__name__
        paged = hasattr(scheduler, "cache_manager")
        self.memory = PagedMemory(scheduler, publish) if paged else StaticMemory(scheduler)
        # InfiniLM's block manager is given a request's hashes, not the request.
        self._by_hashes: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def queued(self, request) -> None:
        """A request waits for its first step."""
        self._by_hashes[id(request.block_hashes)] = request

    def prefix_limit(self, block_hashes, limit: int) -> int:
        """The longest prefix of a request that may come from the prefix cache."""
        request = self._by_hashes.get(id(block_hashes))
        if request is None or request.block_hashes is not block_hashes:
            return limit
        return self._limit(request, limit)

    def static_hit(self, request, hit: int) -> int:
        """As `prefix_limit`, for the static cache."""
        return self._limit(request, hit)

    def static_limit(self, request, limit: int) -> int:
        """The longest that a static scheduler's running request may become: what its shorter cache frees is usable."""
        tracked = self._of(request)
        if tracked is None or not tracked.dropped or request.is_finished():
            return limit
        longest = limit + tracked.dropped
        positions = max_positions(self._adapter.engine.hf_config)
        longest = max(limit, min(longest, positions) if positions else longest)
        # A request that is too long ends within InfiniLM's call, which goes on to the next one: that has the usual limit.
        return longest if request.get_total_length() <= longest else limit

    def publishes(self, request) -> bool:
        """Whether blocks of a request may be published."""
        tracked = self._of(request)
        return tracked is None or not tracked.compressed

    def dropped(self, output) -> list[int]:
        """Rows that each request of a scheduler's output lacks."""
        tracked = [self._of(request) for request in output.scheduled_requests]
        return [one.dropped if one is not None else 0 for one in tracked]

    def step(self, output) -> Step:
        """The forward of a scheduler's output."""
        parts = []
        for request in output.scheduled_requests:
            tracked = self._begin(request) if output.is_prefill else self._of(request)
            if output.is_prefill:
                # A static scheduler tells its hit with the step.
                computed = getattr(output, "prefix_hit_len", request.num_local_cached_tokens)
                tokens = request.get_prompt_length() - computed
            else:
                computed, tokens = request.get_total_length() - 1, 1
            if tracked is not None:
                tracked.position = computed
            parts.append(Part(tracked, tokens, self._is_live(tracked)))
        return Step(parts, output.is_prefill, self.memory)

    def sweep(self) -> None:
        """Ends the sequences whose requests have ended."""
        from infinilm.llm.request import FinishReason, RequestStatus

        for tracked in list(self._adapter.live.values()):
            request = tracked.request
            if request is None or not request.is_finished():
                continue
            finished = (
                request.status == RequestStatus.FINISHED
                or request.finish_reason == FinishReason.LENGTH
            )
            self._adapter.free(
                tracked, native.KVH_FREE_FINISHED if finished else native.KVH_FREE_CANCELLED
            )
        self.memory.forget_finished()

    def _limit(self, request, limit: int) -> int:
        tracked = self._begin(request) if self._adapter.on else None
        return limit if tracked is None else min(limit, tracked.wants.max_prefix_hit)

    def _begin(self, request) -> Tracked | None:
        """The sequence of a request, begun at the first call; None: no arm serves it."""
        if not hasattr(request, "_kvhook"):
            request._kvhook = None
            if self._adapter.on:
                request._kvhook = self._new(request)
        return request._kvhook

    def _new(self, request) -> Tracked | None:
        prompt = request.get_prompt_length()
        segments: Sequence[tuple[int, int]] = []
        try:
            bounds = image_bounds(request.processed_inputs)
            spans = request.get_mm_token_index_mappings()
            segments = image_segments(self._processor, spans, prompt, bounds)
        except SegmentsError as error:
            _logger.warning(
                "request %s: plugins are not told where its images are: %s",
                request.request_id,
                error,
            )
        try:
            key = requested_key(request) or request.request_id
            began = self._adapter.host.begin(key, requested_arm(request), prompt, segments)
        except KvhookError as error:
            _logger.error("request %s is not compressed: %s", request.request_id, error)
            return None
        return self._adapter.keep(Tracked(began, prompt, request))

    def _is_live(self, tracked: Tracked | None) -> bool:
        return tracked is not None and tracked.uid in self._adapter.live

    def _of(self, request) -> Tracked | None:
        return getattr(request, "_kvhook", None)
