"""Requests over a limit: counted, and logged in one line."""

from types import SimpleNamespace

import pytest

from backend.services.access.limited_requests import LimitedRequests

HERE = "192.0.2.1"


def test_requests_are_one_line_however_many_and_from_wherever(caplog: pytest.LogCaptureFixture) -> None:
    limited = LimitedRequests()
    limited.report()
    assert caplog.records == []
    for subnet in range(60):
        for number in range(50):
            limited.count(f"2001:db8:{subnet:x}:{number:x}::1")
        limited.count(HERE)
    limited.count(None)
    limited.report()
    limited.report()
    (line,) = caplog.records
    assert line.message == "requests_limited"
    assert vars(line)["requests"] == 60 * 51 + 1
    # Memory is bounded: further sources are counted together.
    assert vars(line)["sources"] == 1001


def test_line_names_the_source_with_the_most_requests(caplog: pytest.LogCaptureFixture) -> None:
    limited = LimitedRequests()
    for source in (HERE, "2001:db8::1", HERE):
        limited.count(source)
    limited.report()
    (line,) = map(vars, caplog.records)
    assert (line["requests"], line["sources"], line["most_from"], line["of_them"]) == (3, 2, HERE, 2)


def test_first_line_comes_at_once_and_the_next_a_minute_later(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(
        "backend.services.access.limited_requests.time", SimpleNamespace(monotonic=lambda: now)
    )
    limited = LimitedRequests()
    limited.report_in_time()
    assert caplog.records == []
    for number in range(3):
        limited.count(HERE)
        limited.report_in_time()
        assert len(caplog.records) == 1, number
    now += 60
    limited.report_in_time()
    assert [vars(line)["requests"] for line in caplog.records] == [1, 2]
