"""Blocks of the paged scheduler: what compression takes, what it gives back, and what it does without room."""

import pytest

from standin.engines import (
    BLOCK,
    KEEPS,
    PAGED,
    SHORTENING,
    add,
    ask,
    expect,
    figures,
    open_llm,
    prompt,
    run,
    usable,
)

NEW_TOKENS = 20


@pytest.mark.parametrize("layout", ["default", "flash-attn"])
@pytest.mark.parametrize("is_caching", [True, False])
def test_all_blocks_come_back(model, is_caching, layout):
    options = PAGED | dict(enable_prefix_caching=is_caching, attn_backend=layout)
    with open_llm(model(), **options) as llm:
        before = usable(llm)
        for arm in SHORTENING:
            ask(llm, [prompt(n) for n in (20, 64, 100, 150)], arm, NEW_TOKENS)
            assert usable(llm) == before, arm
        blocks = llm.engine.scheduler.cache_manager.blocks
        assert not any(block.ref_count for block in blocks)


@pytest.mark.parametrize("is_caching", [True, False])
def test_blocks_are_free_while_the_request_runs(model, is_caching):
    with open_llm(model(), **PAGED | dict(enable_prefix_caching=is_caching)) as llm:
        before = usable(llm)
        request = add(llm.engine, prompt(150), "last32", NEW_TOKENS)
        llm.engine.step()
        # 36 rows in 3 blocks, in place of 150 in 10.
        assert len(request.block_table) == request.num_blocks == 3
        assert usable(llm) == before - 3
        freed = figures(llm, "last32")["bytes_freed"]
        assert freed == 7 * BLOCK * 4 * 2 * 2 * 16 * 4
        run(llm.engine, [request])
        assert usable(llm) == before


def test_no_room(model, answers):
    """The prompt's blocks are published and no other is free: it stays as it is."""
    text = prompt(100)
    with open_llm(model(), **PAGED | dict(num_blocks=8)) as llm:
        for times in (1, 2):
            (found,) = ask(llm, text, "last32", NEW_TOKENS)
            expect(found, answers(model(), text, NEW_TOKENS))
            assert figures(llm, "last32")["commits"] == 0
            assert figures(llm, "last32")["fallbacks"] == {"no_room": times}
        assert usable(llm) == 8


def test_in_place_without_room(model, answers):
    """As before, but nothing is published: the blocks are the request's own."""
    text = prompt(100)
    with open_llm(model(), **PAGED | dict(num_blocks=8, enable_prefix_caching=False)) as llm:
        (found,) = ask(llm, text, "last32", NEW_TOKENS)
        expect(found, answers(model(), text, NEW_TOKENS, KEEPS["last32"], block=BLOCK))
        assert figures(llm, "last32")["commits"] == 1


@pytest.mark.parametrize("is_caching", [True, False])
def test_more_requests_fit(model, answers, is_caching):
    texts = [prompt(200, seed) for seed in range(5)]
    most = {}
    options = PAGED | dict(num_blocks=36, enable_prefix_caching=is_caching)
    with open_llm(model(), **options) as llm:
        for arm in ("none", "last32"):
            asked = [add(llm.engine, text, arm, NEW_TOKENS) for text in texts]
            most[arm] = 0
            while not all(request.is_finished() for request in asked):
                llm.engine.step()
                running = sum(bool(request.generated_token_ids) for request in asked)
                running -= sum(request.is_finished() for request in asked)
                most[arm] = max(most[arm], running)
            for request, text in zip(asked, texts):
                keep = KEEPS.get(arm)
                expect(
                    request.generated_token_ids,
                    answers(model(), text, NEW_TOKENS, keep, block=BLOCK),
                    arm,
                )
        assert usable(llm) == 36
    assert most == {"none": 2, "last32": 5}


@pytest.mark.parametrize("arm", ["last32", "every"])
def test_promised_room(model, answers, arm):
    """InfiniLM admits requests by the blocks that they may still need: where an original is shared, and not freed,
    compression takes none of those."""
    stem = prompt(80)
    with open_llm(model(), **PAGED | dict(num_blocks=19)) as llm:
        plain = add(llm.engine, stem, "none", 100)
        llm.engine.step()
        other = add(llm.engine, stem + "!", arm, 100)
        llm.engine.step()
        assert other.generated_token_ids
        run(llm.engine, [plain, other])
        expect(plain.generated_token_ids, answers(model(), stem, 100))
        assert usable(llm) == 19


def test_blocks_that_others_use_are_no_gain(model, answers):
    """Compressing one of two that share nearly all their blocks would take fresh ones and free hardly any: it stays. Once
    the other has ended, the same prompt is compressed."""
    stem = prompt(80)
    text = stem + "!"
    with open_llm(model(), **PAGED) as llm:
        plain = add(llm.engine, stem, "none", 30)
        llm.engine.step()
        (found,) = ask(llm, text, "last32", NEW_TOKENS)
        assert not plain.is_finished()
        expect(found, answers(model(), text, NEW_TOKENS))
        assert figures(llm, "last32")["fallbacks"] == {"no_gain": 1}
        run(llm.engine, [plain])
        (found,) = ask(llm, text, "last32", NEW_TOKENS)
        expect(found, answers(model(), text, NEW_TOKENS, KEEPS["last32"], block=BLOCK))
        assert figures(llm, "last32")["commits"] == 1
