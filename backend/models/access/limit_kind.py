"""Which requests the rate limits count."""

from enum import StrEnum


class LimitKind(StrEnum):
    """What is counted: each kind has a limit and counts of its own."""

    SOURCE = "source"
    TOKEN = "token"  # noqa: S105 - a kind
    KEY = "key"
    FAILED_AUTHENTICATION = "failed_authentication"
