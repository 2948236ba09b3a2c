"""Where the adapter attaches to InfiniLM: a few methods of its Python classes, wrapped.

What is attached to is checked by name and signature, not by version. A wrapper that fails is logged and lets InfiniLM's
own method go on (`guard`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from . import server, settings
from .adapter import Adapter
from .errors import AttachError
from .guard import guard
from .requests import Requests

_logger = logging.getLogger("kvhook")

FLOOR = "df1a1fd9"
"""The oldest commit of InfiniLM whose methods fit."""


@dataclass(frozen=True)
class Point:
    """A method that is wrapped, or only called."""

    module: str
    owner: str
    method: str
    parameters: tuple[str, ...]
    """Names that its signature must have."""
    wrap: Callable | None = None
    """Makes the wrapper of the original; None: the adapter calls it."""

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.method}"


_refusals = threading.local()
"""Why the `InferEngine` that is being made on this thread is not served."""


def _requests_of(scheduler) -> Requests | None:
    """The requests of a scheduler or a block manager, once an engine that is served drives it."""
    return getattr(scheduler, "_kvhook_requests", None)


def adapter_of(thing) -> Adapter | None:
    """The adapter of an `LLM`, `AsyncLLMEngine`, `LLMEngine`, `ModelRunner` or `InferEngine`; None before `attach`."""
    for name in ("engine", "engine", "model_runner", "model_engine"):
        thing = getattr(thing, name, thing)
    return getattr(thing, "_kvhook", None)


def _wrap_add_common_args(original):
    @functools.wraps(original)
    def _add_common_args(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        with guard("BaseConfig._add_common_args"):
            settings.add_flags(self.parser)
        return result

    return _add_common_args


def _wrap_base_config(original):
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        with guard("BaseConfig.__init__"):
            settings.set_flags(self.args)

    return __init__


def _wrap_model_runner(original):
    @functools.wraps(original)
    def __init__(self, config, *args, **kwargs):
        _refusals.reason = _refusal(config)
        try:
            original(self, config, *args, **kwargs)
        finally:
            _refusals.reason = None

    return __init__


def _wrap_infer_engine(original):
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        options = {name: value for name, value in bound.arguments.items() if name != "self"}
        with guard("InferEngine.__init__", strict=True):
            self._kvhook = Adapter(self, options, getattr(_refusals, "reason", None))
            if options["cache_config"] is not None:
                self._kvhook.open(options["cache_config"])

    return __init__


def _wrap_reset_cache(original):
    @functools.wraps(original)
    def reset_cache(self, cache_config):
        adapter = adapter_of(self)
        with guard("InferEngine.reset_cache", adapter and adapter.abandon):
            if adapter is not None:
                adapter.reset()
        result = original(self, cache_config)
        with guard("InferEngine.reset_cache", adapter and adapter.abandon, strict=True):
            if adapter is not None:
                adapter.open(cache_config)
        return result

    return reset_cache


def _wrap_forward(original):
    @functools.wraps(original)
    def forward(self, input_ids, **kwargs):
        adapter = adapter_of(self)
        if adapter is None or not adapter.active:
            return original(self, input_ids, **kwargs)
        with guard("InferEngine.forward", adapter.abandon_step):
            adapter.begin_batch_step(input_ids)
        # Not guarded: with wrong lengths attention would read rows of others.
        kwargs = adapter.shortened(kwargs)
        # What fails here is not shown to plugins, and prepared later.
        with guard("InferEngine.forward"):
            adapter.before_forward()
        came_back = False
        try:
            output = original(self, input_ids, **kwargs)
            came_back = True
        finally:
            with guard("InferEngine.forward", adapter.abandon_step):
                adapter.after_forward(came_back)
        return output

    return forward


def _wrap_generate(original):
    @functools.wraps(original)
    def generate(self, input_ids, generation_config, **kwargs):
        adapter = adapter_of(self)
        # With positions of its own the call tells neither prompt nor length apart.
        if adapter is None or not adapter.on or kwargs.get("prompt_position_ids") is not None:
            return original(self, input_ids, generation_config, **kwargs)
        arm = getattr(generation_config, "kv_plugin", None) or ""
        adapter.check_arm(arm)
        with guard("InferEngine.generate", adapter.abandon_step):
            adapter.begin_batch(input_ids.shape[:2], generation_config.max_new_tokens, arm)
        try:
            output = original(self, input_ids, generation_config, **kwargs)
        finally:
            with guard("InferEngine.generate", adapter.abandon_step):
                adapter.end_batch()
        adapter.raise_broken()
        return output

    return generate


def _wrap_execute_model(original):
    @functools.wraps(original)
    def execute_model(self, scheduler_output):
        adapter = adapter_of(self)
        if adapter is None or not adapter.active:
            return original(self, scheduler_output)
        adapter.set_dropped(scheduler_output)
        with guard("ModelRunner.execute_model", adapter.abandon_step):
            adapter.begin_step(scheduler_output)
        try:
            output = original(self, scheduler_output)
        finally:
            # They are this step's: another forward has its own.
            adapter.clear_dropped()
        with guard("ModelRunner.execute_model", adapter.abandon_step):
            adapter.end_step()
        return output

    return execute_model


def _wrap_llm_engine(original):
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        adapter = adapter_of(self)
        if adapter is None:
            return
        with guard("LLMEngine.__init__", adapter.abandon):
            publish = type(self.scheduler).commit_computed_tokens
            publish = getattr(publish, "__wrapped__", publish)
            requests = Requests(adapter, self.scheduler, publish, self.processor)
            adapter.requests = self.scheduler._kvhook_requests = requests
            if hasattr(self.scheduler, "cache_manager"):
                self.scheduler.cache_manager._kvhook_requests = requests

    return __init__


def _wrap_add_request(original):
    @functools.wraps(original)
    def add_request(self, request):
        adapter = adapter_of(self)
        if adapter is not None:
            # Raised to whoever asks, before anything is queued.
            adapter.check_request(request)
        with guard("LLMEngine.add_request"):
            if adapter is not None and adapter.on and adapter.requests is not None:
                adapter.requests.queued(request)
        return original(self, request)

    return add_request


def _wrap_step(original):
    @functools.wraps(original)
    def step(self):
        try:
            return original(self)
        finally:
            adapter = adapter_of(self)
            with guard("LLMEngine.step", adapter and adapter.abandon_step):
                if adapter is not None and adapter.active and adapter.requests is not None:
                    adapter.requests.sweep()

    return step


def _wrap_close(original):
    @functools.wraps(original)
    def close(self):
        adapter = adapter_of(self)
        with guard("LLMEngine.close"):
            if adapter is not None and adapter.on:
                for recorder in list(adapter.recorders):
                    recorder.close()
                adapter.say_figures()
                adapter.close()
        return original(self)

    return close


def _wrap_publish(original):
    @functools.wraps(original)
    def commit_computed_tokens(self, request, num_computed_tokens):
        requests = _requests_of(self)
        # Where this fails nothing is published: that is always right.
        publishes = False
        with guard(f"{type(self).__name__}.commit_computed_tokens"):
            publishes = requests is None or requests.publishes(request)
        return original(self, request, num_computed_tokens) if publishes else None

    return commit_computed_tokens


def _wrap_append_slot(original):
    @functools.wraps(original)
    def append_slot(self, block_table, num_tokens):
        requests = _requests_of(self)
        if requests is not None:
            # Not guarded: with a wrong slot a row of others would be written.
            num_tokens -= requests.memory.dropped(block_table)
        return original(self, block_table, num_tokens)

    return append_slot


def _wrap_computed_blocks(original):
    @functools.wraps(original)
    def get_computed_blocks(self, block_hashes, max_cache_hit_tokens):
        requests = _requests_of(self)
        limit = max_cache_hit_tokens
        with guard("BlockManager.get_computed_blocks"):
            if requests is not None:
                limit = requests.prefix_limit(block_hashes, limit)
        return original(self, block_hashes, limit)

    return get_computed_blocks


def _wrap_static_schedule(original):
    @functools.wraps(original)
    def schedule(self):
        requests = _requests_of(self)
        if requests is None:
            return original(self)
        limit = self.max_cache_len
        with guard("StaticScheduler.schedule"):
            self.max_cache_len = requests.static_limit(self.running_request, limit)
        try:
            output = original(self)
        finally:
            self.max_cache_len = limit
        with guard("StaticScheduler.schedule"):
            if output is not None and output.is_prefill:
                request = output.scheduled_requests[0]
                output.prefix_hit_len = requests.static_hit(request, output.prefix_hit_len)
        return output

    return schedule


POINTS = (
    Point(
        "infinilm.base_config", "BaseConfig", "_add_common_args", ("self",), _wrap_add_common_args
    ),
    Point("infinilm.base_config", "BaseConfig", "__init__", ("self",), _wrap_base_config),
    Point(
        "infinilm.infer_engine",
        "InferEngine",
        "__init__",
        (
            "self",
            "model_path",
            "distributed_config",
            "cache_config",
            "enable_graph_compiling",
            "attention_backend",
            "kv_cache_dtype",
            "use_mla",
        ),
        _wrap_infer_engine,
    ),
    Point(
        "infinilm.infer_engine",
        "InferEngine",
        "forward",
        (
            "self",
            "input_ids",
            "position_ids",
            "past_kv_lengths",
            "total_kv_lengths",
            "cu_seqlens",
            "block_tables",
            "slot_mapping",
        ),
        _wrap_forward,
    ),
    Point(
        "infinilm.infer_engine",
        "InferEngine",
        "generate",
        ("self", "input_ids", "generation_config"),
        _wrap_generate,
    ),
    Point(
        "infinilm.infer_engine",
        "InferEngine",
        "reset_cache",
        ("self", "cache_config"),
        _wrap_reset_cache,
    ),
    Point("infinilm.infer_engine", "InferEngine", "get_kv_cache", ("self",)),
    Point(
        "infinilm.infer_engine", "InferEngine", "load_state_dict", ("self", "state_dict", "strict")
    ),
    Point(
        "infinilm.llm.model_runner.model_runner",
        "ModelRunner",
        "__init__",
        ("self", "config"),
        _wrap_model_runner,
    ),
    Point(
        "infinilm.llm.model_runner.model_runner",
        "ModelRunner",
        "execute_model",
        ("self", "scheduler_output"),
        _wrap_execute_model,
    ),
    Point("infinilm.llm.llm", "LLMEngine", "__init__", ("self", "config"), _wrap_llm_engine),
    Point("infinilm.llm.llm", "LLMEngine", "add_request", ("self", "request"), _wrap_add_request),
    Point("infinilm.llm.llm", "LLMEngine", "step", ("self",), _wrap_step),
    Point("infinilm.llm.llm", "LLMEngine", "close", ("self",), _wrap_close),
    Point(
        "infinilm.llm.scheduler",
        "Scheduler",
        "commit_computed_tokens",
        ("self", "request", "num_computed_tokens"),
        _wrap_publish,
    ),
    Point(
        "infinilm.llm.static_scheduler",
        "StaticScheduler",
        "commit_computed_tokens",
        ("self", "request", "num_computed_tokens"),
        _wrap_publish,
    ),
    Point(
        "infinilm.llm.static_scheduler",
        "StaticScheduler",
        "schedule",
        ("self",),
        _wrap_static_schedule,
    ),
    Point(
        "infinilm.llm.cache_manager",
        "BlockManager",
        "append_slot",
        ("self", "block_table", "num_tokens"),
        _wrap_append_slot,
    ),
    Point(
        "infinilm.llm.cache_manager",
        "BlockManager",
        "get_computed_blocks",
        ("self", "block_hashes", "max_cache_hit_tokens"),
        _wrap_computed_blocks,
    ),
    Point(
        "infinilm.llm.cache_manager", "BlockManager", "allocate_slots", ("self", "num_new_tokens")
    ),
    Point("infinilm.llm.cache_manager", "BlockManager", "free_blocks", ("self", "block_table")),
    Point("infinilm.llm.request", "InferenceRequest", "get_total_length", ("self",)),
    Point("infinilm.llm.request", "InferenceRequest", "is_finished", ("self",)),
    Point("infinilm.llm.request", "InferenceRequest", "mark_failed", ("self",)),
    Point("infinilm.llm.request", "InferenceRequest", "get_mm_token_index_mappings", ("self",)),
)
"""All that the adapter needs of InfiniLM's Python."""

