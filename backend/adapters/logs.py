"""One line an event on stderr: time, level, logger, the event's name, and its fields as key=value."""

import logging
import time
from collections.abc import Callable
from typing import Final

from backend.models.fields import redacted

# uvicorn's: address, method, path, HTTP's version, status.
_ACCESS_ARGUMENTS: Final = 5
_SELDOM_SECONDS: Final = 60.0

# The attributes of every record; any other one came in by `extra`.
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class EventFormatter(logging.Formatter):
    """Writes RFC 3339 times in UTC, and quotes a field's value where it has white space or quotes."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """Put the fields behind the event."""
        fields = [f"{key}={_quoted(value)}" for key, value in vars(record).items() if key not in _OWN]
        return " ".join([super().formatMessage(record), *fields])

    def format(self, record: logging.LogRecord) -> str:
        """Return the whole line, without the secrets of credentials that were sent in a wrong place."""
        return redacted(super().format(record))


def _without_query(record: logging.LogRecord) -> bool:
    """Leave the query out of uvicorn's line for a request: a client may put a secret there."""
    if isinstance(record.args, tuple) and len(record.args) == _ACCESS_ARGUMENTS:
        address, method, path, *rest = record.args
        record.args = (address, method, str(path).partition("?")[0], *rest)
    return True


class Seldom:
    """Lets each warning pass once a minute: any client can bring about those of uvicorn at any rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By the text before its arguments are filled in: there are few of these.
        self._again_at: dict[str, float] = {}

    def __call__(self, record: logging.LogRecord) -> bool:
        """Say whether the record is written."""
        if record.levelno != logging.WARNING:
            return True
        now = self._clock()
        if now < self._again_at.get(str(record.msg), now):
            return False
        self._again_at[str(record.msg)] = now + _SELDOM_SECONDS
        return True


def _quoted(value: object) -> str:
    text = str(value)
    return repr(text) if not text or not text.isprintable() or any(c in text for c in " \"'=") else text


def configure_logging(level: str) -> None:
    """Send everything of this process, DBOS's and uvicorn's logs too, to stderr in that format."""
    handler = logging.StreamHandler()
    handler.setFormatter(EventFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").addFilter(_without_query)
    logging.getLogger("uvicorn.error").addFilter(Seldom())
    # It logs each migration at each start.
    logging.getLogger("alembic").setLevel(logging.WARNING)
