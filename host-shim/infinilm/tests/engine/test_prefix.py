"""Prefix caching beside compression: whatever a request finds in the cache, its answer is the reference's."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import pytest

from kvhook_infinilm import adapter_of

from engine import engines
from engine.engines import Comparison, ask, figures, keep_of

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def prefix_llm(kind, model, depth, request):
    """SmolLM2 with prefix caching."""
    if kind == "paged":
        yield request.getfixturevalue("paged_llm")
        return
    options = engines.STATIC | {"enable_prefix_caching": True}
    with engines.open_llm(model, engines.arms(depth), **options) as llm:
        yield llm


@pytest.fixture(scope="module", params=["static", "paged"])
def kind(request) -> str:
    """Of cache."""
    return request.param


@pytest.fixture(scope="module")
def shared(prompts) -> str:
    """A text that no other test asks about: its blocks are in no cache."""
    return "It was told twice. " + prompts[16]


def check(llm, answers, asked) -> None:
    """Asks one after the other and compares."""
    kind = llm.config.cache_type
    comparison = Comparison()
    for prompt, arm in asked:
        (output,) = ask(llm, [prompt], arm, NEW_TOKENS)
        ids = list(output.prompt_token_ids)
        expected = answers(ids, NEW_TOKENS, keep_of(arm, kind))
        comparison.add(output.outputs[0].token_ids, expected, f"{arm} of {asked}")
    comparison.end()
    assert not adapter_of(llm).live


def no_gains(llm) -> int:
    """How often nothing would have become free."""
    return sum(figures(llm, arm)["fallbacks"].get("no_gain", 0) for arm in adapter_of(llm).arms())


def compressing(llm) -> list[str]:
    return [arm for arm in ("last32", "key_diff", "attention") if arm in adapter_of(llm).arms()]


def test_the_same_prompt_twice(prefix_llm, shared, answers):
    for arm in compressing(prefix_llm):
        check(prefix_llm, answers, [(shared, arm), (shared, arm), (shared, "none"), (shared, arm)])


def test_a_prefix_of_a_compressed_and_an_uncompressed_request(prefix_llm, shared, answers):
    longer = shared + " And then he went on, as before"
    other = shared + " Nobody else had heard of it until"
    for arm in compressing(prefix_llm):
        check(prefix_llm, answers, [(longer, arm), (other, "none"), (longer, arm), (other, arm)])


def test_a_compressed_answer_is_no_prefix(prefix_llm, shared, answers):
    """The next turn of a chat holds the tokens that were computed over a compressed cache."""
    (output,) = ask(prefix_llm, [shared], "last32", 40)
    turn = shared + output.outputs[0].text + " So be it."
    check(prefix_llm, answers, [(turn, "none"), (turn, "last32")])


def test_shared_blocks_at_the_same_time(paged_llm, shared, answers):
    """Compressed and uncompressed requests share blocks while all are running."""
    from infinilm.llm import SamplingParams
    from infinilm.llm.request import InferenceRequest

    manager = paged_llm.engine.scheduler.cache_manager
    usable = manager.get_total_usable_blocks()
    before = no_gains(paged_llm)
    base = paged_llm.engine.tokenize(shared)
    ask(paged_llm, [shared], "none", 1)
    asked = []
    for index, arm in enumerate(["none", "last32", "key_diff", "none", "every", "last128", "none"]):
        ids = base + paged_llm.engine.tokenize(" Then")[: index % 2]
        parameters = SamplingParams(top_k=1, max_tokens=NEW_TOKENS, ignore_eos=True)
        parameters.kv_plugin = arm
        request = InferenceRequest(f"shared-{index}", "", ids, sampling_params=parameters)
        asked.append((request, arm, ids))
        paged_llm.engine.add_request(request)
    while not all(request.is_finished() for request, _, _ in asked):
        paged_llm.engine.step()
    # Blocks that another request uses do not become free: where too little would, the sequence stays as it is.
    for request, arm, ids in asked:
        found = list(request.generated_token_ids)
        plain = answers(ids, NEW_TOKENS, None).tokens
        kept = answers(ids, NEW_TOKENS, keep_of(arm, "paged")).tokens
        assert found in (plain, kept), arm
    assert no_gains(paged_llm) > before
    assert manager.get_total_usable_blocks() == usable
    assert not adapter_of(paged_llm).live
