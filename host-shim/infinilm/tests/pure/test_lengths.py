"""The tensors of a forward that tell lengths, for caches that are shorter than their positions."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from kvhook_infinilm.errors import KvhookError
from kvhook_infinilm.lengths import shorten

from pure.numpy_cache import Tensor


@pytest.fixture(autouse=True)
def infinicore(monkeypatch):
    """A module with what is used of InfiniCore."""

    def from_list(values, dtype):
        return Tensor(np.array(values, dtype))

    module = SimpleNamespace(from_list=from_list, int32=np.int32, int64=np.int64)
    monkeypatch.setitem(sys.modules, "infinicore", module)


def i32(*values):
    return Tensor(np.array(values, np.int32))


def test_lengths_shrink_and_nothing_that_was_given_is_edited():
    given = {
        "past_kv_lengths": i32(9, 19, 29),
        "total_kv_lengths": i32(10, 20, 30),
        "cu_seqlens": i32(0, 10, 30, 60),
        "position_ids": i32(9, 19, 29),
        "slot_mapping": "slots",
    }
    changed = shorten(given, [0, 15, 20])
    assert changed["past_kv_lengths"].array.tolist() == [9, 4, 9]
    assert changed["total_kv_lengths"].array.tolist() == [10, 5, 10]
    assert changed["cu_seqlens"].array.tolist() == [0, 10, 15, 25]
    assert changed["position_ids"] is given["position_ids"]
    assert changed["slot_mapping"] == "slots"
    assert given["total_kv_lengths"].array.tolist() == [10, 20, 30]


def test_a_batch_of_another_size_is_an_error():
    given = {"past_kv_lengths": i32(9), "total_kv_lengths": i32(10)}
    with pytest.raises(KvhookError, match="the step has 2 sequences"):
        shorten(given, [1, 0])


def test_another_dtype_is_an_error():
    given = {"past_kv_lengths": Tensor(np.array([9])), "total_kv_lengths": i32(10)}
    with pytest.raises(KvhookError, match="past_kv_lengths is of infinicore.int64"):
        shorten(given, [1])
