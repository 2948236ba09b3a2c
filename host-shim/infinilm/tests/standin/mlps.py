"""Random MLPs that make one row of each group, for the reference and as a weight file."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LAYERS, DIM = 4, 16
"""Of the model that they are for."""


@dataclass(frozen=True)
class Merge:
    """Which rows become one, and by which MLPs: docs/plugins/mlp-decouple.md, text only."""

    factor: int
    sinks: int = 4
    recent: int = 8
    every: int = 0

    def groups(self, seen: int) -> list[slice]:
        """Tokens of each group among `seen`."""
        count = max(0, seen - self.recent - self.sinks) // self.factor
        starts = [self.sinks + number * self.factor for number in range(count)]
        return [slice(start, start + self.factor) for start in starts]

    def count(self, seen: int, length: int, block: int = 1) -> int:
        """Rows of `length`, none of which is a merged one, that stay; all where no whole block of so many tokens would
        become free."""
        count = length - len(self.groups(seen)) * (self.factor - 1)
        return count if -(-count // block) < -(-length // block) else length

    def row(self, layer: int, part: int, rows: np.ndarray) -> np.ndarray:
        """The row `[heads, dim]` that stands for a group's `[factor, heads, dim]`; `part` is 0 for K, 1 for V."""
        x = rows.swapaxes(0, 1).reshape(rows.shape[1], -1)
        (w1, b1), (w2, b2), (w3, b3) = _mlps(self.factor)[layer][part]
        hidden = np.maximum(x @ w1.T + b1, 0)
        hidden = np.maximum(hidden @ w2.T + b2, 0)
        return hidden @ w3.T + b3

    def config(self, folder: Path) -> dict:
        """The plugin's; the weight file is written into a folder."""
        file = folder / f"random-f{self.factor}.bin"
        file.write_bytes(_version_1(self.factor))
        # A version 1 file says nothing of positions.
        numbers = dict(sinks=self.sinks, recent=self.recent, every=self.every)
        return {"weights": str(file), "positions": "logical", **numbers}


@functools.cache
def _mlps(factor: int) -> list[list[list[tuple[np.ndarray, np.ndarray]]]]:
    """Matrix `[out, in]` and bias of the three steps, of K and V, of each layer."""
    draw = np.random.default_rng(factor)

    def step(columns: int) -> tuple[np.ndarray, np.ndarray]:
        matrix = draw.standard_normal((DIM, columns)) * (2 / columns) ** 0.5
        return matrix.astype(np.float32), draw.standard_normal(DIM).astype(np.float32)

    return [[[step(factor * DIM), step(DIM), step(DIM)] for _ in "kv"] for _ in range(LAYERS)]


def _version_1(factor: int) -> bytes:
    """A weight file in float32, by the table of docs/mlp-weights.md."""
    magic, version, f32, min_groups, matrices = 0x4B56434D, 1, 2, 1, 6
    header = (magic, version, f32, 0, LAYERS, 0, DIM, factor * DIM, factor, min_groups, matrices, 0)
    parts = [struct.pack("<IIHHIIIIIIII", *header)]
    for layer in _mlps(factor):
        for matrix, bias in (step for part in layer for step in part):
            parts += [struct.pack("<III", *matrix.shape, 1), matrix.tobytes(), bias.tobytes()]
    return b"".join(parts)
