"""The independent reference: Hugging Face's model in float32, its cache gathered by hand, greedy.

What is kept is computed here from the formulas of docs/plugins/truncate.md, in torch, what is merged in merge.py; positions
go on from where they were. Nothing of kvhook is used.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from .merge import Merge

_LONGEST_WINDOW = 64


@dataclass(frozen=True)
class Keep:
    """What is kept of each layer and kv head. `budget` rows, or the share `keep` of the tokens so far."""

    budget: int = 0
    keep: float = 0.0
    importance: str | None = None
    """None: sinks and the most recent rows; `key_diff`; `attention`."""
    every: int = 0
    sinks: int = 4
    recent: int = 32
    window: int = 64
    pool: int = 5
    block_size: int = 1
    """Of a paged cache: what frees no whole block is left as it is."""

    def rows(self, seen: int, length: int) -> int:
        """Rows that stay of `length`."""
        rows = min(length, self.budget or max(1, int(seen * self.keep)))
        freed = -(-length // self.block_size) - -(-rows // self.block_size)
        return rows if freed else length


@dataclass
class Answer:
    """Tokens that the reference writes."""

    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """For each token how far its logit is above the next best."""


def kept_rows(keep: Keep, count: int, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Which `count` rows of a layer stay, ascending, `[kv heads, count]`.

    Args:
        keys: After RoPE, `[kv heads, rows, dim]`.
        queries: Of the last positions, after RoPE, `[query heads, positions, dim]`.
    """
    heads, length, _ = keys.shape
    recent = max(keep.recent, keep.window) if keep.importance == "attention" else keep.recent
    if keep.importance is None:
        recent = count
    sinks = min(keep.sinks, count)
    recent = min(recent, count - sinks)
    guard = [*range(sinks), *range(length - recent, length)]
    rows = torch.tensor(guard).expand(heads, -1)
    chosen = count - len(guard)
    if chosen:
        scores = _scores(keep, keys, queries)
        history = scores[:, sinks : length - recent]
        # Of equal scores the lower row.
        order = history.sort(dim=-1, descending=True, stable=True).indices[:, :chosen] + sinks
        rows = torch.cat([rows, order], dim=-1)
    return rows.sort(dim=-1).values


def _scores(keep: Keep, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    if keep.importance == "key_diff":
        directions = keys / keys.norm(dim=-1, keepdim=True)
        mean = directions.mean(dim=1, keepdim=True)
        return -(directions * (mean / mean.norm(dim=-1, keepdim=True))).sum(dim=-1)
    heads, length, dim = keys.shape
    window = min(keep.window, length)
    queries = queries[:, -window:].reshape(heads, -1, window, dim)
    logits = queries @ keys[:, None].transpose(-1, -2) / dim**0.5
    future = torch.ones(window, length, dtype=torch.bool).triu(length - window + 1)
    weights = logits.masked_fill(future, float("-inf")).softmax(dim=-1).mean(dim=(1, 2))
    before = weights[:, : length - window]
    pooled = torch.nn.functional.avg_pool1d(
        before[:, None], keep.pool, stride=1, padding=keep.pool // 2, count_include_pad=True
    )[:, 0]
    # Rows of the window are always kept: their scores are not asked for.
    return torch.cat([pooled, torch.full((heads, window), float("inf"))], dim=-1)


class Reference:
    """One model."""

    def __init__(self, folder: Path):
        self._queries: dict[int, torch.Tensor] = {}
        # Names are the process's: a second reference has its own.
        name = f"kvhook_reference_{id(self)}"
        AttentionInterface.register(name, self._attention)
        AttentionMaskInterface.register(name, eager_mask)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._model.set_attn_implementation(name)
        self._prompt: tuple | None = None

    def answer(
        self,
        prompt: list[int],
        new_tokens: int,
        keep: Keep | Merge | None,
        restart_positions: bool = False,
    ) -> Answer:
        """Greedy decoding of so many tokens; an end-of-text token does not end it.

        Args:
            keep: None: everything.
            restart_positions: Positions go on from the cache's length, which is wrong.
        """
        with torch.inference_mode():
            logits, cache, queries = self._prefill(prompt)
            position = mark = len(prompt)
            if keep is not None:
                self._compress(cache, keep, position, queries)
            answer = Answer()
            while True:
                best = logits.topk(2)
                answer.tokens.append(int(best.indices[0]))
                answer.gaps.append(float(best.values[0] - best.values[1]))
                if len(answer.tokens) == new_tokens:
                    return answer
                at = cache.get_seq_length() if restart_positions else position
                logits = self._forward(answer.tokens[-1:], at, cache)
                position += 1
                if keep is not None and keep.every and position - mark >= keep.every:
                    self._compress(cache, keep, position, self._queries)
                    mark = position

    def _prefill(self, prompt: list[int]):
        """Logits, cache and queries after a prompt. The last prompt's are at hand."""
        if self._prompt is None or self._prompt[0] != prompt:
            cache = DynamicCache(config=self._model.config)
            logits = self._forward(prompt, 0, cache)
            self._prompt = prompt, logits, cache, dict(self._queries)
        _, logits, cache, queries = self._prompt
        return logits, copy.deepcopy(cache), queries

    def _forward(self, tokens: list[int], position: int, cache) -> torch.Tensor:
        positions = torch.arange(position, position + len(tokens))[None]
        output = self._model(
            torch.tensor([tokens]),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[0, -1]

    def _compress(
        self, cache, keep: Keep | Merge, seen: int, queries: dict[int, torch.Tensor]
    ) -> None:
        for index, layer in enumerate(cache.layers):
            keys = layer.keys[0]
            count = keep.rows(seen, keys.shape[1])
            if count == keys.shape[1]:
                continue
            if isinstance(keep, Merge):
                layer.keys = keep.compressed(index, "k", layer.keys[0], seen)[None]
                layer.values = keep.compressed(index, "v", layer.values[0], seen)[None]
                continue
            rows = kept_rows(keep, count, keys, queries[index])
            rows = rows[None, :, :, None].expand(-1, -1, -1, keys.shape[2])
            layer.keys = layer.keys.gather(2, rows)
            layer.values = layer.values.gather(2, rows)

    def _attention(self, module, query, key, value, mask, **more):
        # Views would keep whole prompts alive.
        self._queries[module.layer_idx] = query[0, :, -_LONGEST_WINDOW:].clone()
        return eager_attention_forward(module, query, key, value, mask, **more)
