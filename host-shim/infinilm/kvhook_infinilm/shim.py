"""Step descriptors for the C++ shim, where one was compiled into InfiniLM.

The shim lives in InfiniLM's own extension module. Before each forward it is handed, in process, what each rank's thread
shows to plugins before attention and what it prepares when its forward is done.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from . import native
from .compress import Prepares
from .host import Host, checked
from .native import array, ffi, sized
from .sequences import Step
from .views import RankCache

_logger = logging.getLogger("kvhook")

_MESSAGE_BYTES = 1024


class Shim:
    """The shim of this process."""

    def __init__(self, library):
        self._library = library
        self._current: _Descriptors | None = None
        self._ended: _Descriptors | None = None
        # Still read by a rank's thread, after a forward that raised.
        self._busy: list[_Descriptors] = []

    @staticmethod
    def find() -> Shim | None:
        """The shim in InfiniLM's extension module; None where it was not compiled in, or is another version's."""
        from infinilm.lib import _infinilm

        path = getattr(_infinilm, "__file__", None)
        if path is None:
            return None
        library = native.open_extension(path)
        try:
            found = library.kvhook_shim_version()
        except AttributeError:
            return None
        if found != native.shim_version():
            _logger.warning(
                "the C++ shim in %s has version %d, this package's is %d: it is not used; "
                "run `kvhook-infinilm insert` again and rebuild InfiniLM",
                path,
                found,
                native.shim_version(),
            )
            return None
        native.host_library()
        checked("kvhook_shim_attach", library.kvhook_shim_attach, str(native.HOST_LIBRARY).encode())
        return Shim(library)

    def begin(
        self, host: Host, caches: Sequence[RankCache], step: Step, prepares: Prepares | None
    ) -> None:
        """Hands out the descriptors of a forward, if anything is to be shown or prepared.

        Raises `HostError`.
        """
        self._reap()
        self._ended = None
        shown = _wanted(step) if host.wants() else []
        if not shown and prepares is None:
            return
        descriptors = _Descriptors(host, caches, step, shown, prepares)
        begin = self._library.kvhook_shim_begin
        checked("kvhook_shim_begin", begin, descriptors.ranks, len(caches))
        self._current = descriptors

    def end(self) -> None:
        """Takes the descriptors back."""
        descriptors, self._current = self._current, None
        if descriptors is None:
            return
        if self._library.kvhook_shim_end(descriptors.ranks, len(descriptors.ranks)):
            self._busy.append(descriptors)
            return
        self._ended = descriptors
        for rank in descriptors.ranks:
            for status in (rank.show_status, rank.prepare_status):
                if status != native.KVHOOK_OK:
                    message = ffi.unpack(rank.error.data, rank.error.length).decode(
                        errors="replace"
                    )
                    _logger.error("rank %d: status %d: %s", rank.rank, status, message)

    def take(self) -> Prepares | None:
        """What the ranks prepared during the forward that ended; None where they did not all, and nothing is open."""
        descriptors, self._ended = self._ended, None
        if descriptors is None or descriptors.prepares is None:
            return None
        if all(
            rank.prepared and rank.prepare_status == native.KVHOOK_OK for rank in descriptors.ranks
        ):
            return descriptors.prepares
        descriptors.prepares.drop(descriptors.host)
        return None

    def is_idle(self) -> bool:
        """Whether no rank's thread uses a host any more."""
        self._reap()
        return not self._busy

    def _reap(self) -> None:
        self._busy = [
            each
            for each in self._busy
            if self._library.kvhook_shim_end(each.ranks, len(each.ranks))
        ]


class _Descriptors:
    """`KvhShimRank[]` of one forward, with all that it leads to."""

    def __init__(self, host, caches, step, shown, prepares):
        self.host = host
        self.prepares = prepares
        self._kept = []
        self.ranks = ffi.new("KvhShimRank[]", len(caches))
        for index, cache in enumerate(caches):
            rank = self.ranks[index]
            rank.struct_size = ffi.sizeof("KvhShimRank")
            rank.key = ffi.cast("void *", cache.key)
            rank.host = host.handle
            rank.rank = index
            rank.layers = cache.layers
            rank.batch_tokens = sum(part.tokens for part in step.parts)
            if shown:
                rank.sequences = array(self._sequences(cache, step, shown))
            if prepares is not None:
                rank.prepares = array(prepares.ranks[index])
            buffer = ffi.new("char[]", _MESSAGE_BYTES)
            rank.error = sized("KvhText", data=buffer, capacity=_MESSAGE_BYTES)[0]
            self._kept.append(buffer)

    def _sequences(self, cache, step, shown):
        out = ffi.new("KvhShimSequence[]", len(shown))
        phase = native.KVH_PHASE_PREFILL if step.is_prefill else native.KVH_PHASE_DECODE
        for sequence, (tracked, first_token, tokens) in zip(out, shown):
            view = step.memory.view(cache, tracked, tracked.length)
            sequence.layers = view.raw
            one = sequence.step
            one.struct_size = ffi.sizeof("KvhStepSequence")
            one.uid = tracked.uid
            one.first_token = first_token
            one.tokens = tokens
            one.first_position = tracked.position
            one.prompt_length = tracked.prompt_length
            ends = step.is_prefill and tracked.position + tokens >= tracked.prompt_length
            one.flags = native.KVH_STEP_PROMPT_ENDS if ends else 0
            one.phase = phase
            self._kept.append(view)
        self._kept.append(out)
        return out


def _wanted(step: Step) -> list:
    """The sequences that are shown in this phase, each with its first token in the batch and its tokens."""
    phase = native.KVH_PHASE_PREFILL if step.is_prefill else native.KVH_PHASE_DECODE
    first, wanted = 0, []
    for part in step.parts:
        if part.is_live and part.tracked.wants.phases & phase:
            wanted.append((part.tracked, first, part.tokens))
        first += part.tokens
    return wanted
