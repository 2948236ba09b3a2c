"""Files of the installed package."""

from __future__ import annotations

from pathlib import Path

from .errors import PackageError

PACKAGE = Path(__file__).resolve().parent
"""Folder of the package."""

NATIVE = PACKAGE / "native"
"""Folder of the libraries and headers that the package was built with."""


def read(path: Path) -> str:
    """Text of one of the package's files.

    Raises `PackageError`.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PackageError(
            f"{path} cannot be read ({error.strerror}); the package is not complete: "
            "install it again with `pip install ./host-shim/infinilm`"
        ) from error
