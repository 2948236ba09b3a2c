"""Control of the arms over HTTP, beside InfiniLM's own routes. Off unless the operator's environment switches it on.

| | |
| --- | --- |
| `KVHOOK_CONTROL=1` | the routes are there |
| `KVHOOK_CONTROL_TOKEN` | requests carry it as `Authorization: Bearer TOKEN`, from any address; without one only programs on this machine are served |
| `GET /kvhook/arms` | the arms as JSON |
| `POST /kvhook/control` | a command (docs/live.md), at most 64 KiB of `application/json`; plugins by bare name only. Answers the arms |
| `GET /kvhook/record` | the arms' figures as a line of a record (docs/report.md) |
| `POST /kvhook/probe` | `{"prompts": [TEXT, ..] or {NAME: TEXT, ..}, "max_new_tokens": 64, "arms": [NAME, ..]}`, the last two may be missing; answers lines of a record when all is done. One at a time |

| status | means |
| --- | --- |
| 400 | the command is refused; nothing changed; the message says why |
| 401, 403 | no token, or another one; not from a program on this machine |
| 409 | compression is off, compiled graphs are on, an arm does not compress, or another probe is under way |
| 413, 415 | the body is too long, or not `application/json` |
| 503 | the engine is starting |
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import re
import threading
from collections.abc import Mapping

from . import native
from .errors import HostError, KvhookError, Refused
from .probes import each
from .records import dumped, figures_line

MAX_BYTES = 1 << 16
"""The longest command."""

MAX_PROMPTS, MAX_NEW_TOKENS = 64, 4096
"""The most of a probe."""

_OUR_NAMES = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.ASCII)
"""What a program on this machine calls it: another name may be a web page's, whose owner has it point here."""

_SURROGATE = re.compile("[\ud800-\udfff]")

_OF_OTHERS = (
    # A web page's.
    "origin",
    # A proxy's.
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-real-ip",
)


class Denied(Exception):
    """A request is not served; `status` and the text go back."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def is_on() -> bool:
    """Whether the operator's environment switches the routes on."""
    return os.environ.get("KVHOOK_CONTROL", "") not in ("", "0")


def check_caller(client: str | None, headers: Mapping[str, str], token: str) -> None:
    """Who may use the routes.

    Without a token: programs on this machine. A proxy's requests and a web page's are none of these.

    Args:
        client: The address that the connection comes from.
        headers: Of the request, with names in lower case.
        token: `KVHOOK_CONTROL_TOKEN`.

    Raises `Denied`.
    """
    if token:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Headers are read as Latin-1.
        given = given.strip().encode("latin-1", "replace")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, token.encode()):
            raise Denied(
                401, "Authorization: Bearer with the token of KVHOOK_CONTROL_TOKEN is expected"
            )
        return
    here = _is_this_machine(client) and _OUR_NAMES.fullmatch(headers.get("host", "").lower())
    if not here or any(key in headers for key in _OF_OTHERS):
        raise Denied(
            403, "only programs on this machine are served; set KVHOOK_CONTROL_TOKEN for others"
        )


def _is_this_machine(client: str | None) -> bool:
    try:
        address = ipaddress.ip_address(client or "")
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def add_routes(server, app) -> None:
    """Adds the routes to InfiniLM's server, where they are on."""
    if not is_on():
        return
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse, PlainTextResponse

    from . import adapter_of

    def lines(text: str):
        return PlainTextResponse(text, media_type="application/x-ndjson")

    def adapter_for(request):
        token = os.environ.get("KVHOOK_CONTROL_TOKEN", "")
        check_caller(request.client.host if request.client else None, request.headers, token)
        if server.engine is None:
            raise Denied(503, "the engine is starting")
        adapter = adapter_of(server.engine)
        if adapter is None or not adapter.on:
            raise Denied(409, getattr(adapter, "refused", None) or "compression is off")
        return adapter

    def answered(handler):
        async def route(request):
            try:
                return await handler(request)
            except Denied as error:
                return JSONResponse({"error": str(error)}, error.status)
            except Refused as error:
                return JSONResponse({"error": str(error)}, 409)
            except (HostError, KvhookError) as error:
                return JSONResponse({"error": str(error)}, 400)

        return route

    async def arms(request):
        return JSONResponse(adapter_for(request).host.arms())

    async def control(request):
        adapter = adapter_for(request)
        command = await body(request)
        await run_in_threadpool(adapter.control, command, native.KVHOOK_SOURCE_MODEL)
        return JSONResponse(adapter.host.arms())

    async def record(request):
        return lines(dumped(figures_line(adapter_for(request))))

    probing = threading.Lock()

    async def probe(request):
        adapter_for(request)
        asked = probe_of(await body(request))

        def run() -> str:
            if not probing.acquire(blocking=False):
                raise Denied(409, "another probe is under way")
            try:
                return "".join(map(dumped, each(server.engine, **asked)))
            finally:
                probing.release()

        return lines(await run_in_threadpool(run))

    app.add_route("/kvhook/arms", answered(arms), methods=["GET"])
    app.add_route("/kvhook/control", answered(control), methods=["POST"])
    app.add_route("/kvhook/record", answered(record), methods=["GET"])
    app.add_route("/kvhook/probe", answered(probe), methods=["POST"])


async def body(request) -> str:
    """A command's text. No more than `MAX_BYTES` and one chunk are read.

    Raises `Denied`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Denied(415, f"the body is {kind or 'of no type'}; application/json is expected")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BYTES:
            raise Denied(413, f"the body is too long; at most {MAX_BYTES} bytes are taken")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Denied(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None


def probe_of(text: str) -> dict:
    """The arguments of `probes.each`, from a body.

    Raises `Denied`.
    """

    def expect(is_right: bool, what: str) -> None:
        if not is_right:
            raise Denied(400, f"a probe has {what}")

    try:
        asked = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Denied(400, f"the body is not JSON: {error}") from None
    expect(isinstance(asked, dict), "`prompts`, and maybe `max_new_tokens` and `arms`")
    unknown = asked.keys() - {"prompts", "max_new_tokens", "arms"}
    expect(not unknown, f"no key {', '.join(sorted(unknown))[:80]}")
    prompts, tokens = asked.get("prompts"), asked.get("max_new_tokens", 64)
    texts = [*prompts, *prompts.values()] if isinstance(prompts, dict) else prompts
    expect(
        isinstance(texts, list) and 0 < len(prompts) <= MAX_PROMPTS and all(map(_is_text, texts)),
        f"`prompts`: 1 to {MAX_PROMPTS} texts, in a list or by name",
    )
    expect(
        type(tokens) is int and 0 < tokens <= MAX_NEW_TOKENS,
        f"`max_new_tokens`: 1 to {MAX_NEW_TOKENS}",
    )
    arms = asked.get("arms")
    expect(
        arms is None or (isinstance(arms, list) and all(map(_is_text, arms)) and arms),
        "`arms`: a list of names",
    )
    return {"prompts": prompts, "max_new_tokens": tokens, "arms": arms}


def _is_text(value) -> bool:
    """JSON can write what UTF-8 cannot."""
    return isinstance(value, str) and value != "" and not _SURROGATE.search(value)


def loads(command: str) -> bool:
    """Whether a command loads plugins. One that cannot be read is the host's to refuse."""
    try:
        changes = json.loads(command)["changes"]
        return any(key in ("add", "replace", "set") for change in changes for key in change)
    except RecursionError:
        return True
    except (ValueError, TypeError, KeyError):
        return False
