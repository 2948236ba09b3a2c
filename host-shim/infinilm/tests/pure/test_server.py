"""The server's routes and the arm in a request's body, on FastAPI as InfiniLM's server uses it."""

from types import SimpleNamespace

import pytest

import kvhook_infinilm
from kvhook_infinilm.errors import UnknownArm
from kvhook_infinilm.server import requested_arm, wrap_chat, wrap_register_routes

FIGURES = {"engine": "InfiniLM", "arms": {"fast": {"commits": 3}}}
METRICS = '# TYPE kvhook_commits_total counter\nkvhook_commits_total{arm="fast"} 3\n'


class Host:
    """Figures that are written down."""

    def figures(self):
        return FIGURES

    def prometheus(self):
        return METRICS


class Adapter:
    """An adapter with the arms `fast` and `careful`, or off."""

    def __init__(self, refused=None, host=None):
        self.refused = refused
        self.host = host

    @property
    def on(self):
        return self.host is not None

    def check_arm(self, name):
        if name not in ("", "none", "fast", "careful"):
            raise UnknownArm(f"there is no arm {name!r}; the arms are: fast, careful, none")


class PlainServer:
    """What of InfiniLM's server matters here: a route that streams or not, and two methods behind it."""

    def __init__(self, engine):
        self.engine = engine
        self.queued = []

    def _register_routes(self, app):
        from fastapi import Request
        from fastapi.responses import JSONResponse, StreamingResponse

        @app.post("/chat/completions")
        async def chat_completions(request: Request):
            data = await request.json()
            if data.get("stream", False):
                stream = self._stream_chat("id", data, request)
                return StreamingResponse(stream, media_type="text/event-stream")
            return JSONResponse(content=await self._chat("id", data, request))

    async def _chat(self, request_id, data, http_request):
        self.queued.append(data)
        return {"content": "answer"}

    async def _stream_chat(self, request_id, data, http_request):
        self.queued.append(data)
        yield "data: answer\n\n"
        yield "data: [DONE]\n\n"


class Server(PlainServer):
    _register_routes = wrap_register_routes(PlainServer._register_routes)
    _chat = wrap_chat(PlainServer._chat)
    _stream_chat = wrap_chat(PlainServer._stream_chat)


@pytest.fixture(autouse=True)
def adapters_by_engine(monkeypatch):
    monkeypatch.setattr(kvhook_infinilm, "adapter_of", lambda engine: engine.adapter)


def served(adapter, engine=True):
    """A server around an adapter, and a client of it."""
    fastapi = pytest.importorskip("fastapi")
    try:
        from fastapi.testclient import TestClient
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"FastAPI's test client cannot be used: {error}")

    server = Server(SimpleNamespace(adapter=adapter) if engine else None)
    app = fastapi.FastAPI()
    server._register_routes(app)
    return server, TestClient(app)


def post(client, stream=False, **body):
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, **body}
    return client.post("/chat/completions", json=body)


def test_metrics_are_prometheus_text_and_figures_json():
    _, client = served(Adapter(host=Host()))
    metrics = client.get("/kvhook/metrics")
    assert (metrics.status_code, metrics.text) == (200, METRICS)
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    figures = client.get("/kvhook/figures")
    assert (figures.status_code, figures.json()) == (200, FIGURES)


