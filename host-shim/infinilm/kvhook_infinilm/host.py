"""A safe wrapper of the host's C API: Python values in and out, errors raised as `HostError`."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import native
from .errors import HostError, KvhookError
from .native import array, ffi, sized, string, text

_logger = logging.getLogger("kvhook")

_MESSAGE_BYTES = 2048


@dataclass(frozen=True)
class Began:
    """What the host wants for a sequence that begins."""

    uid: int
    """Name of the sequence; 0: no arm took it, and nothing more is to be called."""
    max_prefix_hit: int
    """The longest cached prefix that may be used, in tokens."""
    phases: int
    """`KVH_PHASE_*` bits in which `before_attention` is wanted."""
    on_prefill_done: bool
    grown_every: int


@dataclass
class Candidate:
    """A sequence that may be compressed now."""

    uid: int
    event: int
    """`KVHOOK_EVENT_*`."""
    lengths: list[int]
    """Rows of each layer."""
    next_position: int
    shared_rows: int = 0
    published_rows: int = 0


@dataclass(frozen=True)
class Answer:
    """Whether a sequence is to be prepared."""

    decision: int
    """`KVHOOK_DECISION_*`."""
    reason: str
    counts: list[int]
    """The most rows that each layer keeps."""


@dataclass(frozen=True)
class Verdict:
    """The state of a ticket."""

    verdict: int
    """`KVHOOK_VERDICT_*`."""
    reason: str
    movement: int
    """`KVHOOK_MOVE_*`, when ready."""
    counts: list[int]
    """Rows that each layer keeps, when ready."""


class Host:
    """The plugin host of one engine. Every method may be called from any thread, those with a rank only while nobody
    writes the rank's rows."""

    def __init__(self, engine: str, models: Sequence, offers, folders: Sequence[str]):
        """Makes a host without arms.

        Args:
            engine: Name of the engine, for messages.
            models: `model.RankModel`, one for each rank.
            offers: A `KvhOffers *`.
            folders: Plugin folders, in order.

        Raises `HostError`, `PackageError`.
        """
        self._library = native.host_library()
        self._layers = models[0].layers
        self._callbacks = sized("KvhookCallbacks", log=_log, log_max_level=_log_max_level)
        name, _name = text(engine)
        raw_models = ffi.new("KvhModel[]", [model.raw[0] for model in models])
        kept = [text(folder) for folder in folders]
        raw_folders = ffi.new("KvhStr[]", [folder[0][0] for folder in kept])
        config = sized(
            "KvhookHostConfig",
            engine=name[0],
            callbacks=self._callbacks,
            models=array(raw_models),
            offers=offers,
            plugin_folders=array(raw_folders),
        )
        out = ffi.new("KvhookHost **")
        self._handle = None
        # Other threads than the one that drives the engine read figures and change arms. A change may take as long as a
        # plugin takes to load, and nobody waits for it but `close`.
        self._users = 0
        self._usage = threading.Condition()
        self._call("kvhook_host_create", config, out)
        self._handle = out[0]

    @property
    def handle(self):
        """The `KvhookHost *`."""
        return self._handle

    def close(self) -> None:
        """Frees every live sequence and destroys all instances, once other threads' calls are over. The host must not be
        used any more."""
        with self._usage:
            handle, self._handle = self._handle, None
            self._usage.wait_for(lambda: not self._users)
        if handle is not None:
            self._library.kvhook_host_destroy(handle)

    def configure(self, form: str, source: int) -> None:
        """Replaces all arms by those of a `kv_plugin` form (JSON); `source` is `KVHOOK_SOURCE_*`."""
        value, _data = text(form)
        self._call("kvhook_configure", self._handle, value[0], source)

    def control(self, command: str, source: int) -> None:
        """Changes arms by a command (JSON; docs/live.md), as a whole or not at all; `source` is `KVHOOK_SOURCE_*`.

        Thread: any. Plugins are loaded on it, while the engine goes on.
        """
        value, _data = text(command)
        with self._used() as handle:
            self._call("kvhook_control", handle, value[0], source)

    def arms(self) -> dict:
        """The arms as they are: `{"safe_mode": ..., "instances": ..., "arms": [{"name": ..., "state": ..., ...}]}`."""
        return json.loads(self._text("kvhook_arms_json"))

    def begin(
        self, key: str, arm: str, prompt_length: int, segments: Sequence[tuple[int, int]]
    ) -> Began:
        """Begins a sequence; `segments` are (start, length) of images."""
        raw = ffi.new(
            "KvhSegment[]",
            [
                {"kind": native.KVH_SEGMENT_IMAGE, "start": start, "length": length}
                for start, length in segments
            ],
        )
        key_text, _key = text(key)
        arm_text, _arm = text(arm)
        begin = sized(
            "KvhookBegin",
            key=key_text[0],
            arm=arm_text[0],
            prompt_length=prompt_length,
            segments=array(raw),
        )
        out = sized("KvhookSequence")
        self._call("kvhook_begin", self._handle, begin, out)
        return Began(
            out.uid,
            out.max_prefix_hit,
            out.before_attention_phases,
            bool(out.on_prefill_done),
            out.grown_every,
        )

    def free(self, uid: int, reason: int) -> None:
        """Ends a sequence; `reason` is `KVH_FREE_*`."""
        self._call("kvhook_free", self._handle, uid, reason, ffi.NULL)

    def ask(self, candidate: Candidate) -> Answer:
        """Whether there is something to compress, and how many rows it takes."""
        lengths = ffi.new("uint64_t[]", candidate.lengths)
        counts = ffi.new("uint64_t[]", self._layers)
        ask = sized(
            "KvhookAsk",
            uid=candidate.uid,
            event=candidate.event,
            lengths=array(lengths),
            next_position=candidate.next_position,
            shared_rows=candidate.shared_rows,
            published_rows=candidate.published_rows,
        )
        answer = sized("KvhookAnswer", counts=array(counts))
        self._call("kvhook_ask", self._handle, ask, answer)
        return Answer(answer.decision, self.reason_name(answer.reason), list(counts))

    def prepare(self, rank: int, prepares) -> None:
        """Prepares sequences on one rank; `prepares` is a `KvhookPrepareSequence[]`, whose tickets and reasons are
        filled."""
        self._call("kvhook_prepare", self._handle, rank, array(prepares), ffi.NULL)

    def verdict(self, ticket: int) -> Verdict:
        """The state of a ticket."""
        counts = ffi.new("uint64_t[]", self._layers)
        out = sized("KvhookVerdict", counts=array(counts))
        self._call("kvhook_verdict", self._handle, ticket, out)
        return Verdict(out.verdict, self.reason_name(out.reason), out.movement, list(counts))

    def drop(self, ticket: int, reason: int) -> None:
        """Drops a ticket; `reason` is counted."""
        self._call("kvhook_drop", self._handle, ticket, reason)

    def table_edit(self, ticket: int) -> list[list[int]]:
        """Ordinals of the blocks that each layer keeps."""
        edits = ffi.new("KvhookTableEdit[]", self._layers)
        for edit in edits:
            edit.struct_size = ffi.sizeof("KvhookTableEdit")
        self._call("kvhook_table_edit", self._handle, ticket, array(edits))
        return [ffi.unpack(edit.blocks, edit.count) if edit.count else [] for edit in edits]

    def commit(self, rank: int, ticket: int, layers, next_position: int, fresh=None) -> list[int]:
        """Carries out a ticket on one rank: rows of each layer afterwards.

        Args:
            layers: The rank's `KvhLayer[]` as it is now.
            next_position: Position of the next token.
            fresh: `KvhLayer[]` with room for what is kept; None: in place, or an edit of the table.
        """
        lengths = ffi.new("uint64_t[]", self._layers)
        commit = sized(
            "KvhookCommit",
            ticket=ticket,
            layers=array(layers),
            next_position=next_position,
            lengths=array(lengths),
        )
        if fresh is not None:
            commit.fresh = array(fresh)
        self._call("kvhook_commit", self._handle, rank, commit)
        return list(lengths)

    def freed(self, uid: int, bytes: int) -> None:
        """The engine got so many bytes back by a commit of the sequence."""
        self._call("kvhook_freed", self._handle, uid, bytes)

    def wants(self) -> int:
        """Phases in which any plugin wants `before_attention`: `KVH_PHASE_*` bits."""
        return self._library.kvhook_wants(self._handle, 0)

    def figures(self) -> dict:
        """Figures of all arms: `{"engine": ..., "arms": {name: {...}}}`."""
        return json.loads(self._text("kvhook_figures_json"))

    def prometheus(self) -> str:
        """Figures of all arms in Prometheus' text format."""
        return self._text("kvhook_figures_prometheus")

    def reason_name(self, reason: int) -> str:
        """A reason in one word: `no_gain`."""
        return string(self._library.kvhook_reason_name(reason))

    @contextlib.contextmanager
    def _used(self) -> Iterator:
        """The handle, which `close` leaves alone meanwhile."""
        with self._usage:
            if self._handle is None:
                raise KvhookError("the engine is closed")
            handle = self._handle
            self._users += 1
        try:
            yield handle
        finally:
            with self._usage:
                self._users -= 1
                self._usage.notify_all()

    def _call(self, function: str, *arguments) -> None:
        checked(function, getattr(self._library, function), *arguments)

    def _text(self, function: str) -> str:
        capacity = 1 << 14
        while True:
            buffer = ffi.new("char[]", capacity)
            out = sized("KvhText", data=buffer, capacity=capacity)
            try:
                with self._used() as handle:
                    self._call(function, handle, out)
                return ffi.unpack(buffer, out.length).decode()
            except HostError as error:
                if error.status != native.KVHOOK_ERR_BUFFER_TOO_SMALL:
                    raise
                # The figures may have grown by the next call.
                capacity = out.length + 1024


