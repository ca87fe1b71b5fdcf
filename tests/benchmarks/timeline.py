"""The service with a clock at each boundary of one provision. Run as a module, in place of `backend`.

Writes `timeline.json` into the working directory when it ends: [seconds, what] for each boundary passed.
"""

import atexit
import json
import time
from pathlib import Path
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from backend.__main__ import app
from backend.adapters.host.programs import Running
from backend.adapters.records import peers
from backend.adapters.wireguard.wg import WgInterface
from backend.services.hub.agent import Agent
from backend.services.hub.writer import Writer
from backend.services.wireguard_config_manager import WireGuardConfigManager

# What begins or ends there, and whether that is before or after the method's work.
BOUNDARIES: Final[tuple[tuple[object, str, str, bool], ...]] = (
    (HttpToolsProtocol, "data_received", "received", False),
    (Writer, "submit", "submitted", True),
    (Agent, "_prepare", "taken", False),
    (peers, "write", "prepared", False),
    (Agent, "_apply", "committed", False),
    (WireGuardConfigManager, "put_in_place", "replaced", True),
    (WgInterface, "change", "started", True),
    (WireGuardConfigManager, "sync_directory", "written", True),
    (Running, "output", "changed", True),
    (Agent, "_apply", "applied", True),
)

_passed: list[tuple[float, str]] = []


def _watch(owner: object, method: str, what: str, *, afterwards: bool) -> None:
    work = getattr(owner, method)

    def watched(*arguments: Any) -> Any:
        if not afterwards:
            _passed.append((time.perf_counter(), what))
        done = work(*arguments)
        if afterwards:
            _passed.append((time.perf_counter(), what))
        return done

    setattr(owner, method, watched)


def _watch_answers() -> None:
    send = RequestResponseCycle.send

    async def watched(self: RequestResponseCycle, message: Any) -> None:
        if message["type"] == "http.response.start":
            _passed.append((time.perf_counter(), "answering"))
        await send(self, message)
        if message["type"] == "http.response.body":
            _passed.append((time.perf_counter(), "answered"))

    setattr(RequestResponseCycle, "send", watched)  # noqa: B010 - a plain assignment is no method to mypy


if __name__ == "__main__":
    for owner, method, what, afterwards in BOUNDARIES:
        _watch(owner, method, what, afterwards=afterwards)
    _watch_answers()
    atexit.register(lambda: Path("timeline.json").write_text(json.dumps(_passed)))
    app(prog_name="service with a clock")
