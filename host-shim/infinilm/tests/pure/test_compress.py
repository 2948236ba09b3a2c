"""Sequences are compressed by the real host and `truncate`, over caches in numpy: the rows that stay are the right ones."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from kvhook_infinilm import native
from kvhook_infinilm.compress import Compression
from kvhook_infinilm.host import Host
from kvhook_infinilm.memory import BatchMemory, StaticMemory
from kvhook_infinilm.sequences import Tracked
from kvhook_infinilm.views import CacheKind

from pure.numpy_cache import cache, models, offers

PREFILL = native.KVHOOK_EVENT_PREFILL_DONE


def opened(caches, config, block_size=0):
    host = Host("test", models(caches), offers(0, block_size), [str(native.NATIVE)])
    form = json.dumps({"plugin": "truncate", "config": config})
    host.configure(form, native.KVHOOK_SOURCE_OPERATOR)
    return host


def begun(host, length, **fields):
    tracked = Tracked(host.begin("key", "", length, []), length, **fields)
    tracked.position = length
    return tracked


def arrays(caches):
    return [tensor.array.copy() for each in caches for tensor in each.tensors if tensor._underlying]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("empty", [(), (1,)])
def test_a_static_cache_keeps_sinks_and_recent_rows_in_place(ranks, empty):
    caches = cache(CacheKind(False), outer=1, tokens=64, ranks=ranks, empty=empty)
    host = opened(caches, "budget=20,sinks=4,recent=16")
    tracked = begun(host, 50)
    before = arrays(caches)
    assert Compression(host, caches).one(StaticMemory(), tracked, PREFILL, None)
    assert (tracked.length, tracked.position, tracked.dropped, tracked.compressed) == (
        20,
        50,
        30,
        True,
    )
    kept = [*range(4), *range(34, 50)]
    for was, now in zip(before, arrays(caches)):
        assert np.array_equal(now[..., :20, :], was[..., kept, :])
    host.close()


def test_whole_blocks_leave_the_table_and_nothing_moves():
    caches = cache(CacheKind(True, 4), outer=16, tokens=4)
    host = opened(caches, "budget=12,sinks=4,recent=8,align=block", block_size=4)
    tracked = begun(host, 32, blocks=[9, 8, 7, 6, 5, 4, 3, 2, 1])
    before = arrays(caches)
    assert Compression(host, caches).one(BatchMemory(4), tracked, PREFILL, None)
    assert tracked.length == 12
    # First, then the last two that were in use; those that left come again behind what follows.
    assert tracked.table[:3] == [9, 3, 2]
    assert sorted(tracked.table) == list(range(1, 10))
    assert all(np.array_equal(was, now) for was, now in zip(before, arrays(caches)))
    host.close()


def test_a_batch_is_compressed_as_a_whole_or_not_at_all():
    caches = cache(CacheKind(False), outer=2, tokens=64)
    host = opened(caches, "budget=20")
    before = arrays(caches)
    both = [(begun(host, 50, row=row), PREFILL) for row in range(2)]
    # The second is not live any more: the first stays, too.
    host.free(both[1][0].uid, native.KVH_FREE_CANCELLED)
    with pytest.raises(Exception, match="unknown_uid"):
        Compression(host, caches).together(StaticMemory(), both, None)
    assert [one.dropped for one, _ in both] == [0, 0]
    assert all(np.array_equal(was, now) for was, now in zip(before, arrays(caches)))

    both = [(begun(host, 50, row=row), PREFILL) for row in range(2)]
    assert Compression(host, caches).together(StaticMemory(), both, None)
    assert [one.length for one, _ in both] == [20, 20]
    host.close()


def test_a_plugin_that_keeps_leaves_every_byte():
    caches = cache(CacheKind(False), outer=1, tokens=64)
    host = opened(caches, "budget=1000")
    tracked = begun(host, 50)
    before = arrays(caches)
    assert not Compression(host, caches).one(StaticMemory(), tracked, PREFILL, None)
    assert not tracked.compressed
    assert all(np.array_equal(was, now) for was, now in zip(before, arrays(caches)))
    host.close()


def test_without_fresh_blocks_the_sequence_stays_and_the_reason_is_counted():
    caches = cache(CacheKind(True, 4), outer=16, tokens=4)
    host = opened(caches, "budget=10,sinks=2,recent=8", block_size=4)
    tracked = begun(host, 32, blocks=list(range(8)))
    before = arrays(caches)

    class Published(BatchMemory):
        """All rows are published, and no block is free."""

        def protected(self, tracked, length):
            return 0, length

    assert not Compression(host, caches).one(Published(4), tracked, PREFILL, None)
    assert all(np.array_equal(was, now) for was, now in zip(before, arrays(caches)))
    assert host.figures()["arms"]["default"]["fallbacks"] == {"no_room": 1}
    host.close()


def test_a_rank_that_cannot_follow_is_told_apart():
    from kvhook_infinilm.compress import SplitCommit

    caches = cache(CacheKind(False), outer=1, tokens=64, ranks=2)
    host = opened(caches, "budget=20")
    tracked = begun(host, 50)
    commit = host.commit

    def fails_on_the_second(rank, *arguments):
        if rank == 1:
            raise native_error()
        return commit(rank, *arguments)

    def native_error():
        from kvhook_infinilm.errors import HostError

        return HostError("kvhook_commit", 207, "view", "provoked")

    host.commit = fails_on_the_second
    with pytest.raises(SplitCommit) as caught:
        Compression(host, caches).one(StaticMemory(), tracked, PREFILL, None)
    assert caught.value.sequences == [tracked]
    host.close()


def test_growth_is_counted_from_the_last_question():
    began = SimpleNamespace(uid=1, on_prefill_done=True, grown_every=8)
    tracked = Tracked(began, prompt_length=10)
    assert tracked.event(10, True) == PREFILL
    tracked.position = tracked.mark = 10
    assert tracked.event(7, False) is None
    assert tracked.event(8, False) == native.KVHOOK_EVENT_GROWN
