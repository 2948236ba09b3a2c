"""The tensors of a forward that tell lengths: new ones for sequences whose cache is shorter than their position.

InfiniLM derives length, slot and position from one number; RoPE takes the position, attention the length. Given tensors
are never edited: ranks and callers share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import KvhookError
from .native import ffi


def shorten(arguments: Mapping, dropped: Sequence[int]) -> dict:
    """`InferEngine.forward`'s keyword arguments with the lengths of shorter caches.

    Args:
        arguments: As the engine built them, from positions.
        dropped: Rows that each sequence lacks, in the order of the batch.

    Raises `KvhookError` for tensors that do not fit the batch.
    """
    past = read(arguments["past_kv_lengths"], "past_kv_lengths")
    total = read(arguments["total_kv_lengths"], "total_kv_lengths")
    if len(past) != len(dropped) or len(total) != len(dropped):
        raise KvhookError(
            f"past_kv_lengths has {len(past)} elements and total_kv_lengths {len(total)}; "
            f"the step has {len(dropped)} sequences"
        )
    total = [length - lost for length, lost in zip(total, dropped)]
    changed = dict(
        arguments,
        past_kv_lengths=tensor_i32([length - lost for length, lost in zip(past, dropped)]),
        total_kv_lengths=tensor_i32(total),
    )
    if arguments.get("cu_seqlens") is not None:
        changed["cu_seqlens"] = tensor_i32(running_sum(total))
    return changed


def running_sum(values: Sequence[int]) -> list[int]:
    """0 and the sums of ever more values."""
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def read(tensor, name: str) -> list[int]:
    """Elements of a one-dimensional int32 tensor in ordinary memory."""
    if repr(tensor.dtype) != "infinicore.int32" or tensor.device.type != "cpu":
        raise KvhookError(
            f"{name} is of {tensor.dtype!r} on {tensor.device}; expected int32 on the cpu"
        )
    return ffi.unpack(ffi.cast("int32_t *", tensor.data_ptr()), tensor.numel())


def tensor_i32(values: Sequence):
    """A new int32 tensor of a list, or of a list of lists."""
    import infinicore

    return infinicore.from_list(values, dtype=infinicore.int32)


def tensor_i64(values: Sequence):
    """A new int64 tensor of a list."""
    import infinicore

    return infinicore.from_list(values, dtype=infinicore.int64)
