"""The structs as cffi lays them out are those of the headers."""

import re

import pytest

from kvhook_infinilm import host, native


def test_sizes_and_offsets_are_those_that_the_headers_assert():
    checked = 0
    for header in ("kvhook.h", "kvhook_host.h"):
        text = (native.NATIVE / "include" / header).read_text()
        for kind, arguments, value in re.findall(
            r"KVH_STATIC_ASSERT\((sizeof|offsetof)\(([\w, ]+)\) == (\d+)", text
        ):
            struct, *field = arguments.split(", ")
            found = (
                native.ffi.sizeof(struct)
                if kind == "sizeof"
                else native.ffi.offsetof(struct, field[0])
            )
            assert found == int(value), arguments
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("name", "value"),
    [("KVHOOK_OK", 0), ("KVH_CAN_MOVE_POSITIONS", 64), ("KVHOOK_ERR_UNKNOWN_ARM", 202)],
)
def test_constants_are_the_headers(name, value):
    assert getattr(native, name) == value


def test_an_unknown_constant_is_no_attribute():
    with pytest.raises(AttributeError, match="KVHOOK_NO_SUCH"):
        _ = native.KVHOOK_NO_SUCH


def test_the_host_says_its_version():
    assert re.fullmatch(r"kvhook-host \d+\.\d+\.\d+", host.version())
