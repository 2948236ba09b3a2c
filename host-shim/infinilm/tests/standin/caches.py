"""The caches of one rank, as InfiniLM lays them out. What a GPU kernel would answer with rubbish or a crash fails here.

| kind | shape of a layer's tensor, K and V on the first axis |
| --- | --- |
| static | `[2, batch, kv_heads, tokens, head_dim]` |
| paged | `[2, blocks, kv_heads, block_size, head_dim]` |
| paged, flash-attn | `[2, blocks, block_size, kv_heads, head_dim]` |

Rows that were never written are NaN.
"""

from __future__ import annotations

import numpy as np

from . import core


class StaticCache:
    """Rows of one layer; a sequence is a row of the batch."""

    def __init__(self, config, kv_heads: int, head_dim: int, dtype: str):
        shape = (2, config.max_batch_size(), kv_heads, config.max_cache_len(), head_dim)
        self.array = core.full(shape, _unwritten(dtype), dtype)

    def write(self, where: tuple[int, int], k: np.ndarray, v: np.ndarray) -> None:
        """Stores a row `[kv_heads, head_dim]` at (sequence, row)."""
        sequence, row = where
        self.array.values[0, sequence, :, row] = k
        self.array.values[1, sequence, :, row] = v

    def read(self, sequence: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """K and V of the first rows, `[kv_heads, length, head_dim]`."""
        return _written(self.array.values[:, sequence, :, :length].copy(), f"sequence {sequence}")


class PagedCache:
    """Rows of one layer; a sequence is a table of blocks."""

    def __init__(self, config, kv_heads: int, head_dim: int, dtype: str, token_major: bool):
        self._size = config.block_size()
        self._blocks = config.num_blocks()
        inner = (self._size, kv_heads) if token_major else (kv_heads, self._size)
        self.array = core.full((2, self._blocks, *inner, head_dim), _unwritten(dtype), dtype)
        # The same memory, whatever its order: [2, blocks, block_size, kv_heads, head_dim].
        self._rows = self.array.values if token_major else self.array.values.swapaxes(2, 3)

    def write(self, slot: int, k: np.ndarray, v: np.ndarray) -> None:
        """Stores a row `[kv_heads, head_dim]` in a slot."""
        block, row = divmod(slot, self._size)
        assert 0 <= block < self._blocks, f"slot {slot} lies outside the cache"
        self._rows[0, block, row] = k
        self._rows[1, block, row] = v

    def read(self, table: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """K and V of the first rows, `[kv_heads, length, head_dim]`."""
        blocks = table[: -(-length // self._size)]
        assert len(blocks) * self._size >= length, f"{length} rows in the blocks {table}"
        assert all(0 <= block < self._blocks for block in blocks), f"blocks {table}"
        rows = self._rows[:, blocks]
        rows = rows.reshape(2, -1, *rows.shape[3:])[:, :length]
        return _written(np.ascontiguousarray(rows.swapaxes(1, 2)), f"blocks {table}")


def _unwritten(dtype: str) -> float:
    return np.nan if dtype.startswith("float") else 0


def _written(rows: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    missing = np.isnan(rows).any(axis=(0, 1, 3)).nonzero()[0]
    assert not missing.size, f"{where}: rows {missing.tolist()} were read and never written"
    return rows[0], rows[1]
