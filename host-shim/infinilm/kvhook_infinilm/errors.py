"""What can go wrong in the adapter."""

from __future__ import annotations


class KvhookError(Exception):
    """Base of the adapter's errors."""


class PackageError(KvhookError):
    """The package's own libraries or headers cannot be used."""


class AttachError(KvhookError):
    """InfiniLM is not as the adapter expects it; the message names what was not found."""


class Refused(KvhookError):
    """The engine is configured in a way that compression does not serve; the message says which and why."""


class UnknownArm(KvhookError, ValueError):
    """A request names an arm that is not there; the message names those that are."""


class HostError(KvhookError):
    """A call of the host failed.

    Attributes:
        status: `KVHOOK_ERR_*`.
        name: The status in one word, as in docs/errors.md.
    """

    def __init__(self, function: str, status: int, name: str, message: str):
        super().__init__(f"{function}: {name} ({status}): {message}")
        self.status = status
        self.name = name
