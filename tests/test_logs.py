"""One line an event, whatever is in it."""

import io
import logging

from backend.adapters.logs import EventFormatter, Seldom, configure_logging


def logged(message: str, **fields: object) -> str:
    record = logging.makeLogRecord(
        {"name": "backend", "levelname": "INFO", "msg": message, "created": 0, **fields}
    )
    record.msecs = 7
    return EventFormatter().format(record)


def test_an_event_is_a_name_and_its_fields_in_utc() -> None:
    assert logged("peer_provisioned", node_id="node-1", address="10.0.0.2", peers=3) == (
        "1970-01-01T00:00:00.007Z INFO backend peer_provisioned node_id=node-1 address=10.0.0.2 peers=3"
    )


def test_logged_value_cannot_forge_a_field_or_an_event() -> None:
    line = logged("event", reason="a b=c\n2026-01-01T00:00:00.000Z INFO backend forged", empty="")
    assert "\n" not in line
    assert line.endswith("empty=''")
    assert "reason='a b=c\\n2026-01-01T00:00:00.000Z INFO backend forged'" in line


def test_every_log_of_the_process_comes_out_in_that_format() -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("info")
        (handler,) = root.handlers
        assert isinstance(handler, logging.StreamHandler)
        stream = io.StringIO()
        handler.setStream(stream)
        logging.getLogger("uvicorn.access").info("%s %s", "GET", "/healthz")
        logging.getLogger("alembic.runtime").info("not of interest")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert stream.getvalue().endswith("INFO uvicorn.access GET /healthz\n")
    assert stream.getvalue().count("\n") == 1


def test_clients_that_send_garbage_do_not_fill_the_log() -> None:
    now = 0.0
    seldom = Seldom(lambda: now)

    def passes(level: int, text: str) -> bool:
        return seldom(logging.makeLogRecord({"levelno": level, "msg": text}))

    garbage = "Invalid HTTP request received."
    assert [passes(logging.WARNING, garbage) for _ in range(3)] == [True, False, False]
    assert passes(logging.WARNING, "Unsupported upgrade request.")
    assert [passes(logging.ERROR, "failed") for _ in range(2)] == [True, True]
    now = 61.0
    assert passes(logging.WARNING, garbage)
