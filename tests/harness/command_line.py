"""`python -m backend` with no settings but the given ones: as a process, or in this one."""

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final
from unittest.mock import patch

from typer.testing import CliRunner

from backend.__main__ import app

ROOT: Final = Path(__file__).parents[2]


def backend(
    *arguments: str, directory: Path, settings: Mapping[str, object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in `directory` as a process of its own."""
    inherited = {
        name: value for name, value in os.environ.items() if name == "PATH" or name.startswith("COVERAGE_")
    }
    return subprocess.run(
        [sys.executable, "-m", "backend", *arguments],
        cwd=directory,
        env={**inherited, "PYTHONPATH": str(ROOT), **_given(settings)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def invoke(
    *arguments: str, directory: Path, settings: Mapping[str, object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that comes to its end by itself in this process, which takes a tenth of the time.

    Not for threads: environment and working directory are the process's. Raises an unexpected exception.
    """
    with _surroundings(directory, {"PATH": os.environ["PATH"], **_given(settings)}):
        result = CliRunner().invoke(app, arguments, prog_name="python -m backend")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def hub_settings(directory: Path) -> dict[str, object]:
    """Return the settings of a hub that is a file only."""
    return {
        "WIREGUARD_CONFIG_PATH": directory / "wg0.conf",
        "WIREGUARD_RELOAD": "off",
        "STATE_DIRECTORY": directory / "state",
        "ENABLE_DBOS": "false",
    }


def _given(settings: Mapping[str, object] | None) -> dict[str, str]:
    return {name: str(value) for name, value in (settings or {}).items()}


@contextlib.contextmanager
def _surroundings(directory: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Put back, too, what a command changes for its whole process; `serve` changes the most."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    on_signal = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    umask = os.umask(0)
    os.umask(umask)
    try:
        with contextlib.chdir(directory), patch.dict(os.environ, environment, clear=True):
            yield
    finally:
        os.umask(umask)
        for number, handler in on_signal.items():
            signal.signal(number, handler)
        root.handlers[:] = handlers
        root.setLevel(level)
        gc.enable()
