"""The adapter of one engine: its plugin host, its caches, the sequences that arms serve, and what each step does."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence

from . import native, settings
from .batch import Batch
from .compress import Compression, Prepares, SplitCommit
from .errors import KvhookError, Refused, UnknownArm
from .host import Host, version
from .lengths import shorten
from .model import RankModel, check_served, max_positions
from .operate import loads
from .requests import Requests
from .sequences import Step, Tracked
from .server import requested_arm
from .shim import Shim
from .views import CacheKind, RankCache

_logger = logging.getLogger("kvhook")

NO_ARM = "none"
"""The name that means no arm."""


class Adapter:
    """Compression for one `InferEngine`. Off, with the reason in `refused`, where it cannot be served.

    Its methods are called on the thread that drives the engine's steps; `arms`, `check_arm` and the host's figures on
    any.
    """

    def __init__(self, engine, options: Mapping, refusal: str | None):
        """Nothing is loaded before the engine has a cache.

        Args:
            engine: The `InferEngine`.
            options: The arguments that it was made with.
            refusal: Why whoever made the engine cannot be served.
        """
        # The engine holds the adapter, and what holds an engine keeps its whole cache.
        self._engine = weakref.ref(engine)
        weakref.finalize(engine, self.close)
        self.requests: Requests | None = None
        self.refused: str | None = None
        self.host: Host | None = None
        self.shim: Shim | None = None
        self.choice: settings.Choice | None = None
        self.kind: CacheKind | None = None
        self.live: dict[int, Tracked] = {}
        self.recorders: list = []
        self._options = dict(options)
        self._refusal = refusal
        self._caches: list[RankCache] = []
        self._arms: list[str] = []
        self._listing = threading.Lock()
        self._step: Step | None = None
        self._dropped: list[int] = []
        self._batch: Batch | None = None
        self._batches = itertools.count()
        self._broken: SplitCommit | None = None

    @property
    def engine(self):
        """The `InferEngine`."""
        return self._engine()

    @property
    def depth(self) -> str:
        """`shim` where the C++ shim was compiled into InfiniLM, else `python`."""
        return "shim" if self.shim else "python"

    @property
    def model_name(self) -> str:
        """The name of the model's folder."""
        path = str(self._options.get("model_path") or "")
        return os.path.basename(os.path.abspath(path))[:200] if path else "model"

    @property
    def entries_per_token(self) -> int:
        """Cache entries of one token: over layers, KV heads and ranks."""
        layers = [layer for cache in self._caches for layer in cache.geometry]
        return sum(layer.kv_heads for layer in layers if layer)

    @property
    def on(self) -> bool:
        """Whether arms can serve new sequences."""
        return self.host is not None

    @property
    def active(self) -> bool:
        """Whether the engine's steps concern the adapter: also when it was turned off with shorter caches about."""
        return (
            self.on
            or any(self._dropped)
            or (self.requests is not None and self.requests.memory.any_shorter)
        )

    def arms(self) -> list[str]:
        """Names of the arms."""
        return list(self._arms)

    def check_arm(self, name: str) -> None:
        """Raises `UnknownArm` for a name that no arm has; empty (by weight) and `none` are well."""
        if self.on and name and name != NO_ARM and name not in self._arms:
            known = ", ".join([*self._arms, NO_ARM])
            raise UnknownArm(f"kv_plugin: there is no arm {name!r}; the arms are: {known}")

    def control(self, command: str, source: int) -> None:
        """Changes arms by a command (JSON; docs/live.md). Any thread.

        Raises `Refused` where compression is off, or something would be loaded while compiled graphs are on;
        `HostError`. Then nothing changed.
        """
        host = self.host
        if host is None:
            raise Refused(self.refused or "compression is off: no plugin is configured")
        if self._options.get("enable_graph_compiling") and loads(command):
            raise Refused(
                "with --enable-graph plugins are loaded at start only: one that looks at decode would not be seen; "
                "weights and states may be changed"
            )
        host.control(command, source)
        # Of two changes at once the later list stays.
        with self._listing:
            self._arms = [arm["name"] for arm in host.arms()["arms"]]

    def check_request(self, request) -> None:
        """As `check_arm`, for the arm that an `InferenceRequest` names."""
        self.check_arm(requested_arm(request))

    def open(self, cache_config) -> None:
        """The engine has a new cache: makes the host, or goes on with the one that fits.

        Raises nothing, unless the operator asked for it (`strict`).
        """
        try:
            self.choice = settings.choose(
                self.engine.hf_config, str(self._options.get("model_path") or "")
            )
            if self.choice is not None:
                self._open(cache_config)
        except Exception as error:
            self.refuse(str(error), error)

    def refuse(self, reason: str, error: Exception | None = None) -> None:
        """Turns compression off for this engine and says why; raises if the operator asked for it (`strict`)."""
        self.close()
        self.refused = reason
        _logger.error("kvhook is off, the engine goes on uncompressed: %s", reason)
        if settings.strict():
            raise error if error is not None else Refused(reason)

    def close(self) -> None:
        """Ends every sequence and the host."""
        host, self.host = self.host, None
        self._caches = []
        if host is None:
            return
        self.live.clear()
        if self.shim is None or self.shim.is_idle():
            host.close()
        else:
            _logger.error(
                "a rank's thread still uses the host after a forward that raised: it is not destroyed"
            )

    def reset(self) -> None:
        """The engine's cache is about to go away."""
        for tracked in list(self.live.values()):
            self.free(tracked, native.KVH_FREE_RESET)
        self._caches = []

    def keep(self, tracked: Tracked) -> Tracked | None:
        """A sequence has begun; None where no arm took it."""
        if not tracked.uid:
            return None
        self.live[tracked.uid] = tracked
        return tracked

    def free(self, tracked: Tracked, reason: int) -> None:
        """Ends a sequence, once; `reason` is `KVH_FREE_*`."""
        if self.live.pop(tracked.uid, None) is not None and self.host is not None:
            self.host.free(tracked.uid, reason)

    def begin_step(self, output) -> None:
        """A scheduler's step is about to run."""
        if self.requests is not None:
            self._step = self.requests.step(output)

    def set_dropped(self, output) -> None:
        """Rows that each request of the step that comes lacks. Apart from all else, since these lengths must be right."""
        self._dropped = self.requests.dropped(output) if self.requests is not None else []

    def clear_dropped(self) -> None:
        """The step's forward is over."""
        self._dropped = []

    def begin_batch(self, shape: Sequence[int], new_tokens: int, arm: str) -> None:
        """`InferEngine.generate` begins with prompts `[batch, tokens]`."""
        self._broken = None
        self._batch = Batch(self, shape, new_tokens, arm, f"generate-{next(self._batches)}")

    def end_batch(self) -> None:
        """`InferEngine.generate` is over."""
        batch, self._batch = self._batch, None
        self.clear_dropped()
        if batch is not None:
            batch.end()

    def raise_broken(self) -> None:
        """Raises `SplitCommit` where the answers of the last batch are not right."""
        broken, self._broken = self._broken, None
        if broken is not None:
            raise broken

    def shortened(self, arguments: Mapping) -> Mapping:
        """The arguments of a forward, for caches that are shorter than their positions."""
        if not any(self._dropped):
            return arguments
        changed = shorten(arguments, self._dropped)
        if self._batch is not None:
            changed.update(self._batch.placed())
        return changed

    def begin_batch_step(self, input_ids) -> None:
        """A forward of `InferEngine.generate` is about to run."""
        if self._batch is not None:
            self._dropped = self._batch.dropped(input_ids)
            self._step = self._batch.step()

    def before_forward(self) -> None:
        """With the shim: each rank's thread is handed what it shows and prepares."""
        step = self._step
        if step is None or self.shim is None or not self.on:
            return
        due = step.due()
        prepares = Prepares(self._caches, step.memory, due) if due else None
        self.shim.begin(self.host, self._caches, step, prepares)

    def after_forward(self, came_back: bool) -> None:
        """The forward came back, or raised."""
        if self.shim is not None:
            self.shim.end()
        if self._step is not None:
            self._step.ran = came_back
        if self._batch is not None:
            self.end_step()

    def end_step(self) -> None:
        """The step is over: positions grow, and what is due is compressed."""
        step, self._step = self._step, None
        if step is None or not step.ran:
            return
        due = [(tracked, event) for tracked, event, _ in step.due()]
        for part in step.parts:
            if part.tracked is not None:
                part.tracked.position += part.tokens
        prepared = self.shim.take() if self.shim is not None and self.on else None
        if due and self.on:
            self._compress(step, due, prepared)

    def abandon_step(self, _error=None) -> None:
        """The adapter failed in a step: its sequences are not compressed any more. What they lack is still known."""
        step, self._step = self._step, None
        sequences = (
            [tracked for tracked, _ in step.live()]
            if step is not None
            else list(self.live.values())
        )
        for tracked in sequences:
            self.free(tracked, native.KVH_FREE_CANCELLED)

    def abandon(self, error: Exception) -> None:
        """The adapter failed outside a step: it is turned off."""
        self.close()
        self.refused = str(error)

    def say_figures(self) -> None:
        """Logs what each arm did, a line for each."""
        for name, arm in self.host.figures()["arms"].items():
            spent = sum(hook["total_ns"] for hook in arm["hooks"].values()) / 1e6
            reasons = ", ".join(
                f"{reason} {count}" for reason, count in sorted(arm["fallbacks"].items())
            )
            _logger.info(
                "arm %s: %d sequences, %d commits, %d of %d entries kept, %.1f MB given back, %.1f ms in hooks; "
                "kept as they were: %s",
                name,
                arm["sequences"],
                arm["commits"],
                arm["entries_after"],
                arm["entries_before"],
                arm["bytes_freed"] / 1e6,
                spent,
                reasons or "none",
            )

    def _compress(
        self, step: Step, due: Sequence[tuple[Tracked, int]], prepared: Prepares | None
    ) -> None:
        compression = Compression(self.host, self._caches)
        for group in [due] if step.together else [[one] for one in due]:
            for tracked, _ in group:
                tracked.mark = tracked.position
            try:
                if not step.together:
                    compression.one(step.memory, *group[0], prepared)
                elif len(group) == len(step.parts):
                    compression.together(step.memory, group, prepared)
            except SplitCommit as error:
                self._lost(error)
            except KvhookError as error:
                _logger.error(
                    "sequences %s stay as they are: %s", [one.uid for one, _ in group], error
                )

    def _lost(self, error: SplitCommit) -> None:
        """The rows of some sequences are not usable any more: their requests fail, the others go on."""
        _logger.critical("%s", error)
        for tracked in error.sequences:
            if tracked.request is not None:
                tracked.request.mark_failed()
            else:
                self._broken = error

    def _open(self, cache_config) -> None:
        self._check_options()
        paged = hasattr(cache_config, "block_size")
        block_size = int(cache_config.block_size()) if paged else 0
        kind = CacheKind(
            paged, block_size, paged and self._options.get("attention_backend") == "flash-attn"
        )
        # InfiniLM hands caches out once the ranks have done some work: without any (an engine that has just been made) it
        # waits for ever. Loading nothing is the least of it.
        self.engine.load_state_dict({}, strict=False)
        caches = [RankCache(tensors, kind) for tensors in self.engine.get_kv_cache()]
        if self.host is not None and kind == self.kind:
            self._caches = caches
            return
        self.close()
        self.kind, self._caches = kind, caches
        self.shim = Shim.find()
        ranks = len(self._caches)
        models = [
            RankModel(self.engine.hf_config, rank, ranks, cache)
            for rank, cache in enumerate(self._caches)
        ]
        host = Host("InfiniLM", models, self._offers(), [*settings.folders(), str(native.NATIVE)])
        try:
            self._configure(host)
        except Exception:
            host.close()
            raise
        self.host = host
        self.refused = None
        self._arms = list(host.figures()["arms"])
        self._say()

    def _configure(self, host: Host) -> None:
        from_model = self.choice.source == "model"
        source = native.KVHOOK_SOURCE_MODEL if from_model else native.KVHOOK_SOURCE_OPERATOR
        host.configure(self.choice.form, source)
        if self._options.get("enable_graph_compiling") and host.wants() & native.KVH_PHASE_DECODE:
            raise Refused(
                "a plugin wants before_attention in decode, which compiled graphs do not call; start without "
                "--enable-graph, or with a config that looks in prefill only"
            )

    def _check_options(self) -> None:
        options, config = self._options, self.engine.hf_config
        check_served(config)
        if self._refusal:
            raise Refused(self._refusal)
        if getattr(options.get("distributed_config"), "pp_size", 1) > 1:
            raise Refused(
                "pipeline parallelism: later stages do not hear of a request's end (--pp 1 is served)"
            )
        if options.get("use_mla"):
            raise Refused(
                "MLA: its cache holds latent vectors, which kvhook does not know (start without --use-mla)"
            )
        if options.get("kv_cache_dtype") not in (None, config.get("torch_dtype")):
            raise Refused(
                f"a cache of {options['kv_cache_dtype']}: kvhook serves caches of the model's own dtype"
            )

    def _offers(self):
        can = native.KVH_CAN_REWRITE | native.KVH_CAN_GROWN | native.KVH_CAN_STATE
        window = 0
        if self.shim is not None:
            can |= native.KVH_CAN_QUERIES | native.KVH_CAN_ALL_QUERIES
            window = max_positions(self.engine.hf_config) or (1 << 20)
        return native.sized(
            "KvhOffers", can=can, max_window_queries=window, block_size=self.kind.block_size
        )

    def _say(self) -> None:
        """The one line at start."""
        empty = sum(layer is None for layer in self._caches[0].geometry)
        queries = "before_attention" if self.shim else "no before_attention without the C++ shim"
        _logger.info(
            "%s is on: %s from %s; arms: %s; %d rank(s), %s cache, %d layers%s; hooks: on_prefill_done, on_grown, "
            "on_free, %s",
            version(),
            self.choice.form,
            self.choice.where,
            ", ".join(self._arms) or NO_ARM,
            len(self._caches),
            f"paged ({self.kind.block_size} tokens a block)" if self.kind.paged else "static",
            self._caches[0].layers,
            f" ({empty} without a cache are left alone)" if empty else "",
            queries,
        )
