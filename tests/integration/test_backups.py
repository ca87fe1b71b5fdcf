"""Backups of real records: made beside a writer, verified by restoring them; a failed one leaves nothing."""

import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pytest
import sqlalchemy as sa

from backend.adapters.backups import archive
from backend.adapters.backups.directory import BackupDirectory
from backend.adapters.backups.maker import BackupMaker, verify
from backend.adapters.records import copies
from backend.adapters.records.database import Database
from backend.adapters.records.tables import metadata, notices
from backend.adapters.records.unit_of_work import FIRST_HUB, SqlRecords
from backend.errors import BackupError, ConfigFileError, InUseError
from backend.models.backups import CONFIG, RECORDS, Origin
from tests.harness.backups import NOON
from tests.harness.patience import eventually
from tests.harness.records import adding, database_url
from tests.harness.wireguard import genkey

Make = Callable[[Database], BackupMaker]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "wg0.conf"
    path.touch(mode=0o600)
    path.write_text(f"[Interface]\nPrivateKey = {genkey()[0]}\n")
    return path


@pytest.fixture
def make(tmp_path: Path, config: Path) -> Make:
    directory = BackupDirectory(tmp_path / "backups", tmp_path / "state")
    return lambda database: BackupMaker(directory, database, config, "wg0")


