"""The service, made to die by SIGKILL at a chosen moment inside of a batch: MOMENT, then serve's arguments.

Run as a module, in place of `backend`. The moment comes when the file `die` is in the working directory.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from backend.__main__ import app
from backend.adapters.dbos_journal import DbosJournal

# The method before whose work the process dies.
MOMENTS: Final = {
    "before-intent": "_write_intent",
    "after-intent": "_apply_batch",
    "after-apply": "_write_applied",
    "before-revocation": "_write_revocation",
}


def _dying(work: Callable[..., Any]) -> Callable[..., Any]:
    def die_or_work(journal: DbosJournal, batch_id: str) -> Any:
        if Path("die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return work(journal, batch_id)

    return die_or_work


if __name__ == "__main__":
    method = MOMENTS[sys.argv.pop(1)]
    setattr(DbosJournal, method, _dying(getattr(DbosJournal, method)))
    app(prog_name="dying service")
