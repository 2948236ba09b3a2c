"""Plugins are swapped while requests are in flight, some of them for plugins that fail: no request notices."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import engines, faulty

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
    before, after = found["before"], found["after"]
    assert after["threads"] <= before["threads"]
    assert after["files"] <= before["files"]
    # A leak of an instance's caches or of a library would be megabytes for each swap.
    assert after["mib"] < before["mib"] + 30
