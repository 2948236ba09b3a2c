"""Control over HTTP: who is served, what is taken, what comes back."""

import concurrent.futures as futures
import contextlib
import json
import shutil
import threading
from types import SimpleNamespace

import pytest

import kvhook_infinilm
from kvhook_infinilm import native
from kvhook_infinilm.errors import HostError, KvhookError, Refused
from kvhook_infinilm.host import Host
from kvhook_infinilm.operate import MAX_BYTES, Denied, add_routes, check_caller, loads
from kvhook_infinilm.views import CacheKind

from pure.numpy_cache import cache, models, offers

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
        ("[" * 60000, True),
    ],
)
def test_what_loads(command, expected):
    assert loads(command) == expected


# What comes over the network to a real host.


@pytest.fixture
def served(client, tmp_path):
    """A client of a real host with the arm `a`, and a folder of plugins."""
    outside = tmp_path / "outside" / "libkvhook_elsewhere.so"
    outside.parent.mkdir()
    shutil.copy(native.NATIVE / "libkvhook_truncate.so", outside)
    folder = tmp_path / "plugins"
    folder.mkdir()
    shutil.copy(outside, folder / "libkvhook_mine.so")
    (folder / "libkvhook_link.so").symlink_to(outside)
    caches = cache(CacheKind(False), outer=1, tokens=64)
    host = Host("test", models(caches), offers(0, 0), [str(folder), str(native.NATIVE)])
    arm = {"name": "a", "plugin": "truncate", "config": "keep=0.5"}
    host.configure(json.dumps({"arms": [arm]}), native.KVHOOK_SOURCE_OPERATOR)
    adapter = SimpleNamespace(on=True, refused=None, host=host, control=host.control)
    yield client(adapter), folder
    host.close()


def changed(served, *changes, **headers):
    return post(served, json.dumps({"changes": list(changes)}), **headers)


def add(name, plugin):
    return {"add": {"name": name, "plugin": plugin}}


def test_a_plugin_by_its_name(served):
    served, _ = served
    answer = changed(served, add("b", "mine"), {"weights": {"a": 2}})
    assert answer.status_code == 200, answer.text
    assert [arm["name"] for arm in answer.json()["arms"]] == ["a", "b"]
    assert answer.json()["instances"] == 2


@pytest.mark.parametrize(
    "plugin",
    [
        "{folder}/libkvhook_mine.so",
        "./libkvhook_mine.so",
        "../outside/libkvhook_elsewhere.so",
        "../plugins/mine",
        "..",
        "mine/../mine",
        "..\\mine",
        "%2e%2e/mine",
        "link",
        "libkvhook_link.so",
        "mine\x00",
        "mine\n",
        "",
        "m" * 5000,
        "missing",
    ],
)
def test_nothing_but_the_name_of_a_file_in_the_folders(served, plugin):
    served, folder = served
    before = served.get("/kvhook/arms").json()
    answer = changed(served, add("b", plugin.format(folder=folder)))
    assert answer.status_code == 400 and answer.json()["error"]
    assert served.get("/kvhook/arms").json() == before


@pytest.mark.parametrize(
    "command",
    [
        "",
        "null",
        "[]",
        "{",
        '{"changes": 3}',
        '{"changes": [3]}',
        '{"changes": [{}]}',
        '{"changes": [{"weights": {"a": -1}}]}',
        '{"changes": [{"weights": {"a": 1e999}}]}',
        '{"changes": [{"weights": {"nobody": 1}}]}',
        '{"changes": [{"state": {"a": "asleep"}}]}',
        '{"changes": [{"add": {"name": "a", "plugin": "mine"}}]}',
        '{"changes": [{"add": {"name": "none", "plugin": "mine"}}]}',
        '{"changes": [{"replace": {"name": "a", "config": "keep=9"}}]}',
        '{"changes": [{"weights": {"a": 5}}, {"replace": {"name": "a", "config": "keep=9"}}]}',
        '{"changes": [{"weights": {"a": 5}}, {"remove": "nobody"}]}',
        '{"changes": [{"shutdown": true}]}',
        '{"changes": [], "source": "operator"}',
        '\ufeff{"changes": []}',
        '{"changes": [{"remove": "\\ud800"}]}',
        "[" * 60000,
        '{"changes": [' + '{"weights": {"a": 1}},' * 2000 + "0]}",
    ],
)
def test_what_is_malformed_changes_nothing(served, command):
    served, _ = served
    before = served.get("/kvhook/arms").json()
    assert post(served, command).status_code == 400
    assert served.get("/kvhook/arms").json() == before


def test_a_body_that_never_says_its_length_is_cut_off(served):
    served, _ = served
    sent = []

    def chunks():
        for _ in range(1000):
            sent.append(1)
            yield b" " * 4096

    assert post(served, chunks()).status_code == 413


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_other_methods_are_refused(served, method):
    served, _ = served
    answer = served.request(method, "/kvhook/control", headers={"content-type": "application/json"})
    assert answer.status_code == 405
    # A browser that asks whether a page may post is not told so.
    assert not any(name.startswith("access-control") for name in answer.headers)
    if method not in ("GET", "HEAD"):
        assert served.request(method, "/kvhook/arms").status_code == 405


