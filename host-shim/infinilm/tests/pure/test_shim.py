"""The C++ shim, compiled against stand-ins of InfiniCore, with a host that records what it is given."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvhook_infinilm.insert import own_file, shim_source

FOLDER = Path(__file__).resolve().parent / "shim"
CASES = re.findall(r"CASE\((\w+)\),", (FOLDER / "cases.cpp").read_text())
CASES.append("attach_takes_one_loaded_host")
COMPILER = shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (c++)")


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> list[str]:
    """The compiled cases and their host."""
    folder = tmp_path_factory.mktemp("shim")
    (folder / "kvhook_shim.cpp").write_text(shim_source())
    host = folder / "libfake_host.so"
    flags = [COMPILER, "-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    flags += [f"-I{path}" for path in (folder, FOLDER, *_include_folders())]
    for arguments in (
        [FOLDER / "fake_host.cpp", "-shared", "-fPIC", "-o", host],
        [FOLDER / "cases.cpp", "-ldl", "-o", folder / "cases"],
    ):
        done = subprocess.run([*flags, *arguments], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return [str(folder / "cases"), str(host)]


def _include_folders() -> set[Path]:
    return {own_file(name).parent for name in ("kvhook.h", "kvhook_host.h")}


def test_every_case_is_run(program: list[str]) -> None:
    listed = subprocess.run([*program, "list"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_shim(program: list[str], case: str) -> None:
    done = subprocess.run([*program, case], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
