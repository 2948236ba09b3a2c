"""Tokens of compressed and of uncompressed sequences, against runs without kvhook and an independent reference."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import pytest

from kvhook_infinilm import HostError, Refused, adapter_of

from engine import engines
from engine.engines import Comparison, ask, figures, keep_of, tokens

NEW_TOKENS = 12
PLAIN = ["none", "noop", "declines"]


@pytest.fixture(scope="module")
def without_kvhook(model, prompts):
    """Tokens by kind of cache, of processes in which kvhook was never imported."""
    made = {}

    def make(kind: str) -> list[list[int]]:
        if kind not in made:
            options = engines.STATIC if kind == "static" else engines.PAGED
            made[kind] = engines.run_apart(model, None, options, [(prompts, None, NEW_TOKENS)])[
                "tokens"
            ][0]
        return made[kind]

    return make


def test_depth_is_what_was_built(llm, depth):
    assert adapter_of(llm).depth == depth


@pytest.mark.parametrize("arm", PLAIN)
def test_nothing_changes_where_nothing_is_compressed(kind, llm, arm, prompts, without_kvhook):
    assert tokens(llm, prompts, arm, NEW_TOKENS) == without_kvhook(kind)
    if arm != "none":
        found = figures(llm, arm)
        assert found["sequences"] == len(prompts) and found["commits"] == 0
        assert found["hooks"]["on_free"]["calls"] == len(prompts)
    assert not adapter_of(llm).live


@pytest.mark.parametrize("arm", ["last128", "last32", "key_diff", "attention"])
def test_compressed_tokens_are_the_references(kind, llm, arm, prompts, answers):
    if arm not in adapter_of(llm).arms():
        pytest.skip("queries need the C++ shim")
    keep = keep_of(arm, kind)
    before = figures(llm, arm)
    comparison, compressed = Comparison(), 0
    for output in ask(llm, prompts, arm, NEW_TOKENS):
        prompt = list(output.prompt_token_ids)
        compressed += keep.rows(len(prompt), len(prompt)) < len(prompt)
        expected = answers(prompt, NEW_TOKENS, keep)
        comparison.add(output.outputs[0].token_ids, expected, f"{arm}, {len(prompt)} tokens")
    comparison.end()
    found = figures(llm, arm)
    assert found["commits"] - before["commits"] == compressed > 0
    assert found["sequences"] - before["sequences"] == len(prompts)
    freed = found["hooks"]["on_free"]["calls"] - before["hooks"]["on_free"]["calls"]
    assert freed == len(prompts) and found["live"] == 0


@pytest.mark.parametrize("arm", ["every", "every_key_diff"])
def test_long_answers_are_compressed_again_and_again(kind, llm, arm, prompts, answers):
    prompt, new_tokens = prompts[14], 200
    before = figures(llm, arm)["commits"]
    (output,) = ask(llm, [prompt], arm, new_tokens)
    expected = answers(list(output.prompt_token_ids), new_tokens, keep_of(arm, kind))
    comparison = Comparison()
    comparison.add(output.outputs[0].token_ids, expected, arm)
    comparison.end()
    # After the prompt, and each 64 of the 199 tokens that the cache took in.
    assert figures(llm, arm)["commits"] - before == 1 + 3


def test_restarted_positions_are_noticed(static_llm, prompts, answers):
    comparison = Comparison()
    with pytest.raises(AssertionError, match="the reference's"):
        for output in ask(static_llm, prompts[12:18], "last32", NEW_TOKENS):
            prompt = list(output.prompt_token_ids)
            wrong = answers(prompt, NEW_TOKENS, keep_of("last32", "static"), restart_positions=True)
            comparison.add(output.outputs[0].token_ids, wrong)


def test_attention_is_refused_by_name_without_the_shim(tiny_model, depth):
    if depth == "shim":
        pytest.skip("the C++ shim is there")
    arm = engines.truncate("attention", "keep=0.25,history=top,importance=attention")
    with pytest.raises((HostError, Refused), match="quer"):
        with engines.open_llm(tiny_model("llama"), [arm], **engines.STATIC):
            pass


def test_an_unknown_arm_is_an_error_that_names_the_arms(llm):
    with pytest.raises(ValueError, match="last128") as error:
        ask(llm, ["Call me"], "last129", 1)
    assert "last129" in str(error.value) and not adapter_of(llm).live