SERVER_POINTS = (
    Point(
        "infinilm.server.inference_server",
        "InferenceServer",
        "_register_routes",
        ("self", "app"),
        server.wrap_register_routes,
    ),
    Point(
        "infinilm.server.inference_server",
        "InferenceServer",
        "_chat",
        ("self", "request_id", "data", "http_request"),
        server.wrap_chat,
    ),
    Point(
        "infinilm.server.inference_server",
        "InferenceServer",
        "_stream_chat",
        ("self", "request_id", "data", "http_request"),
        server.wrap_chat,
    ),
)
"""What the HTTP server adds; its module needs packages that offline use does not."""


def attach(plugin=None, config=None, *, folders=(), strict=None) -> None:
    """Attaches to InfiniLM's classes, once for the process; later calls only change the settings.

    Engines that are made afterwards are served. Where InfiniLM is not as expected nothing is changed.

    Args:
        plugin: Name or path of a plugin, a whole `kv_plugin` form as JSON text, or `none`; None: flags, environment and
            the model's config.json decide.
        config: The plugin's config: text, or a dict.
        folders: Plugin folders, searched before the package's own.
        strict: Raise where an engine cannot be served, instead of going on uncompressed.

    Raises `AttachError` (strict), `SettingsError`, `ImportError` where InfiniLM is not installed.
    """
    settings.set_arguments(plugin, config, folders, strict)
    with _attach_lock:
        try:
            _attach(POINTS)
        except AttachError as error:
            _logger.error("kvhook is off, the engine goes on uncompressed: %s", error)
            if settings.strict():
                raise
            return
        # The server's module is imported only where somebody runs it.
        if importlib.util.find_spec("fastapi") is not None:
            try:
                _attach(SERVER_POINTS)
            except (AttachError, ImportError) as error:
                _logger.warning(
                    "requests cannot name an arm, and there are no figures over HTTP: %s", error
                )


