"""Mixed requests through InfiniLM's HTTP server, whose model's config.json names the arms."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine import engines, model_files
from engine.server import serve

NEW_TOKENS = 10
IN_FLIGHT = 8
BLOCKS, BLOCK_SIZE = 240, 16

FLAGS = {
    "paged": ["--enable-paged-attn", "--attn", "paged-attn", "--num-blocks", str(BLOCKS)]
    + ["--block-size", str(BLOCK_SIZE), "--max-batch-size", str(IN_FLIGHT)]
    # Else requests with the same prompt share blocks, which do not become free then, and an answer depends on who else is
    # served (test_prefix.py).
    + ["--disable-prefix-caching"],
    "static": ["--max-cache-len", "2048"],
}
REQUESTS = {"paged": 200, "static": 30}
PROMPTS = {"paged": 12, "static": 6}


@pytest.fixture(scope="module", params=["paged", "static"])
def kind(request) -> str:
    """Of cache."""
    return request.param


@pytest.fixture(scope="module")
def arms(depth) -> list[str]:
    """Names of the arms of the model's config."""
    shim_only = ["attention"] if depth == "shim" else []
    return ["last32", "key_diff", "every", "every_pairs", *shim_only]


@pytest.fixture(scope="module")
def server(kind, model, depth, arms, tmp_path_factory):
    """A server that runs."""
    known = engines.arms(depth) + engines.merging_arms()
    form = [arm for arm in known if arm["name"] in arms]
    folder = tmp_path_factory.mktemp("server")
    configured = model_files.copy_with(model, folder / "model", kv_plugin=form)
    with serve(configured, FLAGS[kind], folder / "log.txt") as server:
        yield server


def settled(server) -> dict:
    """Figures once no sequence is live any more: the ends of cancelled ones are noticed a step later."""
    for _ in range(100):
        figures = server.figures()
        if not any(arm["live"] for arm in figures.values()):
            return figures
        time.sleep(0.1)
    raise AssertionError(f"sequences stay live: {figures}")


def test_mixed_requests_are_answered_as_when_alone(server, kind, arms, prompts):
    some = prompts[1 : 1 + PROMPTS[kind]] if kind == "static" else prompts[4 : 4 + PROMPTS[kind]]
    choices = ["none", *arms]
    alone = {}
    for content in some:
        for arm in choices:
            status, alone[content, arm] = server.chat(content, arm, NEW_TOKENS)
            assert status == 200, alone[content, arm]
    order = random.Random(4)
    asked = [
        (order.choice(some), order.choice(choices), order.random()) for _ in range(REQUESTS[kind])
    ]

    def one(index: int):
        content, arm, dice = asked[index]
        if dice < 0.1:
            server.cancel(content, arm, 100)
            return None
        return server.chat(content, arm, NEW_TOKENS, stream=dice < 0.55)

    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        answers = list(threads.map(one, range(len(asked))))
    cancelled = 0
    for (content, arm, _), answer in zip(asked, answers):
        if answer is None:
            cancelled += 1
        else:
            assert answer == (200, alone[content, arm]), f"{arm} of {content[:60]!r}"
    assert 0 < cancelled < len(asked) / 4

    figures = settled(server)
    assert sorted(figures) == sorted(arms)
    for name, arm in figures.items():
        begun = len(some) + sum(1 for _, each, _ in asked if each == name)
        assert arm["sequences"] == begun, name
        # mlp-decouple keeps nothing of a sequence: it is not told of ends.
        told = 0 if name == "every_pairs" else begun
        assert arm["hooks"]["on_free"]["calls"] == told, name
        # Else what is kept would depend on what else is in flight.
        assert not arm["fallbacks"].get("no_room"), name
    assert figures["last32"]["commits"] > 0 and figures["key_diff"]["commits"] > 0
    assert server.get("/health") == (200, json.dumps({"status": "healthy"}, separators=(",", ":")))


def test_all_blocks_are_usable_again(server, kind):
    """InfiniLM begins a request only when there are blocks for the longest answer to it: this needs nearly all."""
    if kind == "static":
        pytest.skip("a static cache has no blocks")
    server.cancel("Tell me a long story.", "none", (BLOCKS - 4) * BLOCK_SIZE)
    settled(server)
    assert server.chat("Tell me a story.", "last32", NEW_TOKENS)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_arm_is_a_bad_request(server, stream):
    status, body = server.chat("Hello", "last33", 1, stream)
    assert status == 400
    assert "last33" in body and "last32" in body and "none" in body


def test_metrics(server):
    status, body = server.get("/kvhook/metrics")
    assert status == 200 and 'arm="last32"' in body
