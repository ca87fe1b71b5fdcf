"""PostgreSQL: connections that give up on a server that hangs, and the lock that makes the database ours."""

import math
import secrets
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any, Final, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg.abc import PQGen
from sqlalchemy.exc import SQLAlchemyError

from backend.adapters.records.availability import Availability
from backend.errors import OvertakenError, RecordsUnavailableError

_Value = TypeVar("_Value")

# How long the server may say nothing before a connection is given up: seconds. A request is answered
# within 5 s, so one such wait and one try to connect must fit into that.
SILENCE_SECONDS: Final = 3.0
# A command of an operator's has time: it reads whole logs, and waits for whatever the service does.
_PATIENT_SECONDS: Final = 60.0
# Any number that nothing else takes: "wgprov" in ASCII.
_ADVISORY_LOCK: Final = 0x776770726F76
# How long sessions that were told to end may take for it: seconds.
_ENDING_SECONDS: Final = 2.0
_ENDING_POLL_SECONDS: Final = 0.02

NOTHING_CHANGED: Final = "the database does not answer; nothing was changed"

# libpq's (https://www.postgresql.org/docs/current/libpq-connect.html): a peer that is gone is found out.
_CONNECTION: Final[Mapping[str, int]] = {
    # libpq takes no less.
    "connect_timeout": 2,
    "keepalives": 1,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 3000,
}
# The server's: it ends statements that we gave up on and sessions of dead processes, with their locks.
_SESSION: Final[Mapping[str, int]] = {
    "tcp_keepalives_idle": 2,
    "tcp_keepalives_interval": 1,
    "tcp_keepalives_count": 3,
    "tcp_user_timeout": 5000,
}
# For the service, in milliseconds: less than SILENCE_SECONDS, so that the server's own word comes first.
_SERVICE_SESSION: Final[Mapping[str, int]] = {
    "statement_timeout": 2800,
    "lock_timeout": 2000,
    "idle_in_transaction_session_timeout": 5000,
}


# An acknowledged peer survives a crash of the server, also where it is tuned to lose the last commits.
_DURABLE: Final = (
    "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
)


class NoAnswerError(psycopg.OperationalError):
    """The server has said nothing for too long, on a connection of that age by time.monotonic()."""

    def __init__(self, seconds: float, opened_at: float) -> None:
        super().__init__(f"no answer within {seconds:g} s")
        self.opened_at = opened_at


class ImpatientConnection(psycopg.Connection[Any]):
    """Closes itself and raises NoAnswerError where the server says nothing for `silence_seconds`.

    libpq waits for ever for a server whose host still answers, as when its processes are stopped. The server
    may still carry out the last statement.
    """

    silence_seconds = SILENCE_SECONDS
    opened_at = math.inf

    def wait(self, gen: PQGen[_Value], *args: Any, **kwargs: Any) -> _Value:
        """Wait as psycopg does, but not for ever."""
        try:
            return super().wait(_bounded(gen, self.silence_seconds), *args, **kwargs)
        except TimeoutError:
            self.close()
            raise NoAnswerError(self.silence_seconds, self.opened_at) from None

    def notifies(self, *args: Any, **kwargs: Any) -> Generator[psycopg.Notify]:
        """Wait for notifications, of which there may be none for long."""
        silence_seconds, self.silence_seconds = self.silence_seconds, math.inf
        try:
            yield from super().notifies(*args, **kwargs)
        finally:
            self.silence_seconds = silence_seconds


def _bounded(gen: PQGen[_Value], seconds: float) -> PQGen[_Value]:
    """Go through psycopg's generator, to which each wait for the socket is sent as it ends."""
    try:
        wanted = next(gen)
        heard_at = time.monotonic()
        while True:
            ready = yield wanted
            if ready:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > seconds:
                raise TimeoutError
            wanted = gen.send(ready)
    except StopIteration as end:
        value: _Value = end.value
        return value


@contextmanager
def without_timeouts(connection: sa.Connection) -> Iterator[None]:
    """Let the statements of this transaction take as long as they need: a migration's may."""
    driver = connection.connection.driver_connection
    if not isinstance(driver, ImpatientConnection):
        yield
        return
    silence_seconds, driver.silence_seconds = driver.silence_seconds, math.inf
    try:
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        yield
    finally:
        driver.silence_seconds = silence_seconds


