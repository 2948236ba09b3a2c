"""Prefix caching beside compression: nothing of a compressed sequence is ever found by another."""

import numpy as np
import pytest

from standin import engines
from standin.engines import (
    CACHES,
    KEEPS,
    SHORTENING,
    add,
    ask,
    block_of,
    expect,
    figures,
    open_llm,
    prompt,
    run,
    usable,
)
from standin.model_files import byte_ids

NEW_TOKENS = 20


def check_published(llm, known) -> int:
    """Every published block holds what full attention computes for its tokens, on every rank; gives their number.

    Args:
        known: (prompt, the reference's answer without compression): whatever may be published is a prefix of one.
    """
    from infinilm.llm.prefix_cache import EMPTY_BLOCK_HASH, hash_block_tokens

    manager = llm.engine.scheduler.cache_manager
    size = manager.block_size
    contents = {}
    for text, answer in known:
        tokens = (byte_ids(text) + answer.tokens)[: len(answer.keys[0])]
        chain = EMPTY_BLOCK_HASH
        for first in range(0, len(tokens) - size + 1, size):
            chain = hash_block_tokens(tokens[first : first + size], chain)
            rows = slice(first, first + size)
            contents[chain] = [
                (keys[rows], values[rows]) for keys, values in zip(answer.keys, answer.values)
            ]
    ranks = llm.engine.model_runner.model_engine._caches
    for chain, blocks in manager.hash_to_block_ids.items():
        assert chain in contents, "published, but no tokens that full attention has seen"
        for block in blocks:
            for layer, (keys, values) in enumerate(contents[chain]):
                parts = [[c for c in rank if c][layer].read([block], size) for rank in ranks]
                for found, expected in zip(zip(*parts), (keys, values)):
                    found = np.concatenate(found).swapaxes(0, 1)
                    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    return sum(map(len, manager.hash_to_block_ids.values()))


def know(answers, folder, *texts):
    return [(text, answers(folder, text, NEW_TOKENS)) for text in texts]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cache", CACHES)
def test_the_same_prompt_twice(model, answers, cache, ranks):
    folder, text = model(), prompt(100)
    with open_llm(folder, ranks=ranks, **CACHES[cache]) as llm:
        for arm in SHORTENING:
            expected = answers(folder, text, NEW_TOKENS, KEEPS[arm], block=block_of(llm))
            for asked in (arm, arm, "none", arm):
                (found,) = ask(llm, text, asked, NEW_TOKENS)
                plain = answers(folder, text, NEW_TOKENS)
                expect(found, plain if asked == "none" else expected, f"{asked} of {arm}")
                if cache != "static":
                    assert check_published(llm, know(answers, folder, text)) >= 6


@pytest.mark.parametrize("cache", CACHES)
def test_a_prefix_of_both(model, answers, cache):
    folder = model()
    stem = prompt(80)
    one, other = stem + prompt(30, 1), stem + prompt(40, 2)
    with open_llm(folder, **CACHES[cache]) as llm:
        before = cache != "static" and usable(llm)
        for arm in SHORTENING:
            for text, asked in ((one, arm), (other, "none"), (one, "none"), (other, arm)):
                keep = KEEPS.get(asked)
                expected = answers(folder, text, NEW_TOKENS, keep, block=block_of(llm))
                (found,) = ask(llm, text, asked, NEW_TOKENS)
                expect(found, expected, f"{asked} of {arm}")
        if cache != "static":
            assert check_published(llm, know(answers, folder, one, other)) > 0
            assert usable(llm) == before


@pytest.mark.parametrize("cache", CACHES)
def test_an_answer_over_a_compressed_cache_is_no_prefix(model, answers, cache):
    """The next turn of a chat holds tokens that were computed over a compressed cache."""
    folder = model()
    text = prompt(90)
    with open_llm(folder, **CACHES[cache]) as llm:
        for arm in SHORTENING:
            asked = text + prompt(1, SHORTENING.index(arm))
            ids = (
                byte_ids(asked) + answers(folder, asked, 48, KEEPS[arm], block=block_of(llm)).tokens
            )
            ask(llm, asked, arm, 48)
            turn = engines.request(arm="none", ids=ids, new_tokens=NEW_TOKENS)
            llm.engine.add_request(turn)
            run(llm.engine, [turn])
            expect(turn.generated_token_ids, answers(folder, tuple(ids), NEW_TOKENS), arm)


def test_shared_while_all_run(model, answers):
    """Compressed and uncompressed requests share blocks at one time: those are not freed and never written."""
    folder = model()
    stem = prompt(80)
    texts = [stem + prompt(90 + n, n) for n in range(6)]
    arms = ["none", "last32", "last60", "none", "last32", "key_diff"]
    with open_llm(folder, **CACHES["paged"] | dict(max_batch_size=3)) as llm:
        before = usable(llm)
        ask(llm, stem + "!", "none", 1)
        asked = [add(llm.engine, text, arm, NEW_TOKENS) for text, arm in zip(texts, arms)]
        run(llm.engine, asked)
        for request, text, arm in zip(asked, texts, arms):
            plain = answers(folder, text, NEW_TOKENS)
            kept = answers(folder, text, NEW_TOKENS, KEEPS.get(arm), block=engines.BLOCK)
            # Kept whole, where too many of its blocks are in use by others.
            assert list(request.generated_token_ids) in (plain.tokens, kept.tokens), arm
        known = know(answers, folder, *texts, stem + "!")
        assert sum(figures(llm, arm)["commits"] for arm in set(arms) - {"none"}) >= 3
        assert check_published(llm, known) >= 5
        assert usable(llm) == before
