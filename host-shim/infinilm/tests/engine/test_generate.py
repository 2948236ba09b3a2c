"""`InferEngine.generate`: a batch without a scheduler."""

# isort: off
from engine import needs  # noqa: F401

# isort: on
import json

import pytest

import kvhook_infinilm
from kvhook_infinilm import adapter_of

from engine import engines
from engine.engines import Comparison, keep_of

NEW_TOKENS = 24
TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little."
)
BATCH = [
    list(text[start : start + 100].encode()) for start, text in ((0, TEXT), (31, TEXT), (62, TEXT))
]


def cache_config(kind: str, batch: int = len(BATCH)):
    from infinilm.cache import PagedKVCacheConfig, StaticKVCacheConfig

    if kind == "static":
        return StaticKVCacheConfig(max_batch_size=batch, max_cache_len=256)
    return PagedKVCacheConfig(num_blocks=64, block_size=16, max_batch_size=batch)


@pytest.fixture
def engine(kind, tiny_model, depth):
    """An `InferEngine` of the tiny Llama."""
    import infinicore
    from infinilm.distributed import DistConfig
    from infinilm.infer_engine import InferEngine
    from infinilm.modeling_utils import load_model_state_dict_by_file

    kvhook_infinilm.attach(json.dumps({"arms": engines.arms(depth)}), strict=True)
    model = str(tiny_model("llama"))
    engine = InferEngine(
        model,
        device=infinicore.device("cpu", 0),
        distributed_config=DistConfig(1),
        cache_config=cache_config(kind),
        attention_backend="paged-attn" if kind == "paged" else "default",
    )
    load_model_state_dict_by_file(engine, model, dtype=engine.dtype)
    return engine


@pytest.fixture(scope="module")
def tiny_answer(tiny_model):
    """The reference of the tiny Llama."""
    from engine.reference import Reference

    return Reference(tiny_model("llama")).answer


def generate(engine, ids, arm: str) -> list[list[int]]:
    """Tokens of each sequence of a batch."""
    import infinicore
    from infinilm.infer_engine import GenerationConfig

    config = GenerationConfig(max_new_tokens=NEW_TOKENS, top_k=1, stop_on_eos=False)
    config.kv_plugin = arm
    outputs = engine.generate(infinicore.from_list(ids, dtype=infinicore.int64), config)
    steps = [output.to_numpy().flatten().tolist() for output in outputs]
    return [list(sequence) for sequence in zip(*steps)]


def check(engine, kind, tiny_answer, batch, arm) -> None:
    comparison = Comparison()
    for ids, found in zip(batch, generate(engine, batch, arm)):
        comparison.add(found, tiny_answer(ids, NEW_TOKENS, keep_of(arm, kind)), arm)
    comparison.end()
    assert not adapter_of(engine).live


def test_a_batch_is_compressed_whole(engine, kind, tiny_answer):
    for arm in adapter_of(engine).arms():
        before = engines.figures(engine, arm)["commits"]
        check(engine, kind, tiny_answer, BATCH, arm)
        keep = keep_of(arm, kind)
        compresses = keep is not None and keep.rows(100, 100) < 100
        assert engines.figures(engine, arm)["commits"] - before == 3 * compresses
    check(engine, kind, tiny_answer, BATCH, "none")


def test_one_sequence(engine, kind, tiny_answer):
    engine.reset_cache(cache_config(kind, 1))
    check(engine, kind, tiny_answer, BATCH[:1], "last32")


def test_caches_are_fetched_again_after_a_reset(engine, kind, tiny_answer):
    check(engine, kind, tiny_answer, BATCH, "last32")
    engine.reset_cache(cache_config(kind))
    check(engine, kind, tiny_answer, BATCH, "last32")
    check(engine, kind, tiny_answer, BATCH, "none")


def test_an_unknown_arm_is_an_error(engine):
    with pytest.raises(ValueError, match="last32"):
        generate(engine, BATCH, "last33")