_attach_lock = threading.Lock()


def _attach(points) -> None:
    owners = [_check(point) for point in points]
    for point, owner in zip(points, owners):
        original = owner.__dict__.get(point.method)
        if point.wrap is None or hasattr(original, "_kvhook"):
            continue
        wrapper = point.wrap(original)
        wrapper._kvhook = True
        setattr(owner, point.method, wrapper)


def _check(point: Point):
    """The class of a point.

    Raises `AttachError` for what is not there.
    """
    advice = f"kvhook needs InfiniLM from commit {FLOOR} on; update InfiniLM or kvhook"
    try:
        module = importlib.import_module(point.module)
    except ModuleNotFoundError as error:
        if error.name is not None and not point.module.startswith(error.name):
            raise
        if error.name == "infinilm":
            raise
        raise AttachError(f"InfiniLM has no module {error.name}; {advice}") from error
    owner = getattr(module, point.owner, None)
    method = owner.__dict__.get(point.method) if owner is not None else None
    if method is None:
        raise AttachError(f"InfiniLM's {point.module} has no {point.name}; {advice}")
    parameters = inspect.signature(method).parameters
    missing = [name for name in point.parameters if name not in parameters]
    if missing:
        raise AttachError(
            f"{point.module}: {point.name} has no parameter {', '.join(missing)}; {advice}"
        )
    return owner


def _refusal(config) -> str | None:
    """Why an `EngineConfig` is not served."""
    if getattr(config, "draft_model_path", None):
        return (
            "speculative decoding takes tokens back by their position (start without --draft-model)"
        )
    transfer = getattr(config, "kv_transfer_config", None)
    if transfer is not None and getattr(transfer, "kv_connector", None):
        return "a KV connector moves blocks by their number (start without --kv-transfer-config)"
    for name, flag in (
        ("async_token_handoff", "--async-token-handoff"),
        ("enable_chunked_prefill", "--chunked-prefill"),
    ):
        if getattr(config, name, None) not in (None, False, "off", "disabled"):
            return f"{flag} keeps steps in flight that kvhook does not see yet (switch it off)"
    return None
