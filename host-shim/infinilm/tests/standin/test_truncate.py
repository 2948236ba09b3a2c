"""What `truncate` keeps, and what attention then makes of it: the reference's tokens, over every cache."""

import pytest

from standin.engines import (
    CACHES,
    KEEPS,
    PAGED,
    SHORTENING,
    STATIC,
    ask,
    compare,
    expect,
    figures,
    open_llm,
    prompt,
)
from standin.model_files import HYBRID

LENGTHS = (20, 36, 37, 90, 150)
NEW_TOKENS = 24


def check(llm, answers, folder, arms=SHORTENING, lengths=LENGTHS, new_tokens=NEW_TOKENS) -> None:
    """Asks each arm for all prompts, together; those that the arm shortens must be shortened."""
    for arm in arms:
        shortened = compare(llm, answers, folder, arm, KEEPS[arm], lengths, new_tokens)
        assert figures(llm, arm)["commits"] >= shortened > 0


def test_what_is_kept_matters(model, answers):
    """Else equal tokens would show nothing."""
    for arm, keep in KEEPS.items():
        differ = 0
        for length in LENGTHS:
            plain, kept = (
                answers(model(), prompt(length), NEW_TOKENS, each).tokens for each in (None, keep)
            )
            differ += plain != kept
        assert differ >= 2, arm


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cache", CACHES)
def test_tokens(model, answers, cache, ranks):
    with open_llm(model(), ranks=ranks, **CACHES[cache]) as llm:
        check(llm, answers, model())


@pytest.mark.parametrize("layout", ["paged", "flash"])
@pytest.mark.parametrize("size,blocks", [(4, 600), (256, 24)])
def test_block_sizes(model, answers, layout, size, blocks):
    options = CACHES[layout] | dict(block_size=size, num_blocks=blocks)
    with open_llm(model(), **options) as llm:
        check(llm, answers, model(), lengths=(20, 36, 37, 90, 260, 600))


def test_long_answers(model, answers):
    """Compressed again and again, over blocks that end and begin."""
    for options in (STATIC, PAGED | dict(block_size=4, num_blocks=300)):
        with open_llm(model(), **options) as llm:
            check(llm, answers, model(), ("every", "every_key_diff"), (30, 70), 150)
            assert figures(llm, "every")["commits"] > 20


@pytest.mark.parametrize("is_caching", [True, False])
@pytest.mark.parametrize("layout", ["paged", "flash"])
def test_whole_blocks(model, answers, layout, is_caching):
    """`align=block` edits the table and moves nothing."""
    options = CACHES[layout] | dict(enable_prefix_caching=is_caching)
    with open_llm(model(), ["aligned"], **options) as llm:
        check(llm, answers, model(), ["aligned"], lengths=(40, 90, 150))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("layout", ["paged", "flash"])
def test_layers_without_cache(model, answers, layout, ranks):
    """A hybrid: its linear layers have no cache tensor, and none of their state is touched."""
    folder = model(**HYBRID)
    options = CACHES[layout] | dict(enable_prefix_caching=False)
    with open_llm(folder, ranks=ranks, **options) as llm:
        check(llm, answers, folder)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("heads", [1, 4])
def test_head_counts(model, answers, heads, ranks):
    """Multi-query and multi-head attention; one head on two ranks is on both."""
    folder = model(num_key_value_heads=heads, seed=2)
    for options in (STATIC, PAGED):
        with open_llm(folder, ranks=ranks, **options) as llm:
            check(llm, answers, folder, ("last32", "key_diff"))


def test_restarted_positions_would_be_noticed(model, answers):
    text = prompt(150)
    restarted = answers(model(), text, NEW_TOKENS, KEEPS["last32"], restart_positions=True)
    with open_llm(model(), **STATIC) as llm:
        (found,) = ask(llm, text, "last32", NEW_TOKENS)
    assert found != restarted.tokens
    with pytest.raises(AssertionError):
        expect(found, restarted)


def test_freed_room_serves_longer_answers(model, answers):
    """Of a static cache: up to the model's last position."""
    text = prompt(90)
    with open_llm(model(), cache_type="static", max_cache_len=100) as llm:
        assert len(ask(llm, text, "none", 60)[0]) == 11
        (found,) = ask(llm, text, "last32", 60)
        expect(found, answers(model(), text, 60, KEEPS["last32"]))
        assert len(ask(llm, text, "none", 60)[0]) == 11
    folder = model(max_position_embeddings=128)
    with open_llm(folder, cache_type="static", max_cache_len=100) as llm:
        (found,) = ask(llm, text, "last32", 60)
        assert found == answers(model(), text, 60, KEEPS["last32"]).tokens[: 128 - 90 + 1]
