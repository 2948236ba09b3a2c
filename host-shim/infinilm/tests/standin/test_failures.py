"""Failures of the adapter, provoked at each of its places in InfiniLM: nothing of them leaves a step, requests go on with
the tokens that they would have had, and the next request is served."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json

import pytest

from kvhook_infinilm import adapter_of, points, settings
from kvhook_infinilm.adapter import Adapter
from kvhook_infinilm.guard import failures
from kvhook_infinilm.requests import Requests

from standin.engines import (
    CACHES,
    KEEPS,
    add,
    arm,
    ask,
    block_of,
    expect,
    open_llm,
    prompt,
    run,
    usable,
)
from standin.test_generate import generate, open_engine, static
from standin.test_prefix import check_published
from standin.test_requests import check_all_freed

NEW_TOKENS = 20
ARM = "last32"

CALLS = {
    "BaseConfig._add_common_args": [(settings, "add_flags")],
    "BaseConfig.__init__": [(settings, "set_flags")],
    "InferEngine.__init__": [(Adapter, "__init__"), (Adapter, "open")],
    "InferEngine.forward": [
        (Adapter, "begin_batch_step"),
        (Adapter, "before_forward"),
        (Adapter, "after_forward"),
    ],
    "InferEngine.generate": [(Adapter, "begin_batch"), (Adapter, "end_batch")],
    "InferEngine.reset_cache": [(Adapter, "reset"), (Adapter, "open")],
    "ModelRunner.execute_model": [(Adapter, "begin_step"), (Adapter, "end_step")],
    "LLMEngine.__init__": [(Requests, "__init__")],
    "LLMEngine.add_request": [(Requests, "queued")],
    "LLMEngine.step": [(Requests, "sweep")],
    "LLMEngine.close": [(Adapter, "say_figures"), (Adapter, "close")],
    "Scheduler.commit_computed_tokens": [(Requests, "publishes")],
    "StaticScheduler.commit_computed_tokens": [(Requests, "publishes")],
    "StaticScheduler.schedule": [(Requests, "static_limit"), (Requests, "static_hit")],
    "BlockManager.get_computed_blocks": [(Requests, "prefix_limit")],
}
"""What the adapter does at each place."""

CANNOT_FAIL = {"ModelRunner.__init__", "BlockManager.append_slot"}
"""Looks up a value."""

_OTHERS = ("BaseConfig._add_common_args", "BaseConfig.__init__", "InferEngine.generate")
_OTHERS += ("InferEngine.reset_cache", "LLMEngine.close")

PLACES = [
    (place, owner, name)
    for place, calls in CALLS.items()
    for owner, name in calls
    if place not in _OTHERS
]
"""Those that requests of an `LLM` pass."""

RUNNING = [each for each in PLACES if not each[0].endswith("__init__")]

WHEN = ["at once", "at last"]
"""A call fails before it has done anything, or when it has done everything."""

UNCOMPRESSED = {
    ("begin_batch_step", "at once"),
    ("begin_batch_step", "at last"),
    ("after_forward", "at once"),
    ("after_forward", "at last"),
    ("begin_step", "at once"),
    ("begin_step", "at last"),
    ("end_step", "at once"),
}
"""Failures that come before the rows of a prompt are moved."""


class Provoked(Exception):
    """Not an error of the adapter's own."""


