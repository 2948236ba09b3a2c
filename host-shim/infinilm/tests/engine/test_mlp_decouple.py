"""`mlp-decouple` with the trained weights, chosen by the model's config.json: the reference's tokens."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import pytest

from kvhook_infinilm import adapter_of

from engine import engines
from engine.engines import Comparison, ask, figures, keep_of

NEW_TOKENS = 12


@pytest.fixture(scope="module", params=["static", "paged"])
def kind(request) -> str:
    """Of cache."""
    return request.param


@pytest.fixture(scope="module")
def llm(kind, merging_model):
    """SmolLM2, whose config.json chooses the arms."""
    options = engines.STATIC if kind == "static" else engines.PAGED
    with engines.open_llm(merging_model, None, **options) as llm:
        yield llm


def check(llm, kind, answers, arm, prompts, new_tokens) -> None:
    """Asks an arm for all prompts and compares."""
    keep = keep_of(arm, kind)
    before, comparison, compressed = figures(llm, arm)["commits"], Comparison(), 0
    for output in ask(llm, prompts, arm, new_tokens):
        prompt = list(output.prompt_token_ids)
        compressed += keep.rows(len(prompt), len(prompt)) < len(prompt)
        expected = answers(prompt, new_tokens, keep)
        comparison.add(output.outputs[0].token_ids, expected, f"{arm}, {len(prompt)} tokens")
    comparison.end()
    commits = figures(llm, arm)["commits"] - before
    # With `every`, after each 64 of the tokens that the cache took in.
    assert commits == compressed + len(prompts) * (keep.every and (new_tokens - 1) // keep.every)
    assert compressed and not adapter_of(llm).live


@pytest.mark.parametrize("arm", ["pairs", "fours"])
def test_tokens_are_the_references(kind, llm, arm, prompts, answers):
    check(llm, kind, answers, arm, prompts, NEW_TOKENS)


@pytest.mark.parametrize("arm", ["every_pairs", "every_fours"])
def test_long_answers_are_compressed_again_and_again(kind, llm, arm, prompts, answers):
    check(llm, kind, answers, arm, [prompts[14], prompts[17]], 200)


def test_what_is_merged_matters(kind, llm, prompts, answers):
    """Else equal tokens would show nothing."""
    comparison = Comparison()
    with pytest.raises(AssertionError, match="the reference's"):
        for output in ask(llm, prompts[12:18], "fours", NEW_TOKENS):
            plain = answers(list(output.prompt_token_ids), NEW_TOKENS, None)
            comparison.add(output.outputs[0].token_ids, plain)
