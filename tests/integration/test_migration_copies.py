"""The copy of a SQLite database that is made before its schema is changed."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from backend.adapters.records.database import _MIGRATIONS, Database, open_beside
from backend.command_parts import open_access, open_hub_decisions
from backend.errors import StartRefusedError
from backend.models.setting_values import ReloadMode
from backend.settings import Settings
from tests.harness.requests import new_key
from tests.harness.service import StartService
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface


def make_old(path: Path) -> sqlite3.Connection:
    """Make a database of the first version with a peer that is in its write-ahead log alone."""
    database = Database(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    database.close()
    opened = sqlite3.connect(path)
    opened.execute(
        "INSERT INTO peers (node_id, wireguard_public_key, assigned_ip, public_key, provisioned_at, version, "
        "capabilities, generation) VALUES ('node-1', ?, '10.0.0.2', 'libp2p', '2026-02-19 12:00:00.000000', "
        "'1.0.0', '{}', 1)",
        (new_key(),),
    )
    opened.commit()
    assert path.with_name(path.name + "-wal").stat().st_size > 0
    return opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records" / "records.sqlite"


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def old(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(make_old(path)) as opened:
        yield opened


def revision(path: Path) -> str:
    with closing(sqlite3.connect(path)) as opened:
        found: str = opened.execute("SELECT version_num FROM alembic_version").fetchone()[0]
    return found


def test_a_database_is_copied_whole_before_its_schema_is_changed(
    old: sqlite3.Connection, path: Path, copies: Path
) -> None:
    umask = os.umask(0)
    try:
        open_beside(f"sqlite:///{path}", copies).close()
    finally:
        os.umask(umask)
    assert revision(path) != "0001"
    assert [file.name for file in copies.iterdir()] == ["before-0001.sqlite"]
    copy = copies / "before-0001.sqlite"
    assert (copy.stat().st_mode & 0o777, copies.stat().st_mode & 0o777) == (0o600, 0o700)
    assert revision(copy) == "0001"
    with closing(sqlite3.connect(copy)) as opened:
        assert opened.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert opened.execute("SELECT node_id FROM peers").fetchall() == [("node-1",)]
    # It is what it was for: with the older version it works on.
    shutil.copyfile(copy, copies / "again.sqlite")
    Database(f"sqlite:///{copies}/again.sqlite").close()


def test_a_new_or_current_database_is_not_copied(path: Path, copies: Path) -> None:
    for _ in range(2):
        database = Database(f"sqlite:///{path}", copies=copies)
        database.migrate()
        database.close()
    assert not copies.exists()


def test_a_database_that_can_not_be_copied_is_left_as_it_was(
    needs_namespaces: None, old: sqlite3.Connection, path: Path, copies: Path
) -> None:
    copies.mkdir(mode=0o700)
    database = Database(f"sqlite:///{path}", copies=copies)
    # Too small for it, really.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k,mode=0700", "tmpfs", copies], check=True)
    try:
        with pytest.raises(
            StartRefusedError, match=r"before-0001.sqlite can't be written \(.*make room for it"
        ):
            database.migrate()
        assert list(copies.iterdir()) == []
    finally:
        subprocess.run(["umount", copies], check=True)
        database.close()
    assert revision(path) == "0001"


def test_interrupted_copy_is_not_taken_for_a_copy(
    old: sqlite3.Connection, path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    database = Database(f"sqlite:///{path}", copies=copies)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(StartRefusedError, match="Input/output error"):
                database.migrate()
        assert list(copies.iterdir()) == []
        # Nor does what a process that died has left stand in the way.
        (copies / ".before-0001.sqlite.tmp").write_text("half")
        database.migrate()
    finally:
        database.close()
    assert [file.name for file in copies.iterdir()] == ["before-0001.sqlite"]


def test_the_last_three_copies_are_kept(old: sqlite3.Connection, path: Path, copies: Path) -> None:
    copies.mkdir(mode=0o700)
    for age, name in enumerate(("0005", "0004", "0003", "0002"), start=1):
        (copies / f"before-{name}.sqlite").touch()
        os.utime(copies / f"before-{name}.sqlite", (1_000_000 - age, 1_000_000 - age))
    (copies / "before-christmas.txt").touch()
    open_beside(f"sqlite:///{path}", copies).close()
    kept = {"before-0001.sqlite", "before-0005.sqlite", "before-0004.sqlite", "before-christmas.txt"}
    assert {file.name for file in copies.iterdir()} == kept


def test_a_database_of_a_newer_version_is_neither_copied_nor_changed(
    old: sqlite3.Connection, path: Path, copies: Path
) -> None:
    old.execute("UPDATE alembic_version SET version_num = '9999'")
    old.commit()
    with pytest.raises(StartRefusedError, match="newer version"):
        open_beside(f"sqlite:///{path}", copies)
    assert not copies.exists()


def test_a_service_copies_its_database_into_its_state_directory(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, path: Path
) -> None:
    make_old(path).close()
    start_service(settings_for(hub_interface, tmp_path, DATABASE_URL=f"sqlite:///{path}"))
    assert revision(tmp_path / "state" / "before-0001.sqlite") == "0001"


@pytest.mark.parametrize("opened", [open_access, open_hub_decisions])
def test_a_command_copies_the_database_into_the_state_directory(
    opened: Callable[[Settings], AbstractContextManager[object]],
    old: sqlite3.Connection,
    path: Path,
    copies: Path,
) -> None:
    settings = Settings(
        database_url=f"sqlite:///{path}",
        state_directory=copies,
        wireguard_config_path=path.with_name("wg0.conf"),
        wireguard_reload=ReloadMode.OFF,
    )
    with opened(settings):
        assert revision(copies / "before-0001.sqlite") == "0001"


def test_postgresql_is_not_copied(postgres_database: str, copies: Path) -> None:
    database = Database(postgres_database, copies=copies)
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    try:
        with database.engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "0001")
        database.migrate()
        with database.engine.connect() as connection:
            assert sa.inspect(connection).has_table("credentials")
    finally:
        database.close()
    assert not copies.exists()
