"""Stands in for the module `_infinilm`: the engine below `infinilm.infer_engine.InferEngine`."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from .caches import PagedCache, StaticCache
from .core import Array
from .llama import Llama, Recurrence, Token


class CacheConfig:
    """Base of both."""


class StaticKVCacheConfig(CacheConfig):
    def __init__(self, max_batch_size: int = 1, max_cache_len: int = 0):
        self._max_batch_size, self._max_cache_len = max_batch_size, max_cache_len

    def max_batch_size(self) -> int:
        return self._max_batch_size

    def max_cache_len(self) -> int:
        return self._max_cache_len


class PagedKVCacheConfig(CacheConfig):
    def __init__(self, num_blocks: int, block_size: int = 256, max_batch_size: int = 1):
        self._num_blocks, self._block_size = num_blocks, block_size
        self._max_batch_size = max_batch_size

    def num_blocks(self) -> int:
        return self._num_blocks

    def block_size(self) -> int:
        return self._block_size

    def max_batch_size(self) -> int:
        return self._max_batch_size


class DistConfig:
    """How many ranks."""

    def __init__(self, devices: int | Sequence[int] = ()):
        self.tp_device_ids = list(range(devices)) if isinstance(devices, int) else list(devices)
        self.moe_ep_backend, self.moe_ep_size = "disabled", 1
        self.pp_size, self.pp_stage = 1, 0
        self.master_addr, self.master_port = "127.0.0.1", 29500


class Output:
    """What a forward gives."""

    def __init__(self, output_ids: Array, logits: Array):
        self.output_ids, self.logits = output_ids, logits


class Input:
    """What a forward takes: `Array`s, all of it optional."""

    _FIELDS = (
        "position_ids past_sequence_lengths total_sequence_lengths input_offsets cu_seqlens block_tables slot_mapping "
        "mamba_init_state_indices mamba_final_state_indices pixel_values image_bound tgt_sizes image_grid_thw "
        "image_req_ids visual_token_ranges target_hidden_states sample_all_positions temperature top_p top_k"
    ).split()

    def __init__(self, input_ids: Array, **fields):
        unknown = set(fields) - set(self._FIELDS)
        if unknown:
            raise ValueError(f"InferEngine.Input got an unexpected keyword argument {unknown}")
        self.input_ids = input_ids
        for name in self._FIELDS:
            setattr(self, name, fields.get(name))

    def list(self, name: str, dtype: str) -> list:
        """A field's elements."""
        array = getattr(self, name)
        assert array.dtype_name == dtype, f"{name} is of {array.dtype_name}, not {dtype}"
        return array.values.tolist()