def test_while_the_engine_starts():
    _, client = served(None, engine=False)
    metrics = client.get("/kvhook/metrics")
    assert (metrics.status_code, metrics.text) == (503, "# kvhook is off: the engine is starting\n")
    figures = client.get("/kvhook/figures")
    assert (figures.status_code, figures.json()["off"]) == (503, "the engine is starting")


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (None, "kvhook is not attached to this engine"),
        (Adapter(), "no plugin is configured"),
        (Adapter(refused="MLA is\nnot served"), "MLA is not served"),
    ],
)
def test_with_compression_off_they_say_why(adapter, why):
    server, client = served(adapter)
    metrics = client.get("/kvhook/metrics")
    # One comment line: still what a scraper can read.
    assert (metrics.status_code, metrics.text) == (200, f"# kvhook is off: {why}\n")
    assert client.get("/kvhook/figures").json() == {"off": why, "arms": {}}
    assert post(client, kv_plugin="anything").status_code == 200
    assert len(server.queued) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body", [{}, {"kv_plugin": None}, {"kv_plugin": "fast"}, {"kv_plugin": "none"}]
)
def test_an_arm_that_is_there(stream, body):
    server, client = served(Adapter(host=Host()))
    answer = post(client, stream, **body)
    assert answer.status_code == 200
    assert answer.text == ("data: answer\n\ndata: [DONE]\n\n" if stream else '{"content":"answer"}')
    assert len(server.queued) == 1
    assert server.queued[0].get("kv_plugin") == body.get("kv_plugin")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["slow", "/tmp/libevil.so", "FAST"])
def test_an_unknown_arm_is_400_with_the_arms_and_not_queued(stream, name):
    server, client = served(Adapter(host=Host()))
    answer = post(client, stream, kv_plugin=name)
    assert answer.status_code == 400
    error = f"there is no arm {name!r}; the arms are: fast, careful, none"
    assert answer.json() == {"error": error}
    assert server.queued == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value", [5, True, ["fast"], {"plugin": "fast"}])
def test_an_arm_that_is_no_text_is_400(stream, value):
    server, client = served(Adapter(host=Host()))
    answer = post(client, stream, kv_plugin=value)
    assert answer.status_code == 400
    assert "expected an arm's name as text" in answer.json()["error"]
    assert server.queued == []


def test_a_failure_of_ours_lets_requests_through(monkeypatch):
    def fail(_engine):
        raise RuntimeError("provoked")

    server, client = served(Adapter(host=Host()))
    monkeypatch.setattr(kvhook_infinilm, "adapter_of", fail)
    assert post(client, kv_plugin="slow").status_code == 200
    assert len(server.queued) == 1


def test_an_app_that_takes_no_routes_still_gets_the_servers_own():
    done = []
    register = wrap_register_routes(lambda self, app: done.append(app))
    register(SimpleNamespace(engine=None), "no app at all")
    assert done == ["no app at all"]


def test_the_check_comes_when_called_not_when_read():
    engine = SimpleNamespace(adapter=Adapter(host=Host()))
    with pytest.raises(UnknownArm):
        Server(engine)._stream_chat("id", {"kv_plugin": "slow"}, None)
    with pytest.raises(UnknownArm):
        Server(engine)._chat("id", {"kv_plugin": "slow"}, None)


def test_before_the_engine_is_there_nothing_is_checked():
    Server(None)._stream_chat("id", {"kv_plugin": "slow"}, None)


def request(data=None, **parameters):
    return SimpleNamespace(request_data=data, sampling_params=SimpleNamespace(**parameters))


def test_requested_arm():
    assert requested_arm(request()) == ""
    assert requested_arm(SimpleNamespace(request_data=None, sampling_params=None)) == ""
    assert requested_arm(request({"kv_plugin": "fast"})) == "fast"
    assert requested_arm(request({"kv_plugin": "none"})) == "none"
    assert requested_arm(request(kv_plugin="fast")) == "fast"
    assert requested_arm(request({"messages": []}, kv_plugin="fast")) == "fast"
    assert requested_arm(request({"kv_plugin": None}, kv_plugin="fast")) == "fast"
    assert requested_arm(request({"kv_plugin": "fast"}, kv_plugin="careful")) == "fast"


@pytest.mark.parametrize("data", [{"kv_plugin": 5}, {"kv_plugin": ["fast"]}])
def test_requested_arm_of_another_type(data):
    with pytest.raises(ValueError, match="expected an arm's name as text"):
        requested_arm(request(data))