def checked(name: str, function, *arguments) -> None:
    """Calls a C function that takes an error buffer last and answers a status.

    Raises `HostError` with the buffer's text for any status but OK.
    """
    buffer = ffi.new("char[]", _MESSAGE_BYTES)
    error = sized("KvhText", data=buffer, capacity=_MESSAGE_BYTES)
    status = function(*arguments, error)
    if status != native.KVHOOK_OK:
        word = string(native.host_library().kvhook_status_name(status))
        message = ffi.unpack(buffer, error.length).decode(errors="replace")
        raise HostError(name, status, word, message)


def version() -> str:
    """Name and version of the host."""
    return string(native.host_library().kvhook_version())


native.declare()

_LEVELS = {
    native.KVH_LOG_ERROR: logging.ERROR,
    native.KVH_LOG_WARN: logging.WARNING,
    native.KVH_LOG_INFO: logging.INFO,
    native.KVH_LOG_DEBUG: logging.DEBUG,
    native.KVH_LOG_TRACE: logging.DEBUG - 5,
}


@ffi.callback("void(void *, const KvhLogRecord *)")
def _log(_context, record):
    _logger.log(
        _LEVELS.get(record.level, logging.INFO),
        "%s: %s",
        string(record.target),
        string(record.message),
    )


@ffi.callback("int32_t(void *)", error=0)
def _log_max_level(_context):
    level = _logger.getEffectiveLevel()
    return max((ours for ours, theirs in _LEVELS.items() if theirs >= level), default=0)
