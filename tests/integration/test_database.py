"""A database's set-up, its exclusive use, and what is said where it can't be used."""

import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.adapters.records.database import Database
from backend.errors import OvertakenError, StartRefusedError
from tests.harness.records import database_url


@pytest.fixture(params=["file", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    database = Database(database_url(request, tmp_path))
    database.migrate()
    yield database
    database.close()


def test_what_is_committed_survives_a_power_cut(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/records.sqlite")
    with database.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    database.close()


def test_an_old_sqlite_answers_what_dbos_asks_of_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 40, 1))
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    engine = Database(f"sqlite:///{tmp_path}/records.sqlite")
    with engine.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE t (at INTEGER NOT NULL DEFAULT (unixepoch('subsec') * 1000))"
        )
        connection.exec_driver_sql("INSERT INTO t DEFAULT VALUES")
        at = connection.exec_driver_sql("SELECT at FROM t").scalar_one()
    assert abs(at / 1000 - time.time()) < 60
    engine.close()


def test_a_database_of_a_newer_version_is_refused_in_a_sentence(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StartRefusedError, match="newer version"):
        database.migrate()


def test_a_database_whose_server_forgot_us_is_taken_again_or_given_up(postgres_database: str) -> None:
    first = Database(postgres_database)

    def restart() -> None:
        """Cut the connection that holds the lock, as a restart of the server does."""
        with first.engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_locks "
                "WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database "
                "WHERE datname = current_database())"
            )

    restart()
    first.check()
    with pytest.raises(StartRefusedError, match="another hub's service"):
        Database(postgres_database)
    restart()
    second = Database(postgres_database)
    with pytest.raises(OvertakenError):
        first.check()
    second.close()
    first.close()


def test_no_password_is_shown_wherever_the_url_has_it(tmp_path: Path) -> None:
    for url in (
        "postgresql+psycopg://u:sesame@127.0.0.1:1/d",
        "postgresql+psycopg://127.0.0.1:1/d?user=u&password=sesame",
    ):
        with pytest.raises(StartRefusedError, match="does not answer") as refused:
            Database(url)
        assert "sesame" not in str(refused.value)


def test_a_database_that_can_not_be_used_refuses_the_start_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartRefusedError, match="STATE_DIRECTORY"):
        Database(f"sqlite:///{tmp_path}/file/records.sqlite")
    with pytest.raises(StartRefusedError, match="names no file"):
        Database("sqlite://")
    (tmp_path / "text.sqlite").write_text("this is no database, and long enough to be taken for one" * 100)
    database = Database(f"sqlite:///{tmp_path}/text.sqlite")
    with pytest.raises(StartRefusedError, match="not a database"):
        database.migrate()
    database.close()
