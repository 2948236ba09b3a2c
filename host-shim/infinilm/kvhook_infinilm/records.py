"""What an engine writes down while it serves: figures of its arms, and probes, as JSON lines (docs/report.md)."""

from __future__ import annotations

import json
import logging
import os
import threading
import time

from .errors import KvhookError, Refused

_logger = logging.getLogger("kvhook")

RUN = f"{os.getpid()}-{int(time.time())}"
"""Name of this start of the process."""

_writing = threading.Lock()


def line(kind: str, adapter, **fields) -> dict:
    """A line of a record."""
    common = {"kind": kind, "at": round(time.time(), 3), "engine": "infinilm"}
    return common | {"model": adapter.model_name, "run": RUN} | fields


def figures_line(adapter) -> dict:
    """The arms' figures as they are now.

    Raises `Refused` where compression is off.
    """
    host = adapter.host if adapter is not None else None
    if host is None:
        raise Refused(getattr(adapter, "refused", None) or "compression is off")
    return line("figures", adapter, figures=host.figures())


def dumped(one: dict) -> str:
    """A line's text, with its end."""
    return json.dumps(one, separators=(",", ":")) + "\n"


def append(path: str | os.PathLike, one: dict) -> None:
    """Appends a line to a file, which is made, for its owner alone, where it is missing. Any thread, any process.

    Raises `OSError`.
    """
    data = dumped(one).encode()
    with _writing, open(path, "a+b", buffering=0, opener=_private) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            # A process was cut off in the middle of a line.
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)


def _private(path, flags):
    return os.open(path, flags, 0o600)


class Recorder:
    """Appends figures to a file again and again, until it is closed or its engine is; then once more."""

    def __init__(self, adapter, path: str | os.PathLike, every_seconds: float):
        """Begins, with a line at once.

        Raises `Refused` where compression is off, `OSError` where the file cannot be written, `ValueError` for a time that
        is not above 0.
        """
        if not every_seconds > 0:
            raise ValueError(f"every_seconds is {every_seconds!r}; expected more than 0")
        self._adapter = adapter
        self._path = path
        self._every = every_seconds
        self._ended = threading.Event()
        append(path, figures_line(adapter))
        adapter.recorders.append(self)
        self._thread = threading.Thread(target=self._run, name="kvhook-record", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Appends a last line and ends. Later calls do nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self._append()
        if self in self._adapter.recorders:
            self._adapter.recorders.remove(self)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            if not self._adapter.on:
                break
            self._append()

    def _append(self) -> None:
        try:
            append(self._path, figures_line(self._adapter))
        except (KvhookError, OSError) as error:
            _logger.error("figures were not recorded: %s", error)
