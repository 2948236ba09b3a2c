"""Other architectures, tiny and random: heads without groups, bias, norms of queries and keys."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import pytest

from engine import engines
from engine.engines import Comparison, ask, keep_of

NEW_TOKENS = 24
PROMPTS = [
    "The old man had a boat.",
    "No man is an island, entire of itself; every man is a piece of the continent, a part of the main.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
    "want of a wife. However little known the feelings or views of such a man may be.",
]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_tokens_are_the_references(name, kind, tiny_model, depth):
    from engine.reference import Reference

    model = tiny_model(name)
    answer = Reference(model).answer
    options = engines.STATIC | {"max_cache_len": 512} if kind == "static" else engines.PAGED
    comparison = Comparison()
    with engines.open_llm(model, engines.arms(depth), **options) as llm:
        for arm in ("none", "last32", "key_diff", "attention"):
            if arm == "attention" and depth == "python":
                continue
            for output in ask(llm, PROMPTS, arm, NEW_TOKENS):
                expected = answer(list(output.prompt_token_ids), NEW_TOKENS, keep_of(arm, kind))
                comparison.add(output.outputs[0].token_ids, expected, f"{name} {arm}")
        for arm in ("last32", "key_diff"):
            assert engines.figures(llm, arm)["commits"] == 2 + (arm == "key_diff")
    comparison.end()
