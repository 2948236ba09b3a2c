"""Merged rows in torch: the formulas of docs/plugins/mlp-decouple.md with the trained weights, by their names in the file.
Nothing of kvhook is used."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

_TRAINED = Path(__file__).resolve().parents[4] / "plugins" / "mlp-decouple" / "trained"


def trained(factor: int) -> Path:
    """The weights that ship for SmolLM2-135M-Instruct."""
    return _TRAINED / f"smollm2-135m-f{factor}.safetensors"


@dataclass(frozen=True)
class Merge:
    """Groups of `factor` tokens between the first `sinks` and the last `recent` ones become a row each."""

    factor: int
    every: int = 0
    sinks: int = 4
    recent: int = 32
    block_size: int = 1
    """Of a paged cache: what frees no whole block is left as it is."""

    def rows(self, seen: int, length: int) -> int:
        """Rows that stay of `length`."""
        rows = length - self._groups(seen, length)[1] * (self.factor - 1)
        freed = -(-length // self.block_size) - -(-rows // self.block_size)
        return rows if freed else length

    def compressed(self, layer: int, part: str, rows: torch.Tensor, seen: int) -> torch.Tensor:
        """Rows of K or V afterwards, from those of before, `[kv heads, rows, dim]`; `part` is `k` or `v`."""
        heads, length, dim = rows.shape
        done, groups = self._groups(seen, length)
        first = self.sinks + done
        last = first + groups * self.factor
        x = rows[:, first:last].reshape(heads, groups, self.factor * dim)
        weights, name = _weights(self.factor), f"layers.{layer}.text_{part}"
        for step in range(3):
            x = torch.nn.functional.linear(
                x, weights[f"{name}.{step}.weight"], weights[f"{name}.{step}.bias"]
            )
            if step < 2:
                x = x.relu()
        return torch.cat([rows[:, :first], x, rows[:, last:]], dim=1)

    def _groups(self, seen: int, length: int) -> tuple[int, int]:
        """How many are merged already, and how many are due."""
        done = (seen - length) // (self.factor - 1)
        return done, max(0, seen - self.recent - self.sinks) // self.factor - done


@functools.cache
def _weights(factor: int) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(trained(factor)).items()}
