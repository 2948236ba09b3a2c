"""`AsyncLLMEngine`, as the server uses it: every answer is the same alone and in company."""

import asyncio
import random

import pytest

import kvhook_infinilm
from kvhook_infinilm import adapter_of

from standin.engines import (
    ARMS,
    CACHES,
    KEEPS,
    attach,
    expect,
    parameters,
    prompt,
    spoil_blocks,
    usable,
)
from standin.model_files import byte_ids

NEW_TOKENS = 24
REQUESTS = 40
IN_FLIGHT = 8


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cache", CACHES)
def test_requests(model, answers, cache, ranks, reached):
    attach(ARMS)
    from infinilm.llm import AsyncLLMEngine

    engine = AsyncLLMEngine(
        str(model()),
        device="cpu",
        dtype="float32",
        tensor_parallel_size=ranks,
        skip_load=True,
        **CACHES[cache],
    )
    spoil_blocks(engine.engine)
    adapter = adapter_of(engine)
    assert adapter.on
    before = cache != "static" and usable(engine)
    block = 1 if cache == "static" else 16
    draw = random.Random(4)
    asked = [
        (prompt(draw.randint(1, 120), n), draw.choice([*ARMS, "none"]), draw.random() < 0.25)
        for n in range(REQUESTS)
    ]
    found = asyncio.run(_ask_all(engine, asked, draw, reached))
    assert engine.is_healthy()
    for (text, arm, is_cancelled), tokens in zip(asked, found):
        expected = answers(model(), text, NEW_TOKENS, KEEPS.get(arm), block=block)
        if is_cancelled:
            assert tokens == expected.tokens[: len(tokens)], arm
        else:
            expect(tokens, expected, f"{arm}, {len(text)}")
    assert cache == "static" or usable(engine) == before


async def _ask_all(engine, asked, draw, reached) -> list[list[int]]:
    engine.start()
    room = asyncio.Semaphore(IN_FLIGHT)

    async def ask(text, arm, is_cancelled):
        async with room:
            tokens, most = [], draw.randint(0, NEW_TOKENS - 1) if is_cancelled else NEW_TOKENS
            request = engine.add_request(
                None,
                prompt_token_ids=byte_ids(text),
                sampling_params=parameters(None, NEW_TOKENS),
                request_data={"kv_plugin": arm},
            )
            if most == 0:
                engine.add_aborted_req(request)
            async for output in engine.stream_request(request):
                if output.token_id >= 0:
                    tokens.append(output.token_id)
                if len(tokens) == most:
                    # A client that goes: the server aborts its request, or only closes it.
                    if is_cancelled and draw.random() < 0.5:
                        engine.add_aborted_req(request)
                    break
            return tokens

    found = await asyncio.gather(*(ask(*each) for each in asked))
    adapter = adapter_of(engine)
    for _ in range(500):
        if not adapter.live and not _running(engine.engine.scheduler):
            break
        await asyncio.sleep(0.01)
    arms = kvhook_infinilm.figures(engine)["arms"].values()
    assert not adapter.live
    assert sum(arm["hooks"]["on_free"]["calls"] for arm in arms) == len(reached)
    engine.stop()
    return found


def _running(scheduler) -> bool:
    running = getattr(scheduler, "running_queue", None)
    if running is None:
        return scheduler.running_request is not None
    return running.sync_q.qsize() > 0
