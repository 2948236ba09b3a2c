"""Cache tensors of InfiniLM as the host sees them: `KvhLayer` arrays.

| cache | shape of a layer's tensor, K and V on the first axis |
| --- | --- |
| static | `[2, batch, kv_heads, tokens, head_dim]` |
| paged | `[2, blocks, kv_heads, block_size, head_dim]` |
| paged, flash-attn | `[2, blocks, block_size, kv_heads, head_dim]` |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import native
from .errors import Refused
from .native import ffi

_DTYPES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16)}
"""DLPack's code and bits."""


@dataclass(frozen=True)
class CacheKind:
    """What the engine was told about its cache."""

    paged: bool
    block_size: int = 0
    """Tokens of a block; 0 for a static cache."""
    token_major: bool = False
    """Blocks are `[block_size, kv_heads, head_dim]` (flash-attn)."""


@dataclass(frozen=True)
class LayerGeometry:
    """Where the rows of one layer are; strides in bytes."""

    k: int
    """Address of the first K row."""
    v: int
    stride_outer: int
    """From one block, or one sequence of a static batch, to the next."""
    stride_token: int
    stride_head: int
    kv_heads: int
    head_dim: int


class RankCache:
    """The cache of one rank. Holds its tensors, so that the addresses stay valid."""

    def __init__(self, tensors: Sequence, kind: CacheKind):
        """Reads the tensors' shapes; a layer without a tensor has no geometry.

        Raises `Refused` for a shape or dtype that is not in the table above.
        """
        self.kind = kind
        self.tensors = list(tensors)
        self.layers = len(self.tensors)
        self.geometry = [_geometry(tensor, kind) for tensor in self.tensors]
        used = [tensor for tensor in self.tensors if tensor._underlying]
        if not used:
            raise Refused("no layer of this rank has a cache tensor")
        self.key = used[0].data_ptr()
        self.device = used[0].device.type
        dtypes = {repr(tensor.dtype).removeprefix("infinicore.") for tensor in used}
        if len(dtypes) != 1 or (name := dtypes.pop()) not in _DTYPES:
            raise Refused(
                f"the cache is of {name if len(dtypes) == 0 else sorted(dtypes)}; expected float32, float16 or bfloat16"
            )
        self.dtype = _DTYPES[name]
        self.row_bytes = sum(
            2 * layer.kv_heads * layer.head_dim * self.dtype[1] // 8
            for layer in self.geometry
            if layer
        )
        """Bytes of one token's K and V in all layers."""
        self._template = self._describe()

    def view(self, length: int, table: Sequence[int] | None = None, row: int = 0) -> Layers:
        """The layers of one sequence.

        Args:
            length: Rows that are stored; for fresh rows, the room.
            table: Its blocks, for a paged cache.
            row: Its place in the batch, for a static cache.
        """
        return Layers(self, length, table, row)

    def _describe(self):
        code, bits = self.dtype
        layers = ffi.new("KvhLayer[]", self.layers)
        for index, (out, layer) in enumerate(zip(layers, self.geometry)):
            out.struct_size = ffi.sizeof("KvhLayer")
            out.layer = index
            out.shared_with = -1
            if layer is None:
                out.kind = native.KVH_LAYER_LINEAR
                continue
            out.kind = native.KVH_LAYER_FULL
            out.kv_heads = layer.kv_heads
            out.block_size = self.kind.block_size
            for rows, base in ((out.k, layer.k), (out.v, layer.v)):
                rows.base = ffi.cast("void *", base)
                rows.stride_block = layer.stride_outer if self.kind.paged else 0
                rows.stride_token = layer.stride_token
                rows.stride_head = layer.stride_head
                rows.stride_element = bits // 8
                rows.head_dim = layer.head_dim
                rows.dtype.code, rows.dtype.bits, rows.dtype.lanes = code, bits, 1
        return layers


class Layers:
    """`KvhLayer[]` of one sequence on one rank, with the table that it points to."""

    def __init__(self, cache: RankCache, length: int, table: Sequence[int] | None, row: int):
        self.raw = ffi.new("KvhLayer[]", cache.layers)
        ffi.memmove(self.raw, cache._template, ffi.sizeof(cache._template))
        self._table = ffi.new("int32_t[]", list(table)) if table is not None else None
        for out, layer in zip(self.raw, cache.geometry):
            if layer is None:
                continue
            out.length = length
            if self._table is not None:
                out.table.data = self._table
                out.table.count = len(self._table)
                out.table.dtype.code, out.table.dtype.bits, out.table.dtype.lanes = 0, 32, 1
            elif row:
                out.k.base = ffi.cast("void *", layer.k + row * layer.stride_outer)
                out.v.base = ffi.cast("void *", layer.v + row * layer.stride_outer)


def _geometry(tensor, kind: CacheKind) -> LayerGeometry | None:
    # The tensor of a layer without a cache (linear attention) is a null handle: only its truth may be asked.
    if not tensor._underlying:
        return None
    shape, strides = list(tensor.shape), list(tensor.stride())
    if len(shape) != 5 or shape[0] != 2 or strides[4] != 1:
        raise Refused(
            f"a cache tensor has shape {shape} and strides {strides}; expected K and V on the first axis of five, "
            "and whole rows on the last (MLA caches are not served)"
        )
    tokens, heads = (2, 3) if kind.token_major else (3, 2)
    if kind.paged and shape[tokens] != kind.block_size:
        raise Refused(
            f"a cache tensor has shape {shape}; expected blocks of {kind.block_size} tokens on axis {tokens}"
        )
    size = _DTYPES.get(repr(tensor.dtype).removeprefix("infinicore."), (0, 0))[1] // 8
    base = tensor.data_ptr()
    return LayerGeometry(
        k=base,
        v=base + strides[0] * size,
        stride_outer=strides[1] * size,
        stride_token=strides[tokens] * size,
        stride_head=strides[heads] * size,
        kv_heads=shape[heads],
        head_dim=shape[4],
    )
