"""Cache tensors in numpy that look like InfiniCore's, to the adapter."""

from types import SimpleNamespace

import numpy as np

from kvhook_infinilm.model import RankModel
from kvhook_infinilm.native import sized
from kvhook_infinilm.views import CacheKind, RankCache


class DType:
    """Prints as InfiniCore's dtypes do."""

    def __init__(self, name):
        self._name = name

    def __repr__(self):
        return f"infinicore.{self._name}"


class Tensor:
    """A numpy array with InfiniCore's names; None: the null handle of a layer without a cache."""

    def __init__(self, array):
        self.array = array
        self._underlying = array is not None
        if array is not None:
            self.shape = list(array.shape)
            self.dtype = DType(str(array.dtype))
            self.device = SimpleNamespace(type="cpu")

    def stride(self):
        return [stride // self.array.itemsize for stride in self.array.strides]

    def data_ptr(self):
        return self.array.ctypes.data

    def numel(self):
        return self.array.size


CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
"""A model of 4 query heads, 2 KV heads and 8 channels."""


def cache(kind: CacheKind, outer: int, tokens: int, layers: int = 3, empty=(), ranks=1, seed=0):
    """`RankCache` of random rows for each rank, and the arrays behind them."""
    random = np.random.default_rng(seed)
    heads = 2 // ranks
    shape = (2, outer, tokens, heads, 8) if kind.token_major else (2, outer, heads, tokens, 8)
    found = []
    for _ in range(ranks):
        tensors = [
            Tensor(None if layer in empty else random.standard_normal(shape, dtype=np.float32))
            for layer in range(layers)
        ]
        found.append(RankCache(tensors, kind))
    return found


def models(caches):
    """`RankModel` of each rank."""
    return [RankModel(CONFIG, rank, len(caches), each) for rank, each in enumerate(caches)]


def offers(can: int, block_size: int):
    """`KvhOffers`."""
    return sized("KvhOffers", can=can, block_size=block_size)
