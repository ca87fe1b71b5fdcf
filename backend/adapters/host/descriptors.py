"""How many file descriptors this process may have, and how many of them connections may take (getrlimit(2)).

A process starts with a soft limit of 1024 on most systems.
"""

import resource
from dataclasses import dataclass
from typing import Final, Self

# For 4096 connections, as many that were accepted at once and aren't counted yet, and the reserve.
_WANTED: Final = 8192
# For `wg`, the database, the config and other files: some 60 are in use at a time.
_RESERVE: Final = 256
_MOST_BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class Descriptors:
    """The limit of this process, divided."""

    limit: int
    # Connections that the kernel completes and keeps until they are accepted, which may be all at once.
    backlog: int
    # Connections that may be open: the limit without the backlog and the reserve.
    connections: int

    @classmethod
    def raised(cls) -> Self:
        """Raise the soft limit as far as it is of use, and the hard limit and the system allow it."""
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
