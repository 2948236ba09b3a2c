"""Keeps the adapter's failures out of InfiniLM: an exception that left `LLMEngine.step` would end the server's loop.

Each place of attachment runs its part inside a `guard`. What fails is logged with the place's name and counted, and
the engine goes on.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter

from . import settings

_logger = logging.getLogger("kvhook")

failures: Counter = Counter()
"""Failures so far, by place."""

_lock = threading.Lock()


@contextlib.contextmanager
def guard(place: str, on_failure=None, strict: bool = False):
    """Runs the block; an exception ends the block and goes no further.

    Args:
        place: Name of the place of attachment, as in `points.POINTS`.
        on_failure: Called with the exception, for what must be undone.
        strict: At start, where an operator may have asked that what cannot be served is raised.
    """
    try:
        yield
    except Exception as error:
        if strict and settings.strict():
            raise
        with _lock:
            failures[place] += 1
        _logger.exception("%s failed, the engine goes on without", place)
        if on_failure is not None:
            try:
                on_failure(error)
            except Exception:
                _logger.exception("%s: what was begun could not be undone", place)
