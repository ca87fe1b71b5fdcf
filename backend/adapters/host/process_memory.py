"""Keeps this process's memory, which holds keys, from core dumps and from its user's other processes."""

import resource
from contextlib import suppress
from typing import Final

# linux/prctl.h
_SET_DUMPABLE: Final = 4


def keep_private() -> None:
    """Make this process not dumpable (prctl(2)), and let it and its children write no core (core(5)).

    `wg` is such a child, and reads the hub's private key. What the system can't do is left out: the files'
    modes protect the keys first of all.
    """
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # ImportError: a Python without libffi. MemoryError: a libffi that needs memory to write and to execute.
    with suppress(ImportError, MemoryError, OSError, AttributeError):
        import ctypes  # noqa: PLC0415 - some Pythons lack it

        # From now on /proc/PID belongs to root, and needs CAP_SYS_PTRACE to be looked into from outside.
        ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0, 0, 0, 0)
