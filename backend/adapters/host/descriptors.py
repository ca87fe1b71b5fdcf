"""File descriptors: how many this process may have, and how many of them connections may take (getrlimit(2)).

Python's default is the limit that it was started with, 1024 on most systems.
"""

import resource
from dataclasses import dataclass
from typing import Final, Self

# 4096 connections, as many that were accepted at once and aren't counted yet, and the rest.
_WANTED: Final = 8192
# For `wg`, the database, the config and what else is opened: some 60 are in use at a time.
_RESERVE: Final = 256
_MOST_BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What the process may have, divided."""

    limit: int
    # Connections that the kernel completes and keeps until they are accepted, all at once perhaps.
    backlog: int
    # Connections that may be open: what is left of the limit by then is kept back.
    connections: int

    @classmethod
    def raised(cls) -> Self:
        """Raise the soft limit as far as it is of use, where the hard limit and the system let us."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            except (OSError, ValueError):  # a system call filter may refuse it
                wanted = soft
        return cls.of(wanted)

    @classmethod
    def of(cls, limit: int) -> Self:
        """Divide a limit."""
        backlog = min(_MOST_BACKLOG, limit // 8)
        reserve = min(_RESERVE, limit // 4)
        return cls(limit, backlog, limit - backlog - reserve)
