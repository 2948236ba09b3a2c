"""KV-cache compression for InfiniLM, by plugins: docs/infinilm.md.

    python -m kvhook_infinilm SCRIPT FLAGS

runs an InfiniLM script with it; `attach()` does the same in one's own script, before an engine is made.
"""

import json
import os

from .errors import AttachError, HostError, KvhookError, Refused, UnknownArm
from .points import adapter_of, attach
from .probes import probe
from .records import Recorder, append, figures_line

__all__ = [
    "AttachError",
    "HostError",
    "KvhookError",
    "Recorder",
    "Refused",
    "UnknownArm",
    "adapter_of",
    "arms",
    "attach",
    "control",
    "figures",
    "probe",
    "record",
]


def control(engine, changes: list) -> None:
    """Changes arms while the engine runs, as a whole or not at all: docs/live.md.

    Args:
        engine: As for `figures`.
        changes: `[{"weights": {"a": 9, "b": 1}}, ...]`. A plugin may be a path inside the plugin folders.

    Raises `Refused` where compression is off, `HostError` for what cannot be done; then nothing changed.

    Thread: any. Plugins are loaded on it, while the engine goes on.
    """
    adapter = adapter_of(engine)
    if adapter is None:
        raise Refused("kvhook is not attached to this engine")
    from . import native

    adapter.control(json.dumps({"changes": changes}), native.KVHOOK_SOURCE_OPERATOR)


def arms(engine) -> dict:
    """The arms as they are: `{"safe_mode": ..., "instances": ..., "arms": [{"name": ..., "state": ..., ...}]}`.

    Empty where compression is off.

    Args:
        engine: As for `figures`.

    Thread: any.
    """
    adapter = adapter_of(engine)
    return adapter.host.arms() if adapter is not None and adapter.on else {}


def figures(engine) -> dict:
    """What each arm did so far, `{"engine": ..., "arms": {name: {...}}}`; empty where compression is off.

    Args:
        engine: An `LLM`, `AsyncLLMEngine`, `LLMEngine` or `InferEngine`.

    Thread: any.
    """
    adapter = adapter_of(engine)
    return adapter.host.figures() if adapter is not None and adapter.on else {}


def record(engine, path: str | os.PathLike, every_seconds: float | None = None) -> Recorder | None:
    """Appends a line of figures to a file (docs/report.md): now, and with `every_seconds` again and again until the engine
    is closed, or the `Recorder` that is returned.

    Args:
        engine: As for `figures`.

    Raises `Refused` where compression is off, `OSError` where the file cannot be written.

    Thread: any.
    """
    adapter = adapter_of(engine)
    if every_seconds is None:
        append(path, figures_line(adapter))
        return None
    return Recorder(adapter, path, every_seconds)