@pytest.fixture(params=["file", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of each kind of database that backups are made of."""
    return database_url(request, tmp_path)


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "state").iterdir() if not path.name.startswith("provisioning")}


def test_backup_holds_the_records_and_the_config_and_is_private(
    database: Database, make: Make, config: Path, tmp_path: Path
) -> None:
    records = SqlRecords(database)
    records.commit(1, 0, [adding(f"node-{n}", f"10.0.0.{n}") for n in range(2, 9)])
    made = make(database).make(Origin.COMMAND)
    assert (made.path.stat().st_mode & 0o777, made.path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert made.manifest is not None
    assert (made.manifest.peers, made.manifest.generation, made.manifest.observed_generation) == (7, 1, 0)
    assert made.manifest.database == ("sqlite" if database.engine.dialect.name == "sqlite" else "postgresql")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with made.path.open("rb") as file:
        verified = verify(file, scratch)
    assert verified.state == records.load()
    assert verified.config == config.read_bytes()
    # Every value of every table.
    with closing(Database(f"sqlite:///{verified.rebuilt}", exclusive=False)) as copy:
        for table in metadata.sorted_tables:
            statement = sa.select(table).order_by(*table.primary_key)
            with database.engine.connect() as one, copy.engine.connect() as other:
                assert one.execute(statement).all() == other.execute(statement).all(), table.name
    assert left(tmp_path) <= {"backup.lock"}


def test_file_is_private_from_birth(
    database: Database, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker, modes = make(database), []

    def write(target: IO[bytes], *rest: Any) -> None:
        modes.append(os.fstat(target.fileno()).st_mode & 0o777)
        modes.append((tmp_path / "state" / "backup.scratch" / CONFIG).stat().st_mode & 0o777)
        archive.write(target, *rest)

    monkeypatch.setattr("backend.adapters.backups.maker.write", write)
    # Nothing mends a mode afterwards: who has the file open by then goes on to read it.
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    before = os.umask(0)
    try:
        maker.make(Origin.COMMAND)
    finally:
        os.umask(before)
    assert modes == [0o600, 0o600]


def test_tables_that_are_not_ours_are_left_out(database: Database, make: Make, tmp_path: Path) -> None:
    with database.engine.begin() as connection:
        connection.exec_driver_sql('CREATE TABLE "work""flow" (secret TEXT)')
        connection.exec_driver_sql("CREATE VIEW seen AS SELECT node_id FROM peers")
        connection.exec_driver_sql('INSERT INTO "work""flow" VALUES (\'of-another-program\')')
    made = make(database).make(Origin.COMMAND)
    subprocess.run(["tar", "-xzf", made.path, "-C", tmp_path, RECORDS], check=True)
    with closing(sqlite3.connect(tmp_path / RECORDS)) as copy:
        statement = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
        names = {name for (name,) in copy.execute(statement)}
    assert names == {*metadata.tables, "alembic_version"}
    assert b"of-another-program" not in (tmp_path / RECORDS).read_bytes()


def test_writer_goes_on_beside_a_backup_which_is_of_one_moment(
    database: Database, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A write between two steps has the copy of a SQLite database begin anew, unless a transaction spans them.
    monkeypatch.setattr(copies, "_PAGES", 1)
    with database.engine.begin() as connection:
        # So many steps that some of them have a write between them.
        connection.execute(sa.text("CREATE TABLE filler (content TEXT)"))
        connection.execute(sa.text("INSERT INTO filler VALUES (:content)"), [{"content": "x" * 4000}] * 2000)
    records, stop, written = SqlRecords(database), threading.Event(), [0]

    def write() -> None:
        while not stop.is_set():
            number = written[0] + 1
            records.commit(number, 0, [adding(f"node-{number}", f"10.{number >> 8}.{number & 255}.2")])
            written[0] = number

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            eventually(lambda before=written[0]: written[0] > before + 5)  # type: ignore[misc]  # a default
            before = written[0]
            manifest = make(database).make(Origin.COMMAND).manifest
            assert manifest is not None
            # One peer a generation: a torn copy would have another number of them.
            assert before <= manifest.generation == manifest.peers <= written[0] + 1
            assert written[0] > before
    finally:
        stop.set()
        writer.join()


def test_config_that_can_not_be_used_makes_no_backup(database: Database, make: Make, config: Path) -> None:
    text = config.read_text()
    config.write_text("[Interface]\n")
    with pytest.raises(BackupError, match=r"wg0.conf can't be used"):
        make(database).make(Origin.COMMAND)
    config.unlink()
    with pytest.raises(ConfigFileError, match="doesn't exist"):
        make(database).make(Origin.COMMAND)
    config.write_text(text)
    assert make(database).directory.names() == []


@pytest.mark.parametrize("full", ["backups", "state"])
def test_full_disk_leaves_nothing_behind(
    needs_namespaces: None, database: Database, make: Make, tmp_path: Path, full: str
) -> None:
    SqlRecords(database).commit(1, 0, [adding(f"node-{n}", f"10.0.0.{n}") for n in range(2, 250)])
    maker = make(database)
    if database.url.get_backend_name() == "sqlite" and full == "state":
        # The database is there, too.
        maker = BackupMaker(
            BackupDirectory(tmp_path / "backups", tmp_path / "other"), database, tmp_path / "wg0.conf", "wg0"
        )
    place = {"backups": maker.directory.path, "state": maker.directory.state}[full]
    place.mkdir(mode=0o700, exist_ok=True)
    # Too small for it, really.
    size = "16k" if full == "backups" else "160k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", place], check=True)
    try:
        for _ in range(2):
            with pytest.raises(BackupError, match=r"No space left|is full|make room"):
                maker.make(Origin.COMMAND)
            assert {path.name for path in place.iterdir()} <= {"backup.lock"}
            assert maker.directory.names() == []
    finally:
        subprocess.run(["umount", place], check=True)
    maker.make(Origin.COMMAND)


def test_disk_that_a_backup_would_fill_is_left_alone(
    needs_namespaces: None,
    database: Database,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with database.engine.begin() as connection:
        text = os.urandom(1_000_000).hex()
        connection.execute(sa.insert(notices), {"at": NOON, "text": text, "hub": FIRST_HUB})
    maker = BackupMaker(
        BackupDirectory(tmp_path / "backups", tmp_path / "other"), database, tmp_path / "wg0.conf", "wg0"
    )
    place = maker.directory.state
    place.mkdir(mode=0o700)
    # Room for what is always to stay free, and for one copy.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m,mode=0700", "tmpfs", place], check=True)
    try:
        with monkeypatch.context() as patched:
            patched.delattr(copies, "save")
            with pytest.raises(BackupError, match="are to stay free; make room"):
                maker.make(Origin.COMMAND)
    finally:
        subprocess.run(["umount", place], check=True)
    maker.make(Origin.COMMAND)


def test_what_a_killed_process_left_is_swept_and_nothing_else(
    database: Database, make: Make, tmp_path: Path
) -> None:
    maker = make(database)
    maker.make(Origin.COMMAND)
    (name,) = maker.directory.names()
    scratch = tmp_path / "state" / "backup.scratch"
    scratch.mkdir(parents=True)
    (scratch / CONFIG).write_text("half")
    torn = maker.directory.temporary
    torn.write_text("half")
    # Another hub's is being written at the moment.
    other = BackupDirectory(maker.directory.path, tmp_path / "other").temporary
    mine = {maker.directory.path / ".notes.tmp", maker.directory.path / f"{name}.age", other}
    for path in mine:
        path.touch()
    maker.make(Origin.COMMAND)
    assert not torn.exists()
    assert not scratch.exists()
    assert all(path.exists() for path in mine)


def test_two_processes_make_no_backup_at_once(database: Database, make: Make) -> None:
    maker = make(database)
    with (
        maker.directory.locked_scratch(),
        pytest.raises(InUseError, match=rf"PID {os.getpid()}"),
        maker.directory.locked_scratch(0.1),
    ):
        pass


def test_records_that_do_not_fit_the_manifest_are_refused(
    database: Database, make: Make, tmp_path: Path
) -> None:
    maker = make(database)
    SqlRecords(database).commit(1, 0, [adding("node-1", "10.0.0.2")])
    where = tmp_path / "unpacked"
    where.mkdir()
    subprocess.run(["tar", "-xzf", maker.make(Origin.COMMAND).path, "-C", where], check=True)
    # Every hash is right, and the manifest describes other records.
    text = (where / "manifest.json").read_text().replace('"peers": 1', '"peers": 2')
    (where / "manifest.json").write_text(text)
    mixed = tmp_path / "mixed.tar.gz"
    tar = ["tar", "--format=gnu", "-czf", str(mixed), "-C", str(where), "manifest.json", CONFIG, RECORDS]
    subprocess.run(tar, check=True)
    with (
        mixed.open("rb") as file,
        maker.directory.locked_scratch() as scratch,
        pytest.raises(BackupError, match="aren't those that the manifest describes"),
    ):
        verify(file, scratch)
