"""`mlp-decouple`: the tokens of a reference that computes the merged rows itself, over every cache."""

import pytest

from kvhook_infinilm import adapter_of
from kvhook_infinilm.errors import HostError

from standin.engines import (
    BLOCK,
    CACHES,
    PAGED,
    STATIC,
    ask,
    compare,
    expect,
    figures,
    open_llm,
    prompt,
    usable,
)
from standin.mlps import Merge
from standin.test_generate import generate, open_engine, static

LENGTHS = (13, 20, 36, 37, 90, 151)
NEW_TOKENS = 24

MERGES = {
    "pairs": Merge(2),
    "fives": Merge(5, sinks=0, recent=0),
    "every": Merge(3, every=8),
}


@pytest.fixture(scope="module")
def form(tmp_path_factory) -> dict:
    """An arm for each of `MERGES`."""
    folder = tmp_path_factory.mktemp("weights")
    return {"arms": [one(name, merge.config(folder)) for name, merge in MERGES.items()]}


def one(name: str, config: dict) -> dict:
    """An arm."""
    return {"name": name, "plugin": "mlp-decouple", "config": config}


def check(llm, answers, folder, arms=MERGES, lengths=LENGTHS, new_tokens=NEW_TOKENS) -> None:
    """Asks each arm for all prompts, together; those that can be shortened must be."""
    for arm in arms:
        merge = MERGES[arm]
        shortened = compare(llm, answers, folder, arm, merge, lengths, new_tokens)
        commits = figures(llm, arm)["commits"]
        assert commits > shortened if merge.every else commits == shortened > 0


def test_what_is_merged_matters(model, answers):
    """Else equal tokens would show nothing."""
    for arm, merge in MERGES.items():
        for length in (37, 90, 151):
            text = prompt(length)
            plain = answers(model(), text, NEW_TOKENS)
            assert answers(model(), text, NEW_TOKENS, merge).tokens != plain.tokens, arm


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cache", CACHES)
def test_tokens(model, answers, form, cache, ranks):
    with open_llm(model(), form, ranks, **CACHES[cache]) as llm:
        check(llm, answers, model())


@pytest.mark.parametrize("layout", ["paged", "flash"])
@pytest.mark.parametrize("is_caching", [True, False])
def test_blocks(model, answers, form, layout, is_caching):
    """Rows into fresh blocks; all blocks come back."""
    options = CACHES[layout] | dict(block_size=4, num_blocks=600, enable_prefix_caching=is_caching)
    with open_llm(model(), form, **options) as llm:
        before = usable(llm)
        check(llm, answers, model())
        assert usable(llm) == before


def test_in_place_without_room(model, answers, form):
    """No block is free for the new rows: they go into the request's own."""
    text = prompt(100)
    options = PAGED | dict(num_blocks=8, enable_prefix_caching=False)
    with open_llm(model(), form, **options) as llm:
        (found,) = ask(llm, text, "pairs", NEW_TOKENS)
        expect(found, answers(model(), text, NEW_TOKENS, MERGES["pairs"], block=BLOCK))
        assert figures(llm, "pairs")["commits"] == 1


def test_long_answers(model, answers, form):
    """Merged again and again; no row twice."""
    for options in (STATIC, PAGED | dict(block_size=4, num_blocks=300)):
        with open_llm(model(), form, **options) as llm:
            check(llm, answers, model(), ["every"], (30, 70), 150)
            assert figures(llm, "every")["commits"] > 20


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("heads", [1, 4])
def test_head_counts(model, answers, form, heads, ranks):
    """Heads share the MLPs; one head on two ranks is on both."""
    folder = model(num_key_value_heads=heads, seed=2)
    for options in (STATIC, PAGED):
        with open_llm(folder, form, ranks, **options) as llm:
            check(llm, answers, folder, ["pairs", "fives"])


def test_a_batch(model, answers, form):
    """Of `InferEngine.generate`."""
    engine = open_engine(model(), static(3), arms=form)
    texts = [prompt(100, seed) for seed in range(3)]
    for arm, merge in MERGES.items():
        for text, found in zip(texts, generate(engine, texts, arm)):
            expect(found, answers(model(), text, len(found), merge), arm)


def check_refused(model, answers, reason: str, config: dict) -> None:
    """The engine goes on uncompressed and says why, and is not made at all where the operator is strict."""
    text, form = prompt(90), {"arms": [one("merge", config)]}
    with open_llm(model(), form, strict=False, **STATIC) as llm:
        adapter = adapter_of(llm)
        assert not adapter.on and reason in adapter.refused, adapter.refused
        expect(ask(llm, text, None, NEW_TOKENS)[0], answers(model(), text, NEW_TOKENS))
    with pytest.raises(HostError, match=reason), open_llm(model(), form, **STATIC):
        pass


def test_compacted_positions_are_refused(model, answers, tmp_path):
    """InfiniLM cannot move them."""
    config = MERGES["pairs"].config(tmp_path) | {"positions": "compacted"}
    check_refused(model, answers, "move_positions", config)


def test_some_layers_alone_are_refused(model, answers, tmp_path):
    """InfiniLM gives all layers one length."""
    config = MERGES["pairs"].config(tmp_path) | {"layers": "1-"}
    check_refused(model, answers, "layer_counts", config)


def test_weights_are_not_guessed(model, answers, tmp_path):
    config = MERGES["pairs"].config(tmp_path)
    check_refused(model, answers, "nowhere.bin", config | {"weights": "nowhere.bin"})
    check_refused(model, answers, "positions", config | {"positions": None})
    check_refused(model, answers, "factor", config | {"factor": 3})
    (tmp_path / "short.bin").write_bytes((tmp_path / "random-f2.bin").read_bytes()[:-4])
    check_refused(model, answers, "short.bin", config | {"weights": str(tmp_path / "short.bin")})


def test_weights_of_another_model_are_refused(model, answers, tmp_path):
    folder = model(head_dim=32)
    config = MERGES["pairs"].config(tmp_path)
    check_refused(lambda: folder, answers, "head_dim", config)
