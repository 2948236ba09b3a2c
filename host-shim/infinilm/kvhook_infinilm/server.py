"""What InfiniLM's HTTP server gains: figures, and the choice of an arm in a request's body.

| | |
| --- | --- |
| `GET /kvhook/metrics` | figures of all arms in Prometheus' text format |
| `GET /kvhook/figures` | the same as JSON |
| `"kv_key": "<text>"` in the body | requests with the same key, those of a conversation, have the same arm as long as names and weights stay |
| `"kv_plugin": "<arm>"` in the body | the arm that serves the request, `none` for no arm; an unknown one is answered with status 400 and the arms' names, before anything is queued, also for a stream |

While the engine starts the two routes answer with status 503. With compression off they say why, and `kv_plugin` is
ignored: requests go on uncompressed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace

from . import operate
from .errors import UnknownArm
from .guard import guard

_logger = logging.getLogger("kvhook")

FIELD = "kv_plugin"
"""The field of a request's body, and the attribute of `SamplingParams`."""

KEY_FIELD = "kv_key"
"""As `FIELD`, for the key by which the arm is chosen."""

_STARTING = "the engine is starting"


def requested_arm(request) -> str:
    """The arm that an `InferenceRequest` names, in its body or its sampling parameters; empty: by weight.

    Raises `UnknownArm` (a `ValueError`) for a name that is not text.
    """
    name = _field(request, FIELD)
    if name is None:
        return ""
    if not isinstance(name, str):
        raise UnknownArm(
            f"{FIELD}: it is {name!r} ({type(name).__name__}); expected an arm's name as text"
        )
    return name


def requested_key(request) -> str:
    """What an `InferenceRequest` gives as its conversation's key: requests with the same one have the same arm. Empty:
    nothing, or not text."""
    key = _field(request, KEY_FIELD)
    # JSON can write what UTF-8 cannot.
    return key.encode(errors="replace").decode() if isinstance(key, str) else ""


def _field(request, name: str):
    data = request.request_data
    value = data.get(name) if isinstance(data, Mapping) else None
    return value if value is not None else getattr(request.sampling_params, name, None)


def wrap_register_routes(original: Callable) -> Callable:
    """`InferenceServer._register_routes` that adds ours. Called once, before the server serves."""

    @functools.wraps(original)
    def _register_routes(self, app):
        original(self, app)
        with guard("InferenceServer._register_routes"):
            _add_routes(self, app)
            operate.add_routes(self, app)

    return _register_routes


def wrap_chat(original: Callable) -> Callable:
    """`InferenceServer._chat` or `._stream_chat` that looks at the arm first.

    It raises `UnknownArm` when it is called, not when it is awaited or read: a stream has no status yet, so the answer
    can still be 400.
    """

    @functools.wraps(original)
    def chat(self, request_id, data, http_request):
        unknown = None
        with guard(f"InferenceServer.{original.__name__}"):
            unknown = _unknown_arm(self.engine, data)
        if unknown is not None:
            _logger.warning("request %s is refused: %s", request_id, unknown)
            raise unknown
        return original(self, request_id, data, http_request)

    return chat


def _unknown_arm(engine, data) -> UnknownArm | None:
    from . import adapter_of

    adapter = adapter_of(engine)
    if adapter is None or not adapter.on:
        return None
    try:
        adapter.check_arm(requested_arm(SimpleNamespace(request_data=data, sampling_params=None)))
    except UnknownArm as error:
        return error
    return None


def _add_routes(server, app) -> None:
    from starlette.responses import JSONResponse, PlainTextResponse

    def prometheus(text: str, status: int = 200):
        return PlainTextResponse(text, status, media_type="text/plain; version=0.0.4")

    @app.get("/kvhook/metrics")
    async def metrics():
        host, why = _host(server.engine)
        if host is None:
            return prometheus(f"# kvhook is off: {why}\n", 503 if why == _STARTING else 200)
        return prometheus(host.prometheus())

    @app.get("/kvhook/figures")
    async def figures():
        host, why = _host(server.engine)
        if host is None:
            return JSONResponse({"off": why, "arms": {}}, 503 if why == _STARTING else 200)
        return JSONResponse(host.figures())

    async def refuse(_request, error):
        return JSONResponse({"error": str(error)}, 400)

    app.add_exception_handler(UnknownArm, refuse)


def _host(engine):
    """The plugin host of an `AsyncLLMEngine`, or None and why there is none, in one line."""
    from . import adapter_of

    if engine is None:
        return None, _STARTING
    adapter = adapter_of(engine)
    if adapter is None:
        return None, "kvhook is not attached to this engine"
    host = adapter.host
    if host is None:
        return None, " ".join((adapter.refused or "no plugin is configured").split())
    return host, ""