class InferEngine:
    """The model with its caches, for all ranks on the caller's thread."""

    Input = Input

    def __init__(
        self,
        config_str: str,
        distributed_config: DistConfig,
        device_type: str,
        cache_config: CacheConfig | None = None,
        enable_graph_compiling: bool = False,
        attention_backend: str = "default",
        kv_cache_dtype: str | None = None,
        use_mla: bool = False,
        weight_load_mode: str = "async",
        pre_transpose: bool = False,
    ):
        config = json.loads(config_str)
        self._model = Llama(config, len(distributed_config.tp_device_ids) or 1)
        self._dtype = kv_cache_dtype or config["torch_dtype"]
        self._token_major = attention_backend == "flash-attn"
        self._has_worked = False
        InferEngine.reset_cache(self, cache_config)

    def reset_cache(self, cache_config: CacheConfig | None) -> None:
        """Fresh caches; those handed out before are gone."""
        self._cache_config = cache_config
        self._states: dict = {}
        self._caches = []
        if cache_config is not None:
            self._caches = [[self._cache(rank, k) for k in self._kinds] for rank in self._ranks]

    def get_cache_config(self) -> CacheConfig | None:
        return self._cache_config

    def get_kv_cache(self) -> list[list[Array]]:
        """For each rank the tensor of each layer."""
        assert self._has_worked, "InfiniLM waits for ever: its ranks have not done anything yet"
        return [[cache.array if cache else Array(None) for cache in rank] for rank in self._caches]

    def state_dict_keyname(self) -> list[str]:
        return []

    def load_params(self, params: dict, strict: bool = True) -> None:
        """The weights come from a seed: nothing is left to load."""
        assert not params
        self._has_worked = True

    def process_weights_after_loading(self) -> None:
        """They are as they should be."""

    def forward(self, given: Input) -> Output:
        """Computes the tokens and, for each sequence, the most likely next one."""
        self._has_worked = True
        paged = isinstance(self._cache_config, PagedKVCacheConfig)
        tokens = self._paged_tokens(given) if paged else self._static_tokens(given)
        states = None
        if given.mamba_init_state_indices is not None:
            begin, end = (
                given.list(f"mamba_{which}_state_indices", "int32") for which in ("init", "final")
            )
            states = Recurrence(self._states, begin, end)
        logits = self._model.forward(tokens, self._caches, states)
        ends = given.list("input_offsets", "int32")[1:]
        logits = np.array([logits[end - 1] for end in ends])
        return Output(Array(logits.argmax(axis=-1), "int64"), Array(logits, "float32"))

    @property
    def _kinds(self) -> list[str]:
        return self._model.kinds

    @property
    def _ranks(self) -> list:
        return self._model.ranks

    def _cache(self, rank, kind: str):
        if kind != "full_attention":
            return None
        shape = rank.kv_heads, rank.head_dim, self._dtype
        if isinstance(self._cache_config, PagedKVCacheConfig):
            return PagedCache(self._cache_config, *shape, self._token_major)
        return StaticCache(self._cache_config, *shape)

    def _static_tokens(self, given: Input) -> list[Token]:
        """The first sequence's lengths and positions are those of all."""
        ids = given.list("input_ids", "int64")
        past, total = self._lengths(given)
        batch, count = len(ids), len(ids[0])
        assert batch == self._cache_config.max_batch_size(), f"{batch} sequences"
        assert len(set(past)) == 1, f"past lengths {past}"
        assert total[0] == past[0] + count, f"{past} rows, {count} tokens, {total} in all"
        assert total[0] <= self._cache_config.max_cache_len(), f"{total} rows"
        positions = given.list("position_ids", "int64")[0]
        return [
            Token(ids[row][i], positions[i], (row, past[0] + i), row, past[0] + i + 1, group=row)
            for row in range(batch)
            for i in range(count)
        ]

    def _paged_tokens(self, given: Input) -> list[Token]:
        size = self._cache_config.block_size()
        (ids,) = given.list("input_ids", "int64")
        past, total = self._lengths(given)
        positions = given.list("position_ids", "int64")
        slots = given.list("slot_mapping", "int64")
        tables = given.list("block_tables", "int32")
        offsets = given.list("input_offsets", "int32")
        assert len(ids) == len(positions) == len(slots) == offsets[-1]
        assert len(past) == len(total) == len(tables) == len(offsets) - 1
        tokens, written = [], {}
        for group, (first, end) in enumerate(zip(offsets, offsets[1:])):
            for i in range(first, end):
                sees = total[group] - (end - 1 - i)
                block, row = divmod(sees - 1, size)
                own = tables[group][block] * size + row
                assert slots[i] == own, f"token {i} is stored in slot {slots[i]} and read in {own}"
                other = written.setdefault(slots[i] // size, group)
                assert other == group, f"sequences {other} and {group} write one block"
                tokens.append(Token(ids[i], positions[i], slots[i], tables[group], sees, group))
            assert total[group] == past[group] + end - first, f"{past} and {total} rows"
        for group, (table, length) in enumerate(zip(tables, total)):
            for block in table[: -(-length // size)]:
                writer = written.get(block, group)
                assert writer == group, f"{writer} writes block {block}, which {group} reads"
        return tokens

    def _lengths(self, given: Input) -> tuple[list[int], list[int]]:
        past, total = (
            given.list(f"{which}_sequence_lengths", "int32") for which in ("past", "total")
        )
        sums = given.list("cu_seqlens", "int32")
        assert sums == [sum(total[:i]) for i in range(len(total) + 1)], f"{sums} of {total}"
        return past, total


def contents() -> dict:
    """The module's names."""
    names = (CacheConfig, StaticKVCacheConfig, PagedKVCacheConfig, DistConfig, InferEngine)
    return {each.__name__: each for each in names}