@pytest.mark.parametrize(
    "headers",
    [
        # A page that the operator's browser shows, whatever type it says it sends.
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:3000"},
        {"origin": "null"},
        # Its owner has the name point to this machine.
        {"host": "evil.example"},
        {"host": "evil.example:8000"},
        {"host": "localhost.evil.example"},
        {"host": "127.0.0.1.nip.example"},
        {"host": "localhost@evil.example"},
        {"host": "[::1].evil.example"},
        {"host": ""},
        {"host": "0.0.0.0"},
        {"x-forwarded-for": "127.0.0.1"},
        {"x-forwarded-host": "localhost"},
        {"forwarded": "for=127.0.0.1"},
        {"via": "1.1 proxy"},
        {"x-real-ip": "127.0.0.1"},
    ],
)
def test_a_web_page_or_a_proxy_is_not_a_program_on_this_machine(served, headers):
    served, _ = served
    before = served.get("/kvhook/arms").json()
    answer = served.post(
        "/kvhook/control",
        content='{"changes": [{"weights": {"a": 7}}]}',
        headers={"content-type": "application/json", **headers},
    )
    assert answer.status_code == 403, answer.text
    assert served.get("/kvhook/arms", headers=headers).status_code == 403
    assert served.get("/kvhook/arms").json() == before


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data", "application/jsonp"])
def test_a_type_that_pages_may_send_unasked_is_refused(served, kind):
    served, _ = served
    assert post(served, COMMAND, kind).status_code == 415


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:65535", "[::1]:8000"])
def test_this_machines_names(served, host):
    served, _ = served
    assert served.get("/kvhook/arms", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("address", "is_here"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.7", False),
        ("10.0.0.7", False),
        ("localhost", False),
        ("testclient", False),
        ("", False),
    ],
)
def test_addresses(address, is_here):
    with contextlib.nullcontext() if is_here else pytest.raises(Denied):
        check_caller(address, {"host": "localhost"}, "")


@pytest.mark.parametrize(
    ("given", "is_right"),
    [
        ("Bearer s3cret", True),
        ("bearer s3cret", True),
        ("Bearer  s3cret ", True),
        ("", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("Bearer s3cre", False),
        ("Bearer s3cret2", False),
        ("Bearer S3CRET", False),
        ("Basic s3cret", False),
        ("s3cret", False),
        ("Bearer s3cret, Bearer x", False),
        ("Bearer \xe9\u20ac", False),
    ],
)
def test_tokens(given, is_right):
    """Whatever address and host they come with."""
    headers = {"authorization": given, "host": "server.example", "origin": "http://any.example"}
    with contextlib.nullcontext() if is_right else pytest.raises(Denied, match="Bearer") as error:
        check_caller("10.0.0.7", headers, "s3cret")
    assert is_right or error.value.status == 401


def test_a_token_is_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda *both: compared.append(both) or False)
    with pytest.raises(Denied):
        check_caller("10.0.0.7", {"authorization": "Bearer guess"}, "s3cret")
    assert compared == [(b"guess", b"s3cret")]


def test_a_token_that_is_not_ascii():
    # As a client sends UTF-8 and the server reads it.
    given = "clé".encode().decode("latin-1")
    check_caller("10.0.0.7", {"authorization": f"Bearer {given}"}, "clé")


def test_commands_at_once(served):
    served, _ = served

    def one(index):
        name = f"b{index % 8}"
        added = changed(served, add(name, "mine"), {"state": {name: "draining"}}).status_code
        weighed = changed(served, {"weights": {"a": index}}).status_code
        return added, weighed

    with futures.ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(one, range(32)))
    # Of four that add the same name one is first.
    assert sorted(added for added, _ in answers) == [200] * 8 + [400] * 24
    assert all(weighed == 200 for _, weighed in answers)
    arms = served.get("/kvhook/arms").json()
    assert sorted(arm["name"] for arm in arms["arms"]) == ["a", *(f"b{i}" for i in range(8))]
    assert all(arm["state"] == "draining" for arm in arms["arms"][1:])


def test_nobody_waits_while_a_plugin_loads_but_close():
    caches = cache(CacheKind(False), outer=1, tokens=64)
    host = Host("test", models(caches), offers(0, 0), [str(native.NATIVE)])
    call, begun, go = host._call, threading.Event(), threading.Event()

    def slow(function, *arguments):
        if function == "kvhook_control":
            begun.set()
            assert go.wait(60)
        call(function, *arguments)

    host._call = slow
    command = json.dumps({"changes": [add("a", "truncate")]})
    source = native.KVHOOK_SOURCE_OPERATOR
    with futures.ThreadPoolExecutor(2) as threads:
        loading = threads.submit(host.control, command, source)
        assert begun.wait(60)
        assert host.arms()["arms"] == [] and host.figures()["arms"] == {}
        closing = threads.submit(host.close)
        with pytest.raises(futures.TimeoutError):
            closing.result(0.2)
        go.set()
        loading.result(60)
        closing.result(60)
    with pytest.raises(KvhookError, match="closed"):
        host.arms()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/kvhook/arms"),
        ("POST", "/kvhook/control"),
        ("GET", "/kvhook/record"),
        ("POST", "/kvhook/probe"),
    ],
)
def test_every_route_asks_who_it_is(client, method, path):
    def status(served, **headers):
        headers = {"content-type": "application/json", **headers}
        return served.request(method, path, content="{}", headers=headers).status_code

    off = Adapter()
    off.on = False
    # Who may is told that compression is off.
    assert status(client(off)) == 409
    assert status(client(off), origin="http://evil.example") == 403
    assert status(client(off, address="10.0.0.7")) == 403
    assert status(client(off, token="secret")) == 401
    assert status(client(off, token="secret"), authorization="Bearer secret") == 409
    assert status(client(off, on="")) == 404