@contextlib.contextmanager
def provoke(owner, name: str, when: str):
    """A method of the adapter fails."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def fails(*arguments, **more):
        if when == "at last":
            original(*arguments, **more)
        raise Provoked

    setattr(owner, name, fails)
    try:
        yield
    finally:
        setattr(owner, name, original)


def names(places) -> list[str]:
    return [f"{place}-{name}" for place, _, name in places]


def both(answers, folder, text, block):
    """What the reference writes without compression, and with."""
    return [answers(folder, text, NEW_TOKENS, keep, block=block) for keep in (None, KEEPS[ARM])]


def test_all_places_are_here():
    wrapped = {point.name for point in points.POINTS if point.wrap is not None}
    assert wrapped == CALLS.keys() | CANNOT_FAIL


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("cache", ["static", "paged"])
@pytest.mark.parametrize("place", PLACES, ids=names(PLACES))
def test_from_the_beginning(model, answers, place, cache, when):
    _, owner, name = place
    with contextlib.ExitStack() as stack:
        stack.enter_context(provoke(owner, name, when))
        llm = stack.enter_context(open_llm(model(), [ARM], strict=False, **CACHES[cache]))
        adapter = adapter_of(llm)
        on = adapter is not None and adapter.on
        assert on or name in ("__init__", "open")
        plain_only = not on or (name, when) in UNCOMPRESSED
        for seed in (1, 2, 2):
            text = prompt(90, seed)
            plain, kept = both(answers, model(), text, block_of(llm))
            expect(ask(llm, text, ARM, NEW_TOKENS)[0], plain if plain_only else kept)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("cache", ["static", "paged", "flash"])
@pytest.mark.parametrize("place", RUNNING, ids=names(RUNNING))
def test_while_requests_run(model, answers, place, cache, when, reached):
    """Some are compressed by then, and stay so: what their caches lack is known whatever fails."""
    folder = model()
    _, owner, name = place
    with open_llm(folder, [ARM], **CACHES[cache]) as llm:
        before = cache != "static" and usable(llm)
        block = block_of(llm)
        texts = [prompt(90, seed) for seed in range(5)]
        early = [add(llm.engine, text, ARM, NEW_TOKENS) for text in texts[:3]]
        for _ in range(4):
            llm.engine.step()
        with provoke(owner, name, when):
            for _ in range(6):
                llm.engine.step()
            late = [add(llm.engine, text, ARM, NEW_TOKENS) for text in texts[3:]]
            for _ in range(6):
                llm.engine.step()
        run(llm.engine, early + late)
        for request, text in zip(early + late, texts):
            plain, kept = both(answers, folder, text, block)
            found = list(request.generated_token_ids)
            assert found in (plain.tokens, kept.tokens)
            if request is early[0] or (name, when) not in UNCOMPRESSED:
                assert found == kept.tokens
        served = prompt(90, 9)
        expect(ask(llm, served, ARM, NEW_TOKENS)[0], both(answers, folder, served, block)[1])
        check_all_freed(llm, reached)
        if cache != "static":
            assert usable(llm) == before
            known = [(text, both(answers, folder, text, block)[0]) for text in (*texts, served)]
            check_published(llm, known)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("cache", CACHES)
def test_turned_off(model, answers, cache, steps):
    """With compressed sequences about: their lengths are still right, nothing new is compressed."""
    folder = model()
    with open_llm(folder, [ARM], **CACHES[cache]) as llm:
        texts = [prompt(90, seed) for seed in range(3)]
        early = [add(llm.engine, text, ARM, NEW_TOKENS) for text in texts[:2]]
        for _ in range(steps):
            llm.engine.step()
        adapter_of(llm).abandon(Provoked())
        late = [add(llm.engine, text, ARM, NEW_TOKENS) for text in texts[2:]]
        run(llm.engine, early + late)
        answered = [both(answers, folder, text, block_of(llm)) for text in texts]
        expect(early[0].generated_token_ids, answered[0][1])
        expect(early[1].generated_token_ids, answered[1][cache != "static"])
        expect(late[0].generated_token_ids, answered[2][0])


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(
    "name", ["begin_batch", "begin_batch_step", "after_forward", "end_step", "end_batch"]
)
def test_generate(model, answers, name, when):
    engine = open_engine(model(), static(3))
    texts = [prompt(90, seed) for seed in range(3)]
    answered = [both(answers, model(), text, 1) for text in texts]
    for step, found in enumerate(_with_and_without(engine, texts, name, when)):
        for one, (plain, kept) in zip(found, answered):
            compressed = step != 1 or name == "end_batch"
            # The end of the forward is the end of the step.
            compressed |= when == "at last" and name in ("after_forward", "end_step")
            if (name, when) == ("begin_batch", "at last"):
                assert one in (plain.tokens, kept.tokens)
            else:
                expect(one, kept if compressed else plain)
    assert adapter_of(engine).live == {}


def _with_and_without(engine, texts, name, when):
    yield generate(engine, texts, ARM)
    with provoke(Adapter, name, when):
        found = generate(engine, texts, ARM)
    yield found
    yield generate(engine, texts, ARM)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", ["reset", "open"])
def test_reset_cache(model, answers, name, when):
    engine = open_engine(model(), static(3))
    texts = [prompt(90, seed) for seed in range(3)]
    answered = [both(answers, model(), text, 1) for text in texts]
    settings.set_arguments(json.dumps({"arms": [arm(ARM)]}), None, (), False)
    with provoke(Adapter, name, when):
        engine.reset_cache(static(3))
    for one, (plain, kept) in zip(generate(engine, texts, None), answered):
        expect(one, kept if adapter_of(engine).on else plain)
    engine.reset_cache(static(3))
    for one, (_, kept) in zip(generate(engine, texts, None), answered):
        expect(one, kept)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("name", ["say_figures", "close"])
def test_close(model, name, when):
    """InfiniLM's own engine is closed."""
    with open_llm(model(), [ARM], **CACHES["paged"]) as llm:
        add(llm.engine, prompt(90), ARM, NEW_TOKENS)
        llm.engine.step()
        with provoke(Adapter, name, when):
            llm.close()
        assert llm.engine.model_runner._closed


