"""Stands in for the module `infinicore`: tensors in ordinary memory, as numpy arrays."""

from __future__ import annotations

import numpy as np

_NUMPY = {
    "float32": np.float32,
    "float16": np.float16,
    # Numpy has no bfloat16; nothing computes with it here.
    "bfloat16": np.uint16,
    "int8": np.int8,
    "int32": np.int32,
    "int64": np.int64,
}


class Array:
    """What `Tensor._underlying` is: an array with its dtype's name, or nothing (`Array(None)`)."""

    def __init__(self, values: np.ndarray | None, dtype: str = ""):
        self._values = values
        self.dtype_name = dtype

    def __bool__(self) -> bool:
        return self._values is not None

    @property
    def values(self) -> np.ndarray:
        """The array. InfiniCore dereferences a null pointer where this raises."""
        if self._values is None:
            raise AssertionError("a null tensor was used: InfiniCore would crash")
        return self._values


class dtype:
    """`infinicore.dtype`."""

    def __init__(self, name: str):
        self._underlying = name

    def __repr__(self) -> str:
        return f"infinicore.{self._underlying}"

    def __eq__(self, other) -> bool:
        return isinstance(other, dtype) and self._underlying == other._underlying

    def __hash__(self) -> int:
        return hash(self._underlying)


class _DeviceHandle:
    def __init__(self, type: str):
        self.type = type


class device:
    """`infinicore.device`."""

    def __init__(self, type: str | None = None, index: int = 0):
        self.type = type or "cpu"
        self.index = index
        self._underlying = _DeviceHandle(self.type)

    def __repr__(self) -> str:
        return f"device(type='{self.type}', index={self.index})"


class Tensor:
    """`infinicore.Tensor`, with the methods that InfiniLM's Python and the adapter use."""

    def __init__(self, underlying: Array):
        self._underlying = underlying

    @property
    def shape(self) -> list[int]:
        return list(self._underlying.values.shape)

    @property
    def dtype(self) -> dtype:
        self._underlying.values
        return dtype(self._underlying.dtype_name)

    @property
    def device(self) -> device:
        self._underlying.values
        return device("cpu", 0)

    def stride(self) -> list[int]:
        """In elements."""
        values = self._underlying.values
        return [step // values.itemsize for step in values.strides]

    def data_ptr(self) -> int:
        return self._underlying.values.ctypes.data

    def numel(self) -> int:
        return self._underlying.values.size

    def view(self, shape) -> Tensor:
        return Tensor(Array(self._underlying.values.reshape(shape), self._underlying.dtype_name))

    def to_numpy(self) -> np.ndarray:
        return self._underlying.values


def from_list(data, *, dtype: dtype) -> Tensor:
    """A new tensor of a list, or of a list of lists."""
    name = dtype._underlying
    values = np.array(data, dtype=_NUMPY[name])
    if values.size == 0 or values.ndim > 2:
        raise ValueError(f"from_list() of shape {values.shape}")
    return Tensor(Array(values, name))


def full(shape, value: float, dtype_name: str) -> Array:
    """A new array of one value."""
    return Array(np.full(shape, value, dtype=_NUMPY[dtype_name]), dtype_name)


class _Layers:
    """`infinicore.nn`: InfiniLM's Python derives classes from these and never makes one here."""

    class Module: ...

    class Linear: ...

    class Embedding: ...

    class ModuleList: ...

    class RMSNorm: ...

    class RoPE: ...


def _dtype_of_numpy(tensor_dtype: dtype):
    return _NUMPY[tensor_dtype._underlying]


def utilities() -> dict:
    """The names of `infinicore.utils`."""
    return {"infinicore_to_numpy_dtype": _dtype_of_numpy}


def contents() -> dict:
    """The module's names."""
    names = {name: dtype(name) for name in _NUMPY}
    return names | {
        "Tensor": Tensor,
        "device": device,
        "dtype": dtype,
        "from_list": from_list,
        "nn": _Layers,
        "sync_device": lambda: None,
        "sync_stream": lambda: None,
        "set_device": lambda device: None,
        "get_stream": lambda: None,
    }
