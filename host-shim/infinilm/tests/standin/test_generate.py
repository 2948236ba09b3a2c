"""`InferEngine.generate`: batches without a scheduler."""

import pytest

from kvhook_infinilm import adapter_of, figures
from kvhook_infinilm.errors import UnknownArm

from standin.engines import ARMS, KEEPS, SHORTENING, attach, expect, prompt
from standin.model_files import byte_ids

NEW_TOKENS = 20


def open_engine(folder, cache_config, ranks=1, backend="default", arms=ARMS, **options):
    """An `InferEngine` that is served."""
    import infinicore
    from infinilm.distributed import DistConfig
    from infinilm.infer_engine import InferEngine

    attach(arms)
    return InferEngine(
        str(folder),
        device=infinicore.device("cpu", 0),
        distributed_config=DistConfig(ranks),
        cache_config=cache_config,
        attention_backend=backend,
        **options,
    )


def generate(engine, texts, arm, new_tokens=NEW_TOKENS) -> list[list[int]]:
    """Tokens for each prompt; all have one length."""
    import infinicore
    from infinilm.infer_engine import GenerationConfig

    config = GenerationConfig(max_new_tokens=new_tokens, top_k=1, stop_on_eos=False)
    if arm is not None:
        config.kv_plugin = arm
    ids = infinicore.from_list([byte_ids(text) for text in texts], dtype=infinicore.int64)
    steps = [step.to_numpy().reshape(-1).tolist() for step in engine.generate(ids, config)]
    return [list(tokens) for tokens in zip(*steps)]


def static(batch):
    from infinilm.cache import StaticKVCacheConfig

    return StaticKVCacheConfig(batch, 400)


def paged(size=16):
    from infinilm.cache import PagedKVCacheConfig

    return PagedKVCacheConfig(1600 // size, size, 8)


def check(engine, answers, folder, block, reached, length=100, batch=3, arms=SHORTENING) -> None:
    """Asks each arm, and those that shorten nothing."""
    texts = [prompt(length, seed) for seed in range(batch)]
    for arm in (*arms, "none", "declines"):
        for text, found in zip(texts, generate(engine, texts, arm)):
            expect(found, answers(folder, text, NEW_TOKENS, KEEPS.get(arm), block=block), arm)
        if arm in arms:
            assert figures(engine)["arms"][arm]["commits"] >= batch
    counted = figures(engine)["arms"].values()
    assert sum(arm["hooks"]["on_free"]["calls"] for arm in counted) == len(reached)
    assert adapter_of(engine).live == {}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_static_batch(model, answers, reached, batch, ranks):
    engine = open_engine(model(), static(batch), ranks)
    check(engine, answers, model(), 1, reached, batch=batch)


@pytest.mark.parametrize("backend", ["default", "flash-attn"])
@pytest.mark.parametrize("size", [4, 16])
def test_paged_batch(model, answers, reached, size, backend):
    engine = open_engine(model(), paged(size), backend=backend)
    check(engine, answers, model(), size, reached)


def test_whole_blocks(model, answers, reached):
    engine = open_engine(model(), paged(16), arms=["aligned", "declines"])
    check(engine, answers, model(), 16, reached, length=150, arms=["aligned"])


def test_all_of_a_batch_or_none(model, answers, reached, monkeypatch):
    """One sequence of three cannot be committed: none is."""
    from kvhook_infinilm.host import Host

    engine = open_engine(model(), static(3))
    texts = [prompt(100, seed) for seed in range(3)]
    verdict, seen = Host.verdict, []

    def one_is_kept(self, ticket):
        seen.append(ticket)
        if len(set(seen)) == 2 and seen.count(ticket) == 1:
            self.drop(ticket, 1)
        return verdict(self, ticket)

    monkeypatch.setattr(Host, "verdict", one_is_kept)
    for text, found in zip(texts, generate(engine, texts, "last32")):
        expect(found, answers(model(), text, NEW_TOKENS))
    assert len(seen) >= 3 and figures(engine)["arms"]["last32"]["commits"] == 0
    monkeypatch.setattr(Host, "verdict", verdict)
    check(engine, answers, model(), 1, reached)


def test_after_reset_cache(model, answers, reached):
    """Caches lie elsewhere then, may have another size and be of another kind."""
    engine = open_engine(model(), static(3))
    check(engine, answers, model(), 1, reached)
    engine.reset_cache(static(2))
    check(engine, answers, model(), 1, reached, batch=2)
    # Another kind has another host, which begins to count anew.
    engine.reset_cache(paged())
    reached.clear()
    check(engine, answers, model(), 16, reached)
    engine.reset_cache(static(3))
    reached.clear()
    check(engine, answers, model(), 1, reached)


def test_engine_that_gets_its_cache_later(model, answers, reached):
    engine = open_engine(model(), None)
    assert not adapter_of(engine).on
    engine.reset_cache(static(2))
    check(engine, answers, model(), 1, reached, batch=2)


def test_unknown_arm(model):
    engine = open_engine(model(), static(1))
    with pytest.raises(UnknownArm):
        generate(engine, [prompt(8)], "nobody")