class PostgreSQL:
    """An engine for one process, and the advisory lock that it may hold on the database.

    Only `check` tries to reach a server that is away: all other connections fail at once, so that no thread
    is kept.
    """

    def __init__(self, url: sa.URL, availability: Availability, *, patient: bool, pool_size: int) -> None:
        self._availability = availability
        self._silence_seconds = _PATIENT_SECONDS if patient else SILENCE_SECONDS
        self._session = dict(_SESSION) if patient else {**_SESSION, **_SERVICE_SESSION}
        # This process's, to tell its own sessions from another service's.
        self._application = f"wireguard-provisioning {secrets.token_hex(4)}"
        self.engine = sa.create_engine(
            url,
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_timeout=SILENCE_SECONDS,
            # A connection that the server has closed meanwhile is found out before it is used.
            pool_pre_ping=True,
            connect_args={
                **{name: value for name, value in _CONNECTION.items() if name not in url.query},
                "application_name": self._application,
            },
        )
        sa.event.listen(self.engine, "do_connect", self._connect)
        sa.event.listen(self.engine, "connect", self._begin_session)
        if not patient:
            sa.event.listen(self.engine, "handle_error", self._note_error)
        # Guards the two below; held while a thread checks whether the server answers.
        self._lock = Lock()
        self._presence: sa.Connection | None = None
        self._probing: int | None = None

    def occupy(self) -> bool:
        """Take the lock that says whose the database is, by a connection that is kept for it."""
        self.leave()
        self._presence = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._end_own_sessions(self._presence)
        return bool(self._presence.scalar(sa.select(sa.func.pg_try_advisory_lock(_ADVISORY_LOCK))))

    def leave(self) -> None:
        """Let go of the lock."""
        if self._presence is not None:
            self._presence.invalidate()
            self._presence.close()
            self._presence = None

    def check(self) -> None:
        """Raise OvertakenError where another process has the lock, and SQLAlchemyError where it's away."""
        at_once = self._lock.acquire(blocking=False)
        if not at_once and not self._lock.acquire(timeout=SILENCE_SECONDS):
            raise RecordsUnavailableError(NOTHING_CHANGED)
        try:
            # A thread that waited for another one's check takes its outcome.
            if not at_once and self._availability.reason is not None:
                raise RecordsUnavailableError(NOTHING_CHANGED)
            self._probing = get_ident()
            self._check()
        finally:
            self._probing = None
            self._lock.release()

    def _check(self) -> None:
        if self._presence is not None and self._availability.reason is None:
            try:
                self._presence.execute(sa.select(1))
            except SQLAlchemyError as exc:
                if isinstance(getattr(exc, "orig", None), NoAnswerError):
                    raise
            else:
                return
        # The lock went with the connection, and another process may have it now.
        if not self.occupy():
            self.leave()
            raise OvertakenError

    def _end_own_sessions(self, connection: sa.Connection) -> None:
        """End what the server still has of this process: with it goes the lock, and a commit in doubt.

        A session outlives a connection that was given up, until the server finds out. It may hold the lock,
        and it may yet commit what it was sent last.
        """
        ours = (
            "FROM pg_stat_activity WHERE application_name = :ours AND usename = current_user "
            "AND datname = current_database() AND pid <> pg_backend_pid()"
        )
        values = {"ours": self._application}
        ended = connection.execute(sa.text(f"SELECT pg_terminate_backend(pid) {ours}"), values).all()
        deadline = time.monotonic() + _ENDING_SECONDS
        while ended and time.monotonic() < deadline:
            if not connection.scalar(sa.text(f"SELECT count(*) {ours}"), values):
                return
            time.sleep(_ENDING_POLL_SECONDS)

    def _connect(
        self, _dialect: object, _record: object, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> ImpatientConnection:
        reason = self._availability.reason
        if reason is not None and self._probing != get_ident():
            raise psycopg.OperationalError(reason)
        connection = ImpatientConnection.connect(*args, **kwargs)
        connection.silence_seconds, connection.opened_at = self._silence_seconds, time.monotonic()
        return connection

    def _begin_session(self, connection: ImpatientConnection, _record: object) -> None:
        # Not as a part of a transaction, or a rollback would take it back.
        connection.autocommit = True
        settings = [f"SET {name} = {value}" for name, value in self._session.items()]
        connection.execute("; ".join([*settings, _DURABLE]).encode())
        connection.autocommit = False

    def _note_error(self, context: sa.engine.ExceptionContext) -> None:
        error = context.original_exception
        if not isinstance(error, psycopg.OperationalError):
            return
        lost = context.is_disconnect or context.connection is None
        # A connection that the server has closed while it wasn't used is replaced, and no more than that.
        if not isinstance(error, NoAnswerError) and (not lost or context.is_pre_ping):
            return
        # One of before an outage that is over says nothing of now.
        if _opened_at(context) >= self._availability.found_at:
            self._availability.lost(said(error))


def _opened_at(context: sa.engine.ExceptionContext) -> float:
    if isinstance(context.original_exception, NoAnswerError):
        return context.original_exception.opened_at
    used = context.connection
    if used is None or used.closed or used.invalidated:
        return math.inf
    driver = used.connection.driver_connection
    return driver.opened_at if isinstance(driver, ImpatientConnection) else math.inf


def said(exc: Exception) -> str:
    """Return the driver's own first line: SQLAlchemy's text would quote the statement and its values."""
    text = str(getattr(exc, "orig", None) or exc).strip()
    return text.splitlines()[0] if text else type(exc).__name__
