"""Builds the plugin host and the plugins with cargo and puts them, with the C headers, into the package."""

import json
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError, FileError

PACKAGE = "kvhook_infinilm"
WORKSPACE = Path(__file__).resolve().parents[2]
CRATES = (
    "kvhook-host",
    "kvhook-noop",
    "kvhook-truncate",
    "kvhook-mlp-decouple",
    "kvhook-expected-attention",
)
# Plugins in C: one source file each.
C_PLUGINS = ("lagkv",)
HEADERS = (
    "hook-abi/include/kvhook.h",
    "host-shim/host/include/kvhook_host.h",
    "host-shim/host/include/kvhook.hpp",
)


def build_libraries() -> list[Path]:
    """The crates' shared libraries, where cargo says that it put them."""
    if not (WORKSPACE / "Cargo.toml").is_file():
        raise FileError(
            f"there is no Cargo.toml in {WORKSPACE}: the package is built from a kvhook checkout, "
            "with `pip install ./host-shim/infinilm` in the checkout's top folder"
        )
    cargo = os.environ.get("CARGO") or shutil.which("cargo")
    if cargo is None:
        raise ExecError(
            "cargo was not found, and the plugin host and the plugins are written in Rust: "
            "install Rust with rustup (https://rustup.rs), open a new shell, install again"
        )
    command = [cargo, "build", "--release", "--locked", "--message-format=json-render-diagnostics"]
    for crate in CRATES:
        command += ["-p", crate]
    built = subprocess.run(command, cwd=WORKSPACE, stdout=subprocess.PIPE, text=True)
    if built.returncode != 0:
        raise ExecError(f"`{' '.join(command)}` in {WORKSPACE} failed; cargo's messages are above")

    libraries = {}
    for line in built.stdout.splitlines():
        message = json.loads(line) if line.startswith("{") else {}
        if message.get("reason") == "compiler-artifact":
            for file in map(Path, message["filenames"]):
                if file.suffix == ".so":
                    libraries[message["target"]["name"].replace("_", "-")] = file
    missing = [crate for crate in CRATES if crate not in libraries]
    if missing:
        raise FileError(
            f"cargo built no shared library (.so) of {', '.join(missing)}; Linux is needed"
        )
    return [libraries[crate] for crate in CRATES]


def build_c_plugins(folder: Path) -> list[Path]:
    """The shared libraries of the plugins in C, built into a folder with the compiler that cargo links with."""
    folder.mkdir(parents=True, exist_ok=True)
    libraries = []
    for name in C_PLUGINS:
        library = folder / f"libkvhook_{name}.so"
        command = [
            os.environ.get("CC", "cc"),
            "-std=c11",
            "-O2",
            "-shared",
            "-fPIC",
            "-Wl,-z,nodelete",
        ]
        command += ["-I", "hook-abi/include", "-I", "hook-abi/c"]
        command += [f"plugins/{name}/{name}.c", "-o", str(library), "-lm"]
        if subprocess.run(command, cwd=WORKSPACE).returncode != 0:
            raise ExecError(f"`{' '.join(command)}` in {WORKSPACE} failed; its messages are above")
        libraries.append(library)
    return libraries


def place(file: Path, folder: Path) -> Path:
    """Copies a file by write-then-rename: a process may have the old one loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{file.name}.new"
    shutil.copy2(file, new)
    return new.replace(folder / file.name)


class BuildPy(build_py):
    """Copies the package, then adds `native/`: into the build folder, or with `pip install -e` into the sources."""

    def run(self):
        if self.editable_mode:
            package = Path(__file__).resolve().parent / PACKAGE
        else:
            package = Path(self.build_lib) / PACKAGE
            # What an earlier build left would be packed again, also modules that are gone.
            shutil.rmtree(package, ignore_errors=True)
        libraries = build_libraries()
        libraries += build_c_plugins(Path(self.get_finalized_command("build").build_temp).resolve())
        super().run()
        native = package / "native"
        self.placed = [place(library, native) for library in libraries]
        self.placed += [place(WORKSPACE / header, native / "include") for header in HEADERS]

    def get_outputs(self, include_bytecode=1):
        return super().get_outputs(include_bytecode) + [
            str(file) for file in getattr(self, "placed", [])
        ]


class PlatformDistribution(Distribution):
    """A wheel of this platform: it holds shared libraries."""

    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildPy}, distclass=PlatformDistribution)
