"""The independent reference: no cache is ever shortened. All keys and values stay, and a mask says which of them each
head still sees; a merged row takes the place of its group's last one. In float64, whole matrices at a time, with the true
positions.

What is kept follows docs/plugins/truncate.md, what is merged docs/plugins/mlp-decouple.md; nothing of kvhook is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from . import weights
from .mlps import Merge


@dataclass(frozen=True)
class Keep:
    """What is kept of each layer and kv head: `budget` rows, or the share `keep` of the tokens so far."""

    budget: int = 0
    keep: float = 0.0
    key_diff: bool = False
    """Rows between sinks and recent ones by `key_diff`, else only recent ones."""
    every: int = 0
    sinks: int = 4
    recent: int = 32
    align: bool = False
    """The two ranges grow to whole blocks."""

    def count(self, seen: int, length: int, block: int = 1) -> int:
        """Rows that stay of `length`; all where no whole block of so many tokens would become free."""
        count = min(length, self.budget or max(1, int(seen * self.keep)))
        return count if -(-count // block) < -(-length // block) else length


@dataclass
class Answer:
    """Tokens that the reference writes."""

    tokens: list[int] = field(default_factory=list)
    gap: float = np.inf
    """The nearest that the best logit ever came to the next best."""
    keys: list[np.ndarray] = field(default_factory=list)
    """Of each layer of full attention, `[tokens, kv heads, head dim]`, after RoPE."""
    values: list[np.ndarray] = field(default_factory=list)


class Reference:
    """One model."""

    def __init__(self, config: Mapping):
        self._config = config
        self._kinds = weights.layer_types(config)
        self._weights = {name: w.astype(np.float64) for name, w in weights.make(config).items()}

    def answer(
        self,
        prompt: list[int],
        new_tokens: int,
        keep: Keep | Merge | None = None,
        block: int = 1,
        restart_positions: bool = False,
    ) -> Answer:
        """Greedy decoding of so many tokens; an end-of-text token does not end it.

        Args:
            keep: None: everything.
            block: Tokens of a block of the cache; 1 for a static one.
            restart_positions: Positions go on from the number of kept rows, which is wrong.
        """
        run = _Run(self._config, self._kinds, self._weights)
        logits = run.forward(prompt, 0)
        seen = mark = len(prompt)
        if keep is not None:
            run.compress(keep, seen, block)
        answer = Answer()
        while True:
            best = np.argsort(-logits)[:2]
            answer.tokens.append(int(best[0]))
            answer.gap = min(answer.gap, logits[best[0]] - logits[best[1]])
            if len(answer.tokens) == new_tokens:
                answer.keys, answer.values = list(run.keys.values()), list(run.values.values())
                return answer
            logits = run.forward(answer.tokens[-1:], run.kept if restart_positions else seen)
            seen += 1
            if keep is not None and keep.every and seen - mark >= keep.every:
                run.compress(keep, seen, block)
                mark = seen


class _Run:
    """One sequence."""

    def __init__(self, config: Mapping, kinds: list[str], weights: Mapping):
        self._config, self._kinds, self._weights = config, kinds, weights
        self._heads = config["num_key_value_heads"]
        self._dim = config["head_dim"]
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        self.keys = {i: np.zeros((0, self._heads, self._dim)) for i in full}
        self.values = {i: np.zeros((0, self._heads, self._dim)) for i in full}
        self._seen_by = {i: np.zeros((self._heads, 0), dtype=bool) for i in full}
        self._sums = {i: np.zeros(config["hidden_size"]) for i in range(len(kinds))}

    @property
    def kept(self) -> int:
        """Rows that a head sees."""
        return int(next(iter(self._seen_by.values()))[0].sum())

    def forward(self, ids: list[int], position: int) -> np.ndarray:
        """Logits after the last of these tokens."""
        w = self._weights
        x = w["embed_tokens"][ids]
        for i, kind in enumerate(self._kinds):
            name = f"layers.{i}."
            normed = self._norm(x, w[name + "input_layernorm"])
            if kind == "full_attention":
                x = x + self._attention(i, normed, position)
            else:
                x = x + self._linear(i, normed)
            normed = self._norm(x, w[name + "post_attention_layernorm"])
            gate = normed @ w[name + "gate_proj"].T
            x = (
                x
                + (gate / (1 + np.exp(-gate)) * (normed @ w[name + "up_proj"].T))
                @ w[name + "down_proj"].T
            )
        return self._norm(x[-1], w["norm"]) @ w["lm_head"].T

    def compress(self, keep: Keep | Merge, seen: int, block: int) -> None:
        """From here on heads see only what is kept, and merged rows."""
        if isinstance(keep, Merge):
            self._merge(keep, seen, block)
        else:
            self._drop(keep, seen, block)

    def _merge(self, merge: Merge, seen: int, block: int) -> None:
        for i, sees in self._seen_by.items():
            # Of a group that was merged earlier only the last row is seen.
            groups = [group for group in merge.groups(seen) if sees[0, group].all()]
            length = sees[0].sum()
            count = length - len(groups) * (merge.factor - 1)
            if -(-count // block) == -(-length // block):
                continue
            for group in groups:
                for part, rows in enumerate((self.keys[i], self.values[i])):
                    rows[group.stop - 1] = merge.row(i, part, rows[group])
                sees[:, group.start : group.stop - 1] = False

    def _drop(self, keep: Keep, seen: int, block: int) -> None:
        for i, sees in self._seen_by.items():
            for head in range(self._heads):
                rows = sees[head].nonzero()[0]
                count = keep.count(seen, len(rows), block)
                if count == len(rows):
                    continue
                stay = kept_rows(keep, count, self.keys[i][rows, head], block)
                sees[head] = False
                sees[head, rows[stay]] = True

    def _attention(self, i: int, x: np.ndarray, position: int) -> np.ndarray:
        w, name, new = self._weights, f"layers.{i}.", len(x)
        q, k, v = (
            (x @ w[name + which].T).reshape(new, -1, self._dim)
            for which in ("q_proj", "k_proj", "v_proj")
        )
        self.keys[i] = np.concatenate([self.keys[i], self._rope(k, position)])
        self.values[i] = np.concatenate([self.values[i], v])
        self._seen_by[i] = np.concatenate(
            [self._seen_by[i], np.ones((self._heads, new), dtype=bool)], axis=1
        )
        total = len(self.keys[i])
        group = q.shape[1] // self._heads
        q = self._rope(q, position).reshape(new, self._heads, group, self._dim)
        scores = np.einsum("nhgd,thd->hgnt", q, self.keys[i]) / self._dim**0.5
        causal = np.tri(new, total, total - new, dtype=bool)
        sees = causal & self._seen_by[i][:, None, None, :]
        scores = np.where(sees, scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hgnt,thd->nhgd", shares, self.values[i]).reshape(new, -1)
        return mixed @ w[name + "o_proj"].T

    def _linear(self, i: int, x: np.ndarray) -> np.ndarray:
        decay = self._weights[f"layers.{i}.decay"]
        sums = []
        for row in x:
            self._sums[i] = decay * self._sums[i] + (1 - decay) * row
            sums.append(self._sums[i])
        return np.array(sums) @ self._weights[f"layers.{i}.linear"].T

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        mean = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + self._config["rms_norm_eps"]) * weight

    def _rope(self, heads: np.ndarray, position: int) -> np.ndarray:
        """Turns each pair of channels (j, j + dim / 2) by its angle, as complex numbers."""
        half = self._dim // 2
        speeds = self._config["rope_theta"] ** (-np.arange(half) / half)
        turns = np.exp(1j * np.outer(position + np.arange(len(heads)), speeds))[:, None]
        turned = (heads[..., :half] + 1j * heads[..., half:]) * turns
        return np.concatenate([turned.real, turned.imag], axis=-1)


def kept_rows(keep: Keep, count: int, keys: np.ndarray, block: int) -> list[int]:
    """Which `count` rows of a head stay, by its `keys` `[rows, dim]`."""
    length = len(keys)
    sinks = min(keep.sinks, count)
    recent = min(keep.recent if keep.key_diff else count, count - sinks)
    if keep.align:
        front, back = -(-sinks // block) * block, (length - recent) // block * block
        return [*range(front), *range(back, length)]
    kept = {*range(sinks), *range(length - recent, length)}
    directions = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    mean = directions.mean(axis=0)
    likeness = directions @ mean / np.linalg.norm(mean)
    # The least alike first, of equal ones the lower row.
    history = sorted(range(sinks, length - recent), key=lambda row: (likeness[row], row))
    return sorted(kept | set(history[: count - len(kept)]))
