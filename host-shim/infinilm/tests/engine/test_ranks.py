"""Tensor parallel on three CPU ranks: every rank keeps its own heads, all commit or none."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import pytest

from engine import engines

NEW_TOKENS = 16


@pytest.fixture(scope="module")
def three_ranks(model) -> None:
    """Skips where InfiniLM itself cannot run them."""
    asked = [(["Call me"], None, 1)]
    options = engines.STATIC | {"tensor_parallel_size": 3}
    try:
        engines.run_apart(model, None, options, asked, INFINI_CPU_DEVICES="3")
    except AssertionError as error:
        pytest.skip(f"this InfiniLM cannot run three ranks on the CPU: {str(error)[-200:]}")


def run(model, depth, kind, prompts, ranks: int) -> dict:
    options = engines.STATIC if kind == "static" else engines.PAGED
    names = ["last32", "key_diff", "pairs"] + (["attention"] if depth == "shim" else [])
    arms = engines.arms(depth) + engines.merging_arms()
    form = {"arms": [arm for arm in arms if arm["name"] in names]}
    requests = [(prompts, arm, NEW_TOKENS) for arm in ["none", *names]]
    options = options | {"tensor_parallel_size": ranks}
    return engines.run_apart(model, form, options, requests, INFINI_CPU_DEVICES=str(ranks))


def test_three_ranks_answer_as_one(three_ranks, model, depth, kind, prompts):
    some = [prompts[3], prompts[12], prompts[16]]
    three = run(model, depth, kind, some, 3)
    one = run(model, depth, kind, some, 1)
    assert three["tokens"] == one["tokens"]
    for arm, found in three["figures"]["arms"].items():
        assert found["commits"] == one["figures"]["arms"][arm]["commits"] > 0
        assert found["live"] == 0
