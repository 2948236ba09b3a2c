"""The host's shared library and its C headers, read by cffi: the headers are the only description of the structs."""

from __future__ import annotations

import re
from functools import cache

import cffi

from .errors import PackageError
from .package import NATIVE, PACKAGE, read

HOST_LIBRARY = NATIVE / "libkvhook_host.so"
"""The host."""

_HEADERS = ("kvhook.h", "kvhook_host.h")
_INTEGER = re.compile(r"#define (KVH(?:OOK)?_\w+) \(?(-?\d+)(?: << (\d+))?\)?$", re.MULTILINE)


ffi = cffi.FFI()
"""Knows every struct and function of the host's C API, and those of the shim."""


def _declarations(text: str) -> str:
    """A header's declarations, without comments, preprocessor lines and C++ wrapping."""
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(r"//.*|/\*(?:.|\n)*?\*/", "", text)
    text = re.sub(r"^#if.*__cplusplus\s*\n(?:.*\n)*?#endif\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*#.*\n|^KVH_STATIC_ASSERT\(.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\[(KVH\w+)\]", lambda name: f"[{_constants()[name[1]]}]", text)


@cache
def _constants() -> dict[str, int]:
    found = {}
    for header in _HEADERS:
        for name, value, shift in _INTEGER.findall(read(NATIVE / "include" / header)):
            found[name] = int(value) << int(shift or 0)
    return found


def __getattr__(name: str) -> int:
    """A constant of the headers: `native.KVHOOK_OK`."""
    constants = _constants() if name.startswith("KVH") else {}
    if name not in constants:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return constants[name]


@cache
def declare() -> None:
    """Reads the headers, once.

    Raises `PackageError` for one that is missing.
    """
    for header in _HEADERS:
        ffi.cdef(_declarations(read(NATIVE / "include" / header)))
    ffi.cdef(_declarations(read(PACKAGE / "csrc" / "kvhook_shim.h")))


@cache
def host_library():
    """The host's functions. The library stays loaded for the life of the process.

    Raises `PackageError`.
    """
    declare()
    try:
        return ffi.dlopen(str(HOST_LIBRARY), ffi.RTLD_NOW)
    except OSError as error:
        raise PackageError(
            f"{HOST_LIBRARY} cannot be loaded: {error}; install the package again with "
            "`pip install ./host-shim/infinilm`"
        ) from error


def shim_version() -> int:
    """Version of the shim's header in this package."""
    declare()
    return ffi.dlopen(None).KVHOOK_SHIM_VERSION


def open_extension(path: str):
    """The shim's functions in an extension module that is loaded already."""
    declare()
    return ffi.dlopen(path, ffi.RTLD_NOW)


def text(value):
    """A `KvhStr` of a Python string, and the memory that it borrows."""
    data = ffi.from_buffer("char[]", value.encode())
    return ffi.new("KvhStr *", {"data": data, "length": len(data)}), data


def string(value) -> str:
    """A `KvhStr` as a Python string."""
    return ffi.unpack(value.data, value.length).decode(errors="replace") if value.length else ""


def sized(struct: str, **fields):
    """A zeroed struct of the API with its `struct_size` filled."""
    out = ffi.new(f"{struct} *", fields)
    out.struct_size = ffi.sizeof(struct)
    return out


def array(elements) -> dict:
    """A `KvhArray` or `KvhArrayMut` over a cffi array."""
    element = ffi.typeof(elements).item
    return {"data": elements, "count": len(elements), "stride": ffi.sizeof(element)}
