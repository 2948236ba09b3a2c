"""KV-cache compression for InfiniLM, by plugins: docs/infinilm.md.

    python -m kvhook_infinilm SCRIPT FLAGS

runs an InfiniLM script with it; `attach()` does the same in one's own script, before an engine is made.
"""

from .errors import AttachError, HostError, KvhookError, Refused, UnknownArm
from .points import adapter_of, attach

__all__ = [
    "AttachError",
    "HostError",
    "KvhookError",
    "Refused",
    "UnknownArm",
    "adapter_of",
    "attach",
    "figures",
]


def figures(engine) -> dict:
    """What each arm did so far, `{"engine": ..., "arms": {name: {...}}}`; empty where compression is off.

    Args:
        engine: An `LLM`, `AsyncLLMEngine`, `LLMEngine` or `InferEngine`.

    Thread: any.
    """
    adapter = adapter_of(engine)
    return adapter.host.figures() if adapter is not None and adapter.on else {}
