"""The plugin that misbehaves as its config says: tests/faulty."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[4]


@functools.cache
def library() -> Path:
    """Built by cargo, or what `KVHOOK_FAULTY` names."""
    if given := os.environ.get("KVHOOK_FAULTY"):
        return Path(given)
    command = ["cargo", "build", "--release", "--locked", "-p", "kvhook-faulty"]
    command.append("--message-format=json-render-diagnostics")
    built = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=True)
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("target", {}).get("name") == "kvhook_faulty":
            for file in map(Path, message.get("filenames", [])):
                if file.suffix == ".so":
                    return file
    raise AssertionError("cargo built no library of kvhook-faulty")
