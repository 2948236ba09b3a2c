"""Requests of all arms at once, and every way in which they end."""

import random

import pytest

import kvhook_infinilm
from kvhook_infinilm import adapter_of
from kvhook_infinilm.errors import HostError, UnknownArm

from standin.engines import (
    ARMS,
    CACHES,
    KEEPS,
    PAGED,
    add,
    ask,
    block_of,
    expect,
    open_llm,
    prompt,
    run,
    usable,
)

NEW_TOKENS = 24


def check_all_freed(llm, reached) -> int:
    """`on_free` was called once on each rank for each sequence that reached a hook there; gives the sequences begun."""
    adapter = adapter_of(llm)
    arms = kvhook_infinilm.figures(llm)["arms"]
    assert adapter.live == {}
    assert sum(arm["live"] for arm in arms.values()) == 0
    assert sum(arm["hooks"]["on_free"]["calls"] for arm in arms.values()) == len(reached)
    assert not adapter.requests.memory.any_shorter
    return sum(arm["sequences"] for arm in arms.values())


def mixed(count: int, seed: int):
    """(prompt, arm) of so many requests."""
    draw = random.Random(seed)
    arms = [*ARMS, "none"]
    return [(prompt(draw.randint(1, 120), n), draw.choice(arms)) for n in range(count)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cache", CACHES)
def test_arms_in_one_batch(model, answers, cache, ranks, reached):
    asked = mixed(24, 1)
    with open_llm(model(), ranks=ranks, **CACHES[cache]) as llm:
        before = cache != "static" and usable(llm)
        requests = [add(llm.engine, text, arm, NEW_TOKENS) for text, arm in asked]
        run(llm.engine, requests)
        for request, (text, arm) in zip(requests, asked):
            expected = answers(model(), text, NEW_TOKENS, KEEPS.get(arm), block=block_of(llm))
            expect(request.generated_token_ids, expected, f"{arm}, {len(text)}")
        assert check_all_freed(llm, reached) == sum(arm != "none" for _, arm in asked)
        assert cache == "static" or usable(llm) == before


@pytest.mark.parametrize("cache", CACHES)
def test_ends_of_all_kinds(model, answers, cache, reached):
    """Requests are cancelled or time out while they wait, between steps, and inside a step: others do not notice."""
    asked = mixed(40, 2)
    draw = random.Random(3)
    with open_llm(model(), **CACHES[cache]) as llm:
        before = cache != "static" and usable(llm)
        requests = [add(llm.engine, text, arm, NEW_TOKENS) for text, arm in asked]
        ended, computed = set(), set()
        processor = llm.engine.processor
        build = processor.build_model_inputs

        def end(request) -> None:
            ended.add(request.request_id)
            draw.choice([request.mark_canceled, request.mark_timeout])()

        def build_and_end(output, *arguments):
            """A client goes while its tokens are computed."""
            for request in output.scheduled_requests:
                if getattr(request, "_kvhook", None) is not None:
                    computed.add(request.request_id)
                if draw.random() < (0.15 if output.is_prefill else 0.01):
                    ended.add(request.request_id)
                    draw.choice([request.abort, request.mark_canceled])()
            return build(output, *arguments)

        processor.build_model_inputs = build_and_end
        for request in draw.sample(requests, 6):
            end(request)
        while not all(request.is_finished() for request in requests):
            llm.engine.step()
            alive = [request for request in requests if not request.is_finished()]
            if alive and draw.random() < (0.02 if cache == "static" else 0.1):
                end(draw.choice(alive))
        # What ended between steps is noticed by the next.
        llm.engine.step()
        assert 10 < len(ended) < 35
        for request, (text, arm) in zip(requests, asked):
            expected = answers(model(), text, NEW_TOKENS, KEEPS.get(arm), block=block_of(llm))
            found = list(request.generated_token_ids)
            if request.request_id in ended:
                assert found == expected.tokens[: len(found)], arm
            else:
                expect(found, expected, f"{arm}, {len(text)}")
        assert check_all_freed(llm, reached) == len(computed) > 12
        assert cache == "static" or usable(llm) == before


@pytest.mark.parametrize("cache", CACHES)
def test_close_with_live_sequences(model, cache):
    with open_llm(model(), **CACHES[cache]) as llm:
        adapter = adapter_of(llm)
        for _ in range(3):
            add(llm.engine, prompt(60), "last32", NEW_TOKENS)
        llm.engine.step()
        assert adapter.live
        llm.close()
        assert adapter.live == {} and not adapter.on
        assert kvhook_infinilm.figures(llm) == {}
        llm.close()


def test_reset_with_live_sequences(model, answers, reached):
    """The cache goes away under running requests: their sequences end, the next ones are served."""
    from infinilm.cache import StaticKVCacheConfig

    with open_llm(model(), **CACHES["static"], enable_prefix_caching=False) as llm:
        request = add(llm.engine, prompt(60), "last32", NEW_TOKENS)
        llm.engine.step()
        assert len(adapter_of(llm).live) == 1
        request.mark_canceled()
        llm.engine.model_runner.model_engine.reset_cache(StaticKVCacheConfig(1, 1024))
        assert adapter_of(llm).live == {}
        llm.engine.step()
        assert check_all_freed(llm, reached) == 1
        (found,) = ask(llm, prompt(90), "last32", NEW_TOKENS)
        expect(found, answers(model(), prompt(90), NEW_TOKENS, KEEPS["last32"]))
        assert check_all_freed(llm, reached) == 2


def test_unknown_arm_is_refused_before_queueing(model, answers):
    with open_llm(model(), **PAGED) as llm:
        with pytest.raises(UnknownArm, match="'nobody'.*last32"):
            add(llm.engine, prompt(10), "nobody", NEW_TOKENS)
        assert llm.engine.scheduler.waiting_queue.sync_q.qsize() == 0
        (found,) = ask(llm, prompt(90), "last32", NEW_TOKENS)
        expect(found, answers(model(), prompt(90), NEW_TOKENS, KEEPS["last32"], block=16))


def test_arms_by_weight(model, answers):
    """A request that names no arm gets one of them; its answer is that arm's."""
    with open_llm(model(), ["last32", "noop"], **PAGED) as llm:
        texts = [prompt(90, seed) for seed in range(16)]
        plain = kept = 0
        for text, found in zip(texts, ask(llm, texts, None, NEW_TOKENS)):
            both = [
                answers(model(), text, NEW_TOKENS, keep, block=16).tokens
                for keep in (None, KEEPS["last32"])
            ]
            assert found in both
            plain += found == both[0]
            kept += found == both[1]
        figures = kvhook_infinilm.figures(llm)["arms"]
        assert figures["last32"]["sequences"] + figures["noop"]["sequences"] == 16
        assert figures["last32"]["sequences"] == figures["last32"]["commits"] <= kept
        assert figures["noop"]["sequences"] <= plain


def test_control(model, answers):
    """A shadow measures and changes no token; when it serves again, it compresses; a removed arm is unknown."""
    with open_llm(model(), ["last32", "noop"], **PAGED) as llm:
        plain = answers(model(), prompt(90), NEW_TOKENS, block=16)
        kept = answers(model(), prompt(90), NEW_TOKENS, KEEPS["last32"], block=16)
        assert plain.tokens != kept.tokens

        kvhook_infinilm.control(llm, [{"state": {"last32": "shadow"}}])
        (found,) = ask(llm, prompt(90), "last32", NEW_TOKENS)
        assert found == plain.tokens
        figures = kvhook_infinilm.figures(llm)["arms"]["last32"]
        assert figures["commits"] == 0 < figures["shadow"]["commits"]

        kvhook_infinilm.control(llm, [{"state": {"last32": "serving"}}])
        (found,) = ask(llm, prompt(90), "last32", NEW_TOKENS)
        assert found == kept.tokens

        before = kvhook_infinilm.arms(llm)
        with pytest.raises(HostError, match="no-such"):
            kvhook_infinilm.control(
                llm, [{"weights": {"noop": 9}}, {"add": {"name": "x", "plugin": "no-such"}}]
            )
        assert kvhook_infinilm.arms(llm) == before
        new = {"name": "x", "plugin": "noop", "config": "observe=none"}
        kvhook_infinilm.control(llm, [{"add": new}, {"remove": "last32"}])
        assert [arm["name"] for arm in kvhook_infinilm.arms(llm)["arms"]] == ["noop", "x"]
        with pytest.raises(UnknownArm, match="'last32'.*noop, x"):
            add(llm.engine, prompt(10), "last32", NEW_TOKENS)


@pytest.mark.parametrize("cache", ["static", "paged"])
def test_lengths_of_a_step_are_not_those_of_another_forward(model, cache):
    """Between steps somebody may call `InferEngine.forward`: a shorter request that runs must not change its lengths."""
    with open_llm(model(), **CACHES[cache]) as llm:
        request = add(llm.engine, prompt(90), "last32", NEW_TOKENS)
        for _ in range(3):
            llm.engine.step()
        assert request._kvhook.dropped > 0
        given = {"past_kv_lengths": None, "total_kv_lengths": None}
        assert adapter_of(llm).shortened(given) is given
        run(llm.engine, [request])
