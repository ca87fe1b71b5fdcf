"""The service, made to die by SIGKILL at a chosen moment inside of a batch: MOMENT, then serve's arguments.

Run as a module, in place of `backend`. The moment comes when the file `die` is in the working directory.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

from backend.__main__ import app
from backend.adapters.records import peers
from backend.services.hub.reconciler import Reconciler

# Where the process dies: the method, and whether its work is done first.
MOMENTS: Final[dict[str, tuple[object, str, bool]]] = {
    "before-commit": (peers, "write", False),
    "after-commit": (Reconciler, "apply", False),
    "after-apply": (Reconciler, "apply", True),
    "before-compensation": (peers, "take_back", False),
}


def arrange(owner: object, method: str, *, afterwards: bool) -> None:
    """Have the process die in that method."""
    work = getattr(owner, method)

    def die_or_work(*arguments: Any) -> Any:
        # Asked once: the work itself may answer the client, who then makes the file for the next one.
        dying = Path("die").exists()
        done = work(*arguments) if afterwards or not dying else None
        if dying:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(owner, method, die_or_work)


if __name__ == "__main__":
    owner, method, afterwards = MOMENTS[sys.argv.pop(1)]
    arrange(owner, method, afterwards=afterwards)
    app(prog_name="dying service")
