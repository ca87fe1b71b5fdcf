"""The service with less patience: serve's arguments.

Run as a module, in place of `backend`, by tests about what happens when patience is at its end.
"""

from typing import Final

from backend.__main__ import app
from backend.adapters.wireguard import wg
from backend.cli import serve

# The seconds for one call of `wg`, and for what is under way when SIGTERM comes.
PATIENCE: Final = ((wg, "_TIMEOUT_SECONDS", 0.5), (serve, "_SHUTDOWN_SECONDS", 1))


if __name__ == "__main__":
    for owner, name, seconds in PATIENCE:
        # One that isn't there was renamed: without it the tests would wait for the whole time again.
        getattr(owner, name)
        setattr(owner, name, seconds)
    app(prog_name="hasty service")
