"""What the package holds, and what its build says when it cannot."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import kvhook_infinilm

SOURCES = Path(__file__).resolve().parents[2]
CHECKOUT = SOURCES.parents[1]
PACKAGE = Path(kvhook_infinilm.__path__[0])
HEADERS = (
    "hook-abi/include/kvhook.h",
    "host-shim/host/include/kvhook_host.h",
    "host-shim/host/include/kvhook.hpp",
)


@pytest.mark.parametrize(
    "name", ["host", "noop", "truncate", "mlp_decouple", "expected_attention", "lagkv"]
)
def test_the_libraries_are_there(name):
    with (PACKAGE / "native" / f"libkvhook_{name}.so").open("rb") as file:
        assert file.read(4) == b"\x7fELF"


@pytest.mark.parametrize("header", HEADERS)
def test_the_headers_are_those_of_the_checkout(header):
    packaged = PACKAGE / "native" / "include" / Path(header).name
    assert packaged.read_bytes() == (CHECKOUT / header).read_bytes()


def test_the_shims_sources_are_there():
    ours = {file.name: file.read_bytes() for file in (SOURCES / "kvhook_infinilm/csrc").iterdir()}
    assert {"kvhook_shim.cpp", "kvhook_shim.h"} <= ours.keys()
    assert {file.name: file.read_bytes() for file in (PACKAGE / "csrc").iterdir()} == ours


def distribution():
    try:
        return metadata.distribution("kvhook-infinilm")
    except metadata.PackageNotFoundError:
        pytest.skip("kvhook-infinilm is not installed, only on the path")


def test_the_version_is_the_workspaces():
    workspace = re.search(
        r'^version = "(.+)"$', (CHECKOUT / "Cargo.toml").read_text(), re.MULTILINE
    )
    assert distribution().version == workspace.group(1)


def test_one_dependency_beside_the_extras():
    needed = [line for line in distribution().requires if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line).group() for line in needed] == ["cffi"]


def test_the_console_script_can_be_called():
    (script,) = distribution().entry_points.select(group="console_scripts")
    assert script.name == "kvhook-infinilm"
    assert callable(script.load())


def build(folder, base, **environment):
    pytest.importorskip("setuptools", minversion="77")
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(base)],
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_without_cargo_the_build_says_what_to_install(tmp_path):
    built = build(SOURCES, tmp_path, PATH=str(tmp_path), CARGO="")
    assert built.returncode != 0
    assert "cargo was not found" in built.stderr
    assert "rustup" in built.stderr


def test_a_cargo_that_fails_ends_the_build_with_its_command(tmp_path):
    cargo = tmp_path / "cargo"
    cargo.write_text("#!/bin/sh\necho 'error: rustc is too old' >&2\nexit 101\n")
    cargo.chmod(0o755)
    built = build(SOURCES, tmp_path / "build", CARGO=str(cargo))
    assert built.returncode != 0
    assert "rustc is too old" in built.stderr
    assert "build --release --locked" in built.stderr


def test_outside_of_a_checkout_the_build_says_where_to_build(tmp_path):
    folder = tmp_path / "host-shim" / "infinilm"
    folder.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(SOURCES / name, folder)
    built = build(folder, tmp_path / "build")
    assert built.returncode != 0
    assert "no Cargo.toml" in built.stderr
    assert "pip install ./host-shim/infinilm" in built.stderr
