"""Control over HTTP: who is served, what is taken, what comes back."""

from types import SimpleNamespace

import pytest

import kvhook_infinilm
from kvhook_infinilm import native
from kvhook_infinilm.errors import HostError, Refused
from kvhook_infinilm.operate import MAX_BYTES, Denied, add_routes, check_caller, loads

ARMS = {"safe_mode": False, "arms": [{"name": "fast", "state": "serving"}]}
COMMAND = '{"changes": [{"state": {"fast": "draining"}}]}'


class Adapter:
    """Writes commands down, or refuses them."""

    on, refused = True, None

    def __init__(self, error=None):
        self.error = error
        self.taken = []
        self.host = SimpleNamespace(arms=lambda: ARMS)

    def control(self, command, source):
        if self.error is not None:
            raise self.error
        self.taken.append((command, source))


@pytest.fixture
def client(monkeypatch):
    fastapi = pytest.importorskip("fastapi")
    try:
        from fastapi.testclient import TestClient
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"FastAPI's test client cannot be used: {error}")

    def made(adapter, on="1", token="", address="127.0.0.1", url="http://localhost:8000"):
        monkeypatch.setattr(kvhook_infinilm, "adapter_of", lambda engine: engine.adapter)
        monkeypatch.setenv("KVHOOK_CONTROL", on)
        monkeypatch.setenv("KVHOOK_CONTROL_TOKEN", token)
        app = fastapi.FastAPI()
        engine = SimpleNamespace(adapter=adapter) if adapter is not None else None
        add_routes(SimpleNamespace(engine=engine), app)
        return TestClient(app, base_url=url, client=(address, 50000))

    return made


def post(client, data=COMMAND, kind="application/json", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/kvhook/control", content=data, headers={"content-type": kind, **headers})


@pytest.mark.parametrize("on", ["", "0"])
def test_off_by_default(client, on):
    adapter = Adapter()
    served = client(adapter, on=on)
    assert post(served).status_code == 404
    assert served.get("/kvhook/arms").status_code == 404
    assert adapter.taken == []


def test_a_command_from_this_machine(client):
    adapter = Adapter()
    served = client(adapter)
    answer = post(served)
    assert (answer.status_code, answer.json()) == (200, ARMS)
    # Like a model's config: plugins by bare name only.
    assert adapter.taken == [(COMMAND, native.KVHOOK_SOURCE_MODEL)]
    assert served.get("/kvhook/arms").json() == ARMS


@pytest.mark.parametrize(
    "changed",
    [{"address": "10.0.0.7"}, {"url": "http://evil.example"}, {"url": "http://127.0.0.1.evil"}],
)
def test_others_are_not_served_without_a_token(client, changed):
    adapter = Adapter()
    served = client(adapter, **changed)
    assert post(served).status_code == 403
    assert served.get("/kvhook/arms").status_code == 403
    assert adapter.taken == []


def test_nor_is_what_a_proxy_forwards(client):
    assert post(client(Adapter()), x_forwarded_for="10.0.0.7").status_code == 403


@pytest.mark.parametrize(
    "given", [{}, {"authorization": "Bearer other"}, {"authorization": "secret"}]
)
def test_with_a_token_it_must_be_there(client, given):
    adapter = Adapter()
    assert post(client(adapter, token="secret"), **given).status_code == 401
    assert adapter.taken == []


def test_with_a_token_any_address_is_served(client):
    served = client(Adapter(), token="secret", address="10.0.0.7", url="http://server")
    assert post(served, authorization="Bearer secret").status_code == 200


@pytest.mark.parametrize(
    ("data", "kind", "status"),
    [
        (b"x" * (MAX_BYTES + 1), "application/json", 413),
        (b"\xff\xfe", "application/json", 400),
        (COMMAND, "text/plain", 415),
        (COMMAND, "application/x-www-form-urlencoded", 415),
        (COMMAND, "application/json; charset=utf-8", 200),
    ],
)
def test_bodies(client, data, kind, status):
    adapter = Adapter()
    assert post(client(adapter), data, kind).status_code == status
    assert len(adapter.taken) == (status == 200)


@pytest.mark.parametrize(
    ("error", "status"),
    [(HostError("kvhook_control", 150, "spec", "it is not JSON"), 400), (Refused("off"), 409)],
)
def test_refusals(client, error, status):
    answer = post(client(Adapter(error)))
    assert (answer.status_code, answer.json()) == (status, {"error": str(error)})


def test_while_the_engine_starts_and_with_compression_off(client):
    assert post(client(None)).status_code == 503
    off = Adapter()
    off.on, off.refused = False, "MLA is not served"
    assert post(client(off)).json() == {"error": "MLA is not served"}


def test_no_address_is_not_this_machine():
    with pytest.raises(Denied):
        check_caller(None, {"host": "localhost"}, "")
    check_caller("::1", {"host": "[::1]:8000"}, "")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ('{"changes": [{"state": {}}, {"add": {}}]}', True),
        (COMMAND, False),
        ("{", False),
        ("[]", False),
        ('{"changes": 3}', False),
        ('{"changes": [3]}', False),
    ],
)
def test_what_loads(command, expected):
    assert loads(command) == expected
