"""Puts the stand-ins where InfiniLM's Python imports its compiled modules from."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

NEEDED = ("numpy", "janus", "xxhash", "transformers", "tokenizers", "torch", "PIL")
"""What InfiniLM's Python imports."""


def missing() -> str | None:
    """Why the tests over stand-ins cannot run."""
    source = os.environ.get("INFINILM_SRC")
    if not source:
        return "INFINILM_SRC is not set: it names the folder that holds InfiniLM's Python package"
    if not (Path(source) / "infinilm" / "infer_engine.py").is_file():
        return f"INFINILM_SRC: there is no infinilm/infer_engine.py in {source}"
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        return f"InfiniLM's Python needs {', '.join(absent)}"
    if importlib.util.find_spec("infinicore") is not None:
        return "InfiniLM itself is here: the tests over stand-ins run where infinicore cannot be imported"
    return None


def install() -> None:
    """From here on `infinilm` is InfiniLM's own Python over the stand-ins."""
    from . import compiled, core

    # Made, not imported: InfiniLM finds them by these names, and none of them is a library that could hold the shim.
    modules = {
        "infinicore": core.contents(),
        "infinicore.utils": core.utilities(),
        "_infinilm": compiled.contents(),
    }
    for name, contents in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    sys.path.insert(0, os.environ["INFINILM_SRC"])
