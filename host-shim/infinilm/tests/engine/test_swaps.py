"""Plugins are swapped while requests are in flight, some of them for plugins that fail: no request notices."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import json
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine import engines, faulty, model_files, swaps
from engine.server import serve
from engine.test_server import FLAGS, settled

SWAPS = int(os.environ.get("KVHOOK_SWAPS", "200"))
"""After half as many to warm up."""

NEW_TOKENS = 8
IN_FLIGHT = 8
OPTIONS = {
    "static": engines.STATIC | {"max_cache_len": 512},
    # With prefix caching an answer depends on who else is served (test_prefix.py).
    "paged": engines.PAGED | {"enable_prefix_caching": False},
}


@pytest.fixture(params=["static", "paged"])
def kind(request) -> str:
    """Of cache."""
    return request.param


def check_flat(before: dict, after: dict, spare: int = 0) -> None:
    """Neither threads nor files grew by more than `spare`, nor memory."""
    assert after["threads"] <= before["threads"] + spare
    assert after["files"] <= before["files"] + spare
    # A leak of an instance's caches or of a library would be megabytes for each swap.
    assert after["mib"] < before["mib"] + 30


def test_no_request_notices_a_swap(kind, model, depth, prompts):
    job = dict(
        model=str(model),
        folders=[str(faulty.library().parent)],
        options=OPTIONS[kind],
        prompts=prompts[6:12],
        in_flight=IN_FLIGHT,
        new_tokens=NEW_TOKENS,
        swaps=SWAPS,
        seed=7,
        queries=depth == "shim",
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("swaps.py"))],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found | {"wrong": found["wrong"][:10]}))
    assert not found["wrong"], found["wrong"][:10]
    assert found["made"] + found["refused"] == SWAPS + SWAPS // 2
    assert found["refused"] > SWAPS // 20 and found["made"] > SWAPS
    assert found["compressed"] > found["requests"] // 10
    assert found["live"] == 0 and found["instances"] == 2
    check_flat(found["before"], found["after"])


def test_nor_one_over_http(kind, model, depth, prompts, tmp_path):
    good = swaps.GOOD | (swaps.WITH_QUERIES if depth == "shim" else {})
    form = swaps.first_arms()
    configured = model_files.copy_with(model, tmp_path / "model", kv_plugin=form)
    flags = [*FLAGS[kind], "--kv-plugin-path", str(faulty.library().parent)]
    some = prompts[6:10]
    with serve(configured, flags, tmp_path / "log.txt", KVHOOK_CONTROL="1") as server:
        # An answer is that of one config of its arm, or, where a plugin failed, uncompressed.
        alone = [{server.chat(text, "none", NEW_TOKENS)[1]} for text in some]
        for plugin, config in good.values():
            swap = {"name": "a", "plugin": plugin, "config": config}
            status, answer = server.post("/kvhook/control", {"changes": [{"replace": swap}]})
            assert status == 200, answer
            for text, answers in zip(some, alone):
                answers.add(server.chat(text, "a", NEW_TOKENS)[1])

        draw = random.Random(5)
        answered = threading.Semaphore(0)
        ended = threading.Event()

        def swap_often(count: int) -> list[int]:
            """Two swaps for each answer."""
            statuses = []
            for number in range(count):
                if number % 2:
                    assert answered.acquire(timeout=300)
                changes, can = swaps.command(draw, good)
                status, answer = server.post("/kvhook/control", {"changes": changes})
                assert status == (200 if can else 400), answer
                statuses.append(status)
            return statuses

        def ask(seed: int) -> int:
            dice, asked = random.Random(seed), 0
            while not ended.is_set():
                index, arm = dice.randrange(len(some)), dice.choice([*swaps.ARMS, None])
                status, text = server.chat(some[index], arm, NEW_TOKENS, stream=dice.random() < 0.5)
                assert status == 200 and text in alone[index], f"{arm}: {text}"
                asked += 1
                answered.release()
            return asked

        def swapped(count: int) -> tuple[list[int], int]:
            ended.clear()
            with ThreadPoolExecutor(IN_FLIGHT + 1) as threads:
                asking = [threads.submit(ask, draw.random()) for _ in range(IN_FLIGHT)]
                try:
                    statuses = swap_often(count)
                finally:
                    ended.set()
                return statuses, sum(each.result() for each in asking)

        swapped(SWAPS // 2)
        before = swaps.resources(server.process)
        statuses, asked = swapped(SWAPS)
        after = swaps.resources(server.process)
        settled(server)
        arms = json.loads(server.get("/kvhook/arms")[1])
        print(statuses.count(200), statuses.count(400), asked, before, after, arms["instances"])
        # Answers of the warm-up may have let some go ahead.
        assert len(statuses) == SWAPS and asked > SWAPS // 4
        assert arms["instances"] == 2
        assert any(len(answers) > 1 for answers in alone)
        # The server may hold a connection or a worker of its pool a while longer.
        check_flat(before, after, spare=IN_FLIGHT)
