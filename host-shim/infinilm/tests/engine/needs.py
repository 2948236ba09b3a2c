"""Imported first by every test module of this folder: skips it where something that it needs is missing."""

import pytest

infinilm = pytest.importorskip(
    "infinilm",
    reason="needs InfiniLM built for the CPU (infinilm cannot be imported)",
    exc_type=ImportError,
)
for _name in ("torch", "transformers"):
    pytest.importorskip(_name, reason=f"the reference needs {_name}", exc_type=ImportError)
for _name in ("gguf", "safetensors"):
    pytest.importorskip(_name, reason=f"the model's conversion needs {_name}", exc_type=ImportError)