@pytest.mark.parametrize("name", ["add_flags", "set_flags"])
def test_flags(model, monkeypatch, name):
    """InfiniLM's own flags are read."""
    from infinilm.base_config import BaseConfig

    monkeypatch.setattr("sys.argv", ["script", "--model", str(model()), "--max-cache-len", "77"])
    with provoke(settings, name, "at once"):
        config = BaseConfig()
    assert config.max_cache_len == 77
    settings.set_flags(argparse.Namespace())


HOST_CALLS = ["begin", "ask", "prepare", "verdict", "commit", "free", "freed", "figures"]


@pytest.mark.parametrize("cache", ["static", "paged"])
@pytest.mark.parametrize("call", HOST_CALLS)
def test_calls_of_the_host(model, answers, call, cache, monkeypatch):
    """Also failures that are not of the kind that the host reports."""
    from kvhook_infinilm.host import Host

    def fails(self, *arguments):
        raise error

    folder = model()
    with open_llm(folder, [ARM], **CACHES[cache]) as llm:
        before = cache != "static" and usable(llm)
        for error in (Provoked(), _host_error(call)):
            with monkeypatch.context() as patch:
                patch.setattr(Host, call, fails)
                text = prompt(90)
                plain, kept = both(answers, folder, text, block_of(llm))
                (found,) = ask(llm, text, ARM, NEW_TOKENS)
            is_kept = call in ("free", "freed", "figures")
            assert found == (kept if is_kept else plain).tokens
            served = prompt(90, 9)
            expect(
                ask(llm, served, ARM, NEW_TOKENS)[0],
                both(answers, folder, served, block_of(llm))[1],
            )
        assert adapter_of(llm).live == {}
        assert cache == "static" or usable(llm) == before


def _host_error(call: str):
    from kvhook_infinilm.errors import HostError

    return HostError(call, 3, "PROVOKED", "by a test")


@pytest.mark.parametrize("cache", ["static", "paged"])
def test_a_rank_that_cannot_follow(model, answers, cache, monkeypatch, reached):
    """One of two ranks has committed and the other cannot: this request fails, others do not notice."""
    from infinilm.llm.request import RequestStatus

    from kvhook_infinilm.host import Host

    commit, calls = Host.commit, []

    def fails(self, rank, *arguments):
        calls.append(rank)
        if rank == 1 and len(calls) <= 3:
            raise _host_error("commit")
        return commit(self, rank, *arguments)

    monkeypatch.setattr(Host, "commit", fails)
    folder = model()
    with open_llm(folder, [ARM], ranks=2, **CACHES[cache]) as llm:
        before = cache != "static" and usable(llm)
        texts = [prompt(90, seed) for seed in range(3)]
        requests = [add(llm.engine, text, ARM, NEW_TOKENS) for text in texts]
        run(llm.engine, requests)
        assert requests[0].status == RequestStatus.FAILED
        for request, text in zip(requests[1:], texts[1:]):
            expected = both(answers, folder, text, block_of(llm))[1]
            expect(request.generated_token_ids, expected)
        # Nothing of the failed one is found by the same prompt.
        expect(ask(llm, texts[0], "none", NEW_TOKENS)[0], both(answers, folder, texts[0], 1)[0])
        assert cache == "static" or usable(llm) == before
        assert adapter_of(llm).live == {}


def test_failures_are_counted(model):
    with open_llm(model(), [ARM], **CACHES["static"]) as llm:
        before = failures["LLMEngine.step"]
        with provoke(Requests, "sweep", "at once"):
            ask(llm, prompt(8), "none", 3)
        assert failures["LLMEngine.step"] == before + 3


@pytest.mark.parametrize("cache", ["static", "paged"])
def test_forward_that_raises(model, answers, cache, monkeypatch):
    """The engine's own failure is the engine's: it comes out as it was, and the adapter is as before."""
    folder = model()
    with open_llm(folder, [ARM], **CACHES[cache], enable_prefix_caching=False) as llm:
        request = add(llm.engine, prompt(90), ARM, NEW_TOKENS)
        llm.engine.step()
        model_engine = llm.engine.model_runner.model_engine
        forward = type(model_engine).__mro__[1].forward

        def raises(self, given):
            raise Provoked

        with monkeypatch.context() as patch:
            patch.setattr(type(model_engine).__mro__[1], "forward", raises)
            with pytest.raises(Provoked):
                llm.engine.step()
        assert type(model_engine).__mro__[1].forward is forward
        request.mark_canceled()
        llm.engine.step()
        text = prompt(90, 4)
        kept = both(answers, folder, text, block_of(llm))[1]
        expect(ask(llm, text, ARM, NEW_TOKENS)[0], kept)
        assert adapter_of(llm).live == {}
