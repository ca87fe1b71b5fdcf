"""`python -m backend`, made to die by SIGKILL at a chosen moment of a backup: MOMENT, then the arguments."""

import os
import signal
import sys
from typing import Any, Final

from backend.__main__ import app
from backend.adapters.backups import maker, restorer
from backend.adapters.backups.directory import BackupDirectory
from backend.adapters.records import copies, replacement

# Where the process dies: what it calls then, and whether that is done first.
MOMENTS: Final[dict[str, tuple[object, str, bool]]] = {
    "before-the-copy": (copies, "save", False),
    "after-the-copy": (copies, "save", True),
    "while-writing": (maker, "write", True),
    "before-the-name": (BackupDirectory, "publish", False),
    "after-the-name": (BackupDirectory, "publish", True),
    "before-the-swap": (replacement, "_fold", False),
    "within-the-swap": (replacement, "_fold", True),
    "before-postgresql": (replacement, "replace_rows", False),
    "within-postgresql": (copies, "_set_sequence", True),
    "after-the-swap": (replacement.PresentRecords, "replace", True),
    "before-the-config": (restorer.Restoration, "_replace_config", False),
    "after-the-config": (restorer.Restoration, "_replace_config", True),
}


def arrange(owner: object, name: str, *, afterwards: bool) -> None:
    """Have the process die there."""
    work = getattr(owner, name)

    def die(*arguments: Any, **named: Any) -> None:
        if afterwards:
            work(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, die)


if __name__ == "__main__":
    owner, name, afterwards = MOMENTS[sys.argv.pop(1)]
    arrange(owner, name, afterwards=afterwards)
    app(prog_name="dying backup")
