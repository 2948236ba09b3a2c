"""A tiny Llama on some ranks. Each token is computed by itself: its numbers do not depend on its batch, nor on whether
it is a token of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import weights


@dataclass
class Token:
    """One row of a forward."""

    id: int
    position: int
    where: object
    """Where its key and value are stored, for `cache.write`."""
    sequence: object
    """Whose rows it sees, for `cache.read`."""
    sees: int
    """How many rows, its own the last."""
    group: int
    """Index of its sequence in the batch."""


@dataclass
class Recurrence:
    """States of the linear layers of one forward."""

    pool: dict
    """(layer, index) to state; index 0 is the zero state."""
    begin: Sequence[int]
    """Index of the state that each sequence begins with."""
    end: Sequence[int]


class Rank:
    """One shard: some query and kv heads, and a part of the MLP."""

    def __init__(self, config: Mapping, whole: Mapping, rank: int, ranks: int):
        self.head_dim = config["head_dim"]
        # With fewer heads than ranks each rank has the same one.
        self.kv_heads = max(1, config["num_key_value_heads"] // ranks)
        self.group = config["num_attention_heads"] // ranks // self.kv_heads
        self._whole = whole
        self._part = rank, ranks
        self._has_all = ("k_proj", "v_proj") if config["num_key_value_heads"] < ranks else ()

    def rows(self, name: str) -> np.ndarray:
        """This rank's share of a matrix, by its rows."""
        if name.endswith(self._has_all):
            return self._whole[name]
        return self._share(self._whole[name], 0)

    def columns(self, name: str) -> np.ndarray:
        """By its columns."""
        return self._share(self._whole[name], 1)

    def _share(self, matrix: np.ndarray, axis: int) -> np.ndarray:
        rank, ranks = self._part
        return np.ascontiguousarray(np.split(matrix, ranks, axis=axis)[rank])


class Llama:
    """The model on all ranks."""

    def __init__(self, config: Mapping, ranks: int):
        self.kinds = weights.layer_types(config)
        self._weights = weights.make(config)
        self._epsilon = np.float32(config["rms_norm_eps"])
        self._frequencies = config["rope_theta"] ** (
            -np.arange(0, config["head_dim"], 2) / config["head_dim"]
        )
        self.ranks = [Rank(config, self._weights, rank, ranks) for rank in range(ranks)]
        self._shards = [self._shard(rank) for rank in self.ranks]

    def forward(
        self, tokens: Sequence[Token], caches: Sequence[Sequence], states: Recurrence | None
    ) -> list[np.ndarray]:
        """Logits after each token; `caches` by rank and layer."""
        found = [self._weights["embed_tokens"][token.id].copy() for token in tokens]
        for layer, kind in enumerate(self.kinds):
            name = f"layers.{layer}."
            inputs = [self._norm(row, name + "input_layernorm") for row in found]
            if kind == "full_attention":
                parts = [
                    self._attention(rank, layer, inputs, tokens, caches[rank][layer])
                    for rank in range(len(self.ranks))
                ]
                outputs = [sum(rows[1:], rows[0]) for rows in zip(*parts)]
            else:
                outputs = self._linear(layer, inputs, tokens, states)
            found = [row + more for row, more in zip(found, outputs)]
            for index, row in enumerate(found):
                row = self._norm(row, name + "post_attention_layernorm")
                for shard in self._shards:
                    gate = shard[name + "gate_proj"] @ row
                    inner = gate / (1 + np.exp(-gate)) * (shard[name + "up_proj"] @ row)
                    found[index] = found[index] + shard[name + "down_proj"] @ inner
        return [self._weights["lm_head"] @ self._norm(row, "norm") for row in found]

    def _shard(self, rank: Rank) -> dict[str, np.ndarray]:
        shard = {}
        for name in self._weights:
            last = name.rpartition(".")[2]
            if last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                shard[name] = rank.rows(name)
            elif last in ("o_proj", "down_proj"):
                shard[name] = rank.columns(name)
        return shard

    def _norm(self, row: np.ndarray, name: str) -> np.ndarray:
        return row / np.sqrt((row * row).mean() + self._epsilon) * self._weights[name]

    def _rotated(self, heads: np.ndarray, position: int) -> np.ndarray:
        angles = position * self._frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        first, second = np.split(heads, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _attention(self, rank: int, layer: int, inputs, tokens, cache) -> list[np.ndarray]:
        shape, shard, name = self.ranks[rank], self._shards[rank], f"layers.{layer}."
        queries = []
        for row, token in zip(inputs, tokens):
            q, k, v = (
                (shard[name + which] @ row).reshape(-1, shape.head_dim)
                for which in ("q_proj", "k_proj", "v_proj")
            )
            queries.append(self._rotated(q, token.position) / np.float32(shape.head_dim**0.5))
            cache.write(token.where, self._rotated(k, token.position), v)
        longest: dict[int, Token] = {}
        for token in tokens:
            if token.group not in longest or token.sees > longest[token.group].sees:
                longest[token.group] = token
        rows = {group: cache.read(one.sequence, one.sees) for group, one in longest.items()}
        outputs = []
        for query, token in zip(queries, tokens):
            keys, values = (each[:, : token.sees] for each in rows[token.group])
            heads = [
                _attend(one, keys[head // shape.group], values[head // shape.group])
                for head, one in enumerate(query)
            ]
            outputs.append(shard[name + "o_proj"] @ np.concatenate(heads))
        return outputs

    def _linear(self, layer: int, inputs, tokens, states: Recurrence) -> list[np.ndarray]:
        """A decaying sum of the inputs."""
        name = f"layers.{layer}."
        sums: dict[int, np.ndarray] = {}
        outputs = []
        for row, token in zip(inputs, tokens):
            if token.group not in sums:
                begin = states.begin[token.group]
                sums[token.group] = states.pool[layer, begin] if begin else np.zeros_like(row)
            decay = self._weights[name + "decay"]
            sums[token.group] = sums[token.group] * decay + row * (1 - decay)
            outputs.append(self._weights[name + "linear"] @ sums[token.group])
        for group, state in sums.items():
            states.pool[layer, states.end[group]] = state
        return outputs


def _attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    # Not by matrix products: how those add up depends on the number of rows.
    scores = (keys * query).sum(axis=-1)
    shares = np.exp(scores - scores.max())
    return (shares[:, None] * values).sum(axis=0) / shares.sum()
