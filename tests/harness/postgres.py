"""A temporary PostgreSQL cluster."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql

from tests.harness.requirements import find_tool, require
from tests.harness.service import free_port

_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 20.0
_ATTEMPTS: Final = 3


@contextmanager
def postgres_cluster() -> Iterator[str]:
    """Run a cluster on 127.0.0.1 and yield the URL of its `postgres` database, or skip the test."""
    require("initdb", "postgres")
    initdb = find_tool("initdb")
    assert initdb is not None
    # initdb looks for postgres beside itself, and not beside a link to it.
    programs = initdb.resolve().parent
    account = _unprivileged_account()
    directory = Path(tempfile.mkdtemp(prefix="wireguard-provisioning-postgres-"))
    try:
        if account is not None:
            os.chown(directory, account.pw_uid, account.pw_gid)
        _initialise(programs, directory / "data", account)
        with _server(programs, directory, account) as port:
            yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(directory)


def fresh_database(url: str) -> str:
    """Make an empty database in the cluster that `url` belongs to, and return its URL.

    The one before is dropped now, and not at the end of its test: by now its service has ended. One whose
    database vanishes takes ten seconds to end.
    """
    server, _, _ = url.rpartition("/")
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(url.replace("+psycopg", "", 1), autocommit=True) as connection:
        before = connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'test%'").fetchall()
        for (old,) in before:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(old)))
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return f"{server}/{name}"


def _unprivileged_account() -> pwd.struct_passwd | None:
    """Choose the user that runs the server: PostgreSQL refuses root. None means the caller."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _popen(argv: list[str | Path], log: Path, account: pwd.struct_passwd | None) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "TZ": "UTC"},
            cwd=log.parent,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
            start_new_session=True,
        )


def _initialise(programs: Path, data: Path, account: pwd.struct_passwd | None) -> None:
    log = data.parent / "initdb.log"
    options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
    process = _popen([programs / "initdb", "--pgdata", data, *options], log, account)
    try:
        status = process.wait(60)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if status != 0:
        raise RuntimeError(f"initdb: {log.read_text()}")


@contextmanager
def _server(programs: Path, directory: Path, account: pwd.struct_passwd | None) -> Iterator[int]:
    log = directory / "postgres.log"
    # Nothing here has to survive a power failure.
    settings = [
        "fsync=off",
        "synchronous_commit=off",
        "full_page_writes=off",
        "max_connections=200",
        "unix_socket_directories=",
        "listen_addresses=127.0.0.1",
    ]
    options = [part for setting in settings for part in ("-c", setting)]
    for attempt in range(1, _ATTEMPTS + 1):
        port = free_port()
        command: list[str | Path] = [
            programs / "postgres",
            "-D",
            directory / "data",
            "-p",
            str(port),
            *options,
        ]
        process = _popen(command, log, account)
        try:
            if _wait_until_it_answers(process, port):
                yield port
                return
            if attempt == _ATTEMPTS or "Address already in use" not in log.read_text():
                raise RuntimeError(f"postgres: {log.read_text()}")
        finally:
            _stop(process)


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres", connect_timeout=5).close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return True
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        # SIGINT is the fast shutdown: open connections are cut.
        process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_SECONDS)
    except BaseException:
        process.kill()
        process.wait()
        raise
