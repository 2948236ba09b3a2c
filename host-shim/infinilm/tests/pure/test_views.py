"""Cache tensors are described so that the row formula finds every row."""

import numpy as np
import pytest

from kvhook_infinilm import native
from kvhook_infinilm.errors import Refused
from kvhook_infinilm.model import RankModel, check_served
from kvhook_infinilm.native import ffi
from kvhook_infinilm.views import CacheKind, RankCache

from pure.numpy_cache import CONFIG, Tensor, cache

KINDS = {
    "static": CacheKind(False),
    "paged": CacheKind(True, 4),
    "flash": CacheKind(True, 4, True),
}


def row(layer, rows, token, head):
    """The formula of kvhook.h, by hand."""
    block, offset = 0, token
    if layer.block_size:
        table = ffi.cast("int32_t *", layer.table.data)
        block, offset = table[token // layer.block_size], token % layer.block_size
    address = int(ffi.cast("uintptr_t", rows.base)) + (
        block * rows.stride_block + offset * rows.stride_token + head * rows.stride_head
    )
    assert rows.stride_element == 4
    return np.frombuffer(ffi.buffer(ffi.cast("char *", address), rows.head_dim * 4), np.float32)


@pytest.mark.parametrize("name", KINDS)
def test_every_row_is_found(name):
    kind = KINDS[name]
    [one] = cache(kind, outer=5, tokens=4 if kind.paged else 12)
    table = [3, 0, 4]
    view = one.view(11, table if kind.paged else None, row=0 if kind.paged else 2)
    for index, layer in enumerate(view.raw):
        assert (layer.layer, layer.length, layer.block_size) == (index, 11, kind.block_size)
        array = one.tensors[index].array
        for part, rows in enumerate((layer.k, layer.v)):
            for token in range(11):
                for head in range(2):
                    where = {
                        "static": (part, 2, head, token),
                        "paged": (part, table[token // 4], head, token % 4),
                        "flash": (part, table[token // 4], token % 4, head),
                    }[name]
                    assert np.array_equal(row(layer, rows, token, head), array[where])


def test_a_layer_without_a_cache_has_no_rows():
    [one] = cache(KINDS["paged"], outer=2, tokens=4, empty={1})
    view = one.view(4, [1])
    kinds = [layer.kind for layer in view.raw]
    full, linear = native.KVH_LAYER_FULL, native.KVH_LAYER_LINEAR
    assert kinds == [full, linear, full]
    assert view.raw[1].k.base == ffi.NULL
    assert one.row_bytes == 2 * (2 * 2 * 8 * 4)


@pytest.mark.parametrize(
    ("tensor", "kind", "message"),
    [
        (Tensor(np.zeros((3, 1, 4, 8), np.float32)), CacheKind(True, 4), "shape .*MLA"),
        (Tensor(np.zeros((2, 1, 2, 5, 8), np.float32)), CacheKind(True, 4), "blocks of 4 tokens"),
        (Tensor(np.zeros((2, 1, 2, 4, 8), np.int8)), CacheKind(False), "int8"),
        (Tensor(None), CacheKind(False), "no layer"),
    ],
)
def test_other_caches_are_refused_by_name(tensor, kind, message):
    with pytest.raises(Refused, match=message):
        RankCache([tensor], kind)


def test_a_model_is_described_by_rank():
    caches = cache(CacheKind(False), outer=1, tokens=8, ranks=2, empty={0})
    models = [RankModel(CONFIG, rank, 2, each) for rank, each in enumerate(caches)]
    heads = [(m.raw.rank, m.raw.ranks, m.raw.total_kv_heads, m.raw.first_kv_head) for m in models]
    assert heads == [(0, 2, 2, 0), (1, 2, 2, 1)]
    infos = ffi.cast("KvhLayerInfo *", models[1].raw.layers.data)
    found = [(infos[i].kind, infos[i].kv_heads, infos[i].q_heads) for i in range(3)]
    assert found == [(native.KVH_LAYER_LINEAR, 0, 0), (0, 1, 2), (0, 1, 2)]


def test_llama3_frequencies_are_those_of_the_closed_form():
    # Values of Llama-3.1-8B by its published parameters: short waves stay, long ones are divided by 8.
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = dict(CONFIG, rope_theta=500000.0, rope_scaling=scaling, head_dim=128)
    [one] = cache(CacheKind(False), outer=1, tokens=8)
    model = RankModel(config, 0, 1, one)
    assert (model.raw.rope_base, model.raw.rotary_dim) == (0.0, 128)
    frequencies = [model.raw.rope_frequencies[i] for i in range(64)]
    plain = [500000.0 ** (-i / 64) for i in range(64)]
    assert frequencies[0] == pytest.approx(1.0)
    assert frequencies[63] == pytest.approx(plain[63] / 8, rel=1e-6)
    assert all(p / 8 <= f * (1 + 1e-6) and f <= p * (1 + 1e-6) for f, p in zip(frequencies, plain))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "videonsa"}, "videonsa"),
        ({"text_config": {"model_type": "minicpm_sala"}}, "minicpm_sala"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
    ],
)
def test_models_with_an_attention_of_their_own_are_refused(config, message):
    with pytest.raises(Refused, match=message):
        check_served(config)
