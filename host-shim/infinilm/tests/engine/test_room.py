"""What the freed room is good for, and decode graphs over shorter caches."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import gc
import weakref

import pytest

from kvhook_infinilm import adapter_of

from engine import engines
from engine.engines import Comparison, ask, keep_of

PROMPT = (
    "Some years ago, never mind how long precisely, having little or no money in my purse. " * 3
)


@pytest.fixture(scope="module")
def tiny_answer(tiny_model):
    """The reference of the tiny Llama."""
    from engine.reference import Reference

    return Reference(tiny_model("llama")).answer


def test_a_static_cache_serves_longer_outputs(tiny_model, tiny_answer):
    limit, new_tokens = 300, 200
    arms = [
        engines.truncate("last32", "budget=36"),
        engines.truncate("every", "budget=132,every=64"),
    ]
    options = engines.STATIC | {"max_cache_len": limit}
    with engines.open_llm(tiny_model("llama"), arms, **options) as llm:
        (plain,) = ask(llm, [PROMPT], "none", new_tokens)
        length = len(plain.prompt_token_ids)
        assert len(plain.outputs[0].token_ids) == limit - length + 1 < new_tokens
        for arm in ("last32", "every"):
            (output,) = ask(llm, [PROMPT], arm, new_tokens)
            found = output.outputs[0].token_ids
            comparison = Comparison()
            answer = tiny_answer(list(output.prompt_token_ids), new_tokens, keep_of(arm, "static"))
            comparison.add(found, answer, arm)
            comparison.end()
        # The next request has the usual limit.
        (again,) = ask(llm, [PROMPT], "none", new_tokens)
        assert again.outputs[0].token_ids == plain.outputs[0].token_ids


def test_positions_end_where_the_model_ends(tiny_model):
    """Not even compression again and again takes a sequence past `max_position_embeddings`."""
    options = engines.STATIC | {"max_cache_len": 300}
    arms = [engines.truncate("every", "budget=132,every=64")]
    with engines.open_llm(tiny_model("llama"), arms, **options) as llm:
        (output,) = ask(llm, [PROMPT], "every", 2000)
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 1024 + 1


GRAPHS = engines.PAGED | {"enable_graph": True}


def test_decode_graphs_go_on_with_shorter_caches(tiny_model, tiny_answer, depth):
    """Also beside an arm that looks in prefill only. Apart, since InfiniLM may crash where it has no graphs."""
    model, new_tokens = tiny_model("llama"), 80
    prompts = [PROMPT, PROMPT[40:], PROMPT[80:]]
    try:
        engines.run_apart(model, None, GRAPHS, [(prompts, None, 4)])
    except AssertionError as error:
        pytest.skip(f"this InfiniLM has no decode graphs on the CPU: {str(error)[-200:]}")
    names = ["last32", "every", *(["attention"] if depth == "shim" else [])]
    arms = [arm for arm in engines.arms(depth) if arm["name"] in names]
    asked = ["none", *names]
    requests = [(prompts, arm, new_tokens) for arm in asked]
    found = engines.run_apart(model, {"arms": arms}, GRAPHS, requests)["tokens"]
    comparison = Comparison()
    for arm, answers in zip(asked, found):
        for prompt, tokens in zip(prompts, answers):
            expected = tiny_answer(token_ids(model, prompt), new_tokens, keep_of(arm, "paged"))
            comparison.add(tokens, expected, arm)
    comparison.end()


def token_ids(model, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)(text)["input_ids"]


def test_graphs_refuse_an_arm_that_looks_in_decode(tiny_model, depth):
    if depth == "python":
        pytest.skip("before_attention needs the C++ shim")
    form = {"arms": [{"name": "noop", "plugin": "noop"}]}
    with pytest.raises(AssertionError, match="compiled graphs do not call"):
        engines.run_apart(tiny_model("llama"), form, GRAPHS, [(["Call"], "none", 1)])


@pytest.mark.parametrize("cache", [engines.STATIC, engines.PAGED], ids=["static", "paged"])
def test_an_engine_that_is_gone_leaves_nothing(tiny_model, cache):
    """Neither its scheduler nor what kvhook knew of it."""
    arm = engines.truncate("last32", "budget=36")
    with engines.open_llm(tiny_model("llama"), [arm], **cache) as llm:
        ask(llm, [PROMPT], "last32", 4)
        assert engines.figures(llm, "last32")["commits"] == 1
        kept = [weakref.ref(llm.engine.scheduler), weakref.ref(adapter_of(llm))]
        kept.append(weakref.ref(llm.engine.model_runner.model_engine))
    del llm
    gc.collect()
    assert [one() for one in kept] == [None, None, None]
