"""SnapKV's scores (arXiv 2404.14469) in Triton: what one would write by hand beside kvhook.

Two passes over K, since the columns of a softmax can be summed only when its rows' sums are known. All query rows of
a KV head go through one product, so K is read once for all heads of a group; products run on the tensor cores, and
the softmax is in base 2. Scores are the mean over the window's queries and the group's heads, before pooling.
"""

import math

import torch
import triton
import triton.language as tl

ROWS = 128
KEYS = 128


@triton.jit
def row_sums(
    q,
    k,
    best,
    total,
    tokens,
    rows,
    window,
    scale,
    per_split,
    splits: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    head, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = block * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DIM)
    queries = tl.load(q + (head * rows + row[:, None]) * DIM + channel[None, :], mask=row[:, None] < rows, other=0.0)
    last = tokens - window + row % window
    m = tl.full((ROWS,), -1e30, tl.float32)
    s = tl.zeros((ROWS,), tl.float32)
    start = split * per_split
    for first in range(start, tl.minimum(start + per_split, tokens), KEYS):
        key = first + tl.arange(0, KEYS)
        keys = tl.load(
            k + (head.to(tl.int64) * tokens + key[None, :]) * DIM + channel[:, None],
            mask=key[None, :] < tokens,
            other=0.0,
        )
        logits = tl.dot(queries, keys) * scale
        if first + KEYS > tokens - window:
            logits = tl.where(key[None, :] <= last[:, None], logits, -1e30)
        higher = tl.maximum(m, tl.max(logits, 1))
        s = s * tl.exp2(m - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        m = higher
    at = (head * rows + row) * splits + split
    tl.store(best + at, m, mask=row < rows)
    tl.store(total + at, s, mask=row < rows)


@triton.jit
def merge(best, total, sums, rows, splits: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * splits + tl.arange(0, splits)[None, :]
    m = tl.load(best + at, mask=row[:, None] < rows, other=0.0)
    s = tl.load(total + at, mask=row[:, None] < rows, other=1.0)
    highest = tl.max(m, 1)
    tl.store(sums + row, highest + tl.log2(tl.sum(s * tl.exp2(m - highest[:, None]), 1)), mask=row < rows)


@triton.jit
def column_sums(
    q, k, sums, out, tokens, rows, window, scale, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    head, tile = tl.program_id(1), tl.program_id(0)
    key = tile * KEYS + tl.arange(0, KEYS)
    channel = tl.arange(0, DIM)
    keys = tl.load(
        k + (head.to(tl.int64) * tokens + key[None, :]) * DIM + channel[:, None], mask=key[None, :] < tokens, other=0.0
    )
    sum_ = tl.zeros((KEYS,), tl.float32)
    for block in range(0, rows, ROWS):
        row = block + tl.arange(0, ROWS)
        queries = tl.load(
            q + (head * rows + row[:, None]) * DIM + channel[None, :], mask=row[:, None] < rows, other=0.0
        )
        lse = tl.load(sums + head * rows + row, mask=row < rows, other=1e30)
        weights = tl.exp2(tl.dot(queries, keys) * scale - lse[:, None])
        if tile * KEYS + KEYS > tokens - window:
            weights = tl.where(key[None, :] <= (tokens - window + row % window)[:, None], weights, 0.0)
        sum_ += tl.sum(weights, 0)
    tl.store(out + head * tokens + key, sum_ / rows, mask=key < tokens)


def scores(queries, keys, window):
    """Scores [kv_heads, tokens] in f32.

    Of queries [kv_heads, group * window, dim], a head's window together, and keys [kv_heads, tokens, dim].
    """
    heads, rows, dim = queries.shape
    tokens = keys.shape[1]
    scale = math.log2(math.e) / math.sqrt(dim)
    splits = 16
    per_split = triton.cdiv(triton.cdiv(tokens, splits), KEYS) * KEYS
    best, total = (torch.empty(heads * rows, splits, device=keys.device) for _ in range(2))
    sums = torch.empty(heads * rows, device=keys.device)
    out = torch.empty(heads, tokens, device=keys.device)
    blocks = triton.cdiv(rows, ROWS)
    row_sums[(heads, blocks, splits)](
        queries,
        keys,
        best,
        total,
        tokens,
        rows,
        window,
        scale,
        per_split,
        splits,
        dim,
        ROWS,
        KEYS,
        num_warps=8,
        num_stages=3,
    )
    merge[(triton.cdiv(heads * rows, 32),)](best, total, sums, heads * rows, splits, 32)
    column_sums[(triton.cdiv(tokens, KEYS), heads)](
        queries, keys, sums, out, tokens, rows, window, scale, dim, ROWS, KEYS, num_warps=8, num_stages=3
    )
    return out


def reference(queries, keys, window):
    """The same in PyTorch, f32."""
    rows, tokens = queries.shape[1], keys.shape[1]
    logits = queries.float() @ keys.float().transpose(1, 2) / math.sqrt(keys.shape[2])
    last = tokens - window + torch.arange(rows, device=keys.device) % window
    hidden = torch.arange(tokens, device=keys.device)[None, :] > last[:, None]
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).mean(1)
