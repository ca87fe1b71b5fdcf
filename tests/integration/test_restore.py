"""`backup restore`: what comes back, what it saves first, and what it refuses."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command as alembic
from alembic.config import Config

from backend.adapters.records.database import _MIGRATIONS, Database
from backend.adapters.records.tables import hubs
from backend.adapters.records.unit_of_work import SqlRecords
from backend.models.backups import CONFIG, RECORDS
from tests.harness.backups import Place, manifest, packed
from tests.harness.requests import new_key
from tests.harness.wireguard import genkey

MakePlace = Callable[..., Place]


@pytest.fixture
def make_place(tmp_path: Path, request: pytest.FixtureRequest) -> MakePlace:
    def make(name: str, kind: str = "file") -> Place:
        url = request.getfixturevalue("postgres_database") if kind == "postgresql" else ""
        return Place(tmp_path / name, url)

    return make


@pytest.fixture
def place(make_place: MakePlace) -> Place:
    found = make_place("hub")
    found.init()
    return found


@pytest.fixture(params=["file", "postgresql"])
def each(request: pytest.FixtureRequest, make_place: MakePlace) -> Place:
    found = make_place("hub", request.param)
    found.init()
    return found


def test_restore_shows_who_comes_and_goes_and_saves_what_it_replaces(each: Place) -> None:
    each.commit(1, 2, 3)
    then = each.records()
    archive = each.back_up()
    each.commit(2, 4)
    now = each.records()
    shown = each.run("backup", "restore", archive.name)
    assert (shown.returncode, shown.stdout.count("goes:     node-4 ")) == (1, 1)
    assert "no terminal to ask at; --yes restores it" in shown.stderr
    assert each.records() == now
    said = each.restore(archive)
    assert "goes:     node-4 " in said
    assert "restored: generation 1, 2 peers" in said
    assert "credentials that were revoked since the backup work again" in said
    assert each.records() == then
    # And back again, by what was saved.
    (saved,) = each.saved()
    assert f"saved:    {saved}" in said
    assert "comes:    node-4 " in each.restore(saved)
    assert each.records() == now


@pytest.mark.parametrize(("first", "second"), [("file", "postgresql"), ("postgresql", "file")])
def test_backup_of_one_kind_of_database_is_restored_into_the_other(
    make_place: MakePlace, first: str, second: str
) -> None:
    source, target = make_place("source", first), make_place("target", second)
    source.init()
    source.commit(1, 2, 3, 4)
    secret = source.run("key", "create", "--role", "read").stdout
    target.restore(source.back_up())
    assert target.records() == source.records()
    assert target.config.read_bytes() == source.config.read_bytes()
    assert target.config.stat().st_mode & 0o777 == 0o600
    assert secret.split("_")[1] in target.run("key", "list").stdout
    assert target.run("audit", "verify").stdout.startswith("whole: ")
    # The next row gets a number behind those that were copied.
    target.commit(2, 5)
    assert target.names() == ["node-2", "node-3", "node-4", "node-5"]


def test_operators_decision_of_then_does_not_come_back_and_a_notice_does(each: Place) -> None:
    each.commit(1, 2)
    with closing(Database(each.url)) as database, database.engine.begin() as connection:
        connection.execute(sa.update(hubs).values(decision="force", decision_basis="0" * 64))
    each.restore(each.back_up())
    with closing(Database(each.url)) as database:
        status = SqlRecords(database).status()
    assert status.decision is None
    (notice,) = status.notices
    assert notice.startswith("the records were restored from a backup of ")


def test_config_stays_unless_it_is_lost_or_given_up(place: Place) -> None:
    place.commit(1, 2)
    archive, text = place.back_up(), place.config.read_text()
    edited = text + "# by hand\n"
    place.config.write_text(edited)
    assert "config:   stays as it is, and differs from the backup's" in place.restore(archive)
    assert place.config.read_text() == edited
    assert "config:   the backup's takes its place" in place.restore(archive, "--config")
    assert place.config.read_text() == text
    assert "config:   the backup's is the same" in place.restore(archive)
    place.config.unlink()
    assert "config:   there is none, so the backup's is put there" in place.restore(archive)
    assert place.config.read_text() == text


def test_config_that_can_not_be_used_is_saved_before_it_is_replaced(place: Place) -> None:
    archive, text = place.back_up(), place.config.read_text()
    place.config.write_text("broken")
    place.restore(archive, "--config")
    assert place.config.read_text() == text
    assert [path.read_text() for path in place.saved() if path.suffix == ".conf"] == ["broken"]


def test_another_hubs_backup_is_refused_unless_this_host_is_to_become_that_hub(
    place: Place, make_place: MakePlace
) -> None:
    other = make_place("other")
    other.init()
    other.commit(1, 7)
    archive = other.back_up()
    place.commit(1, 2)
    assert "this host becomes that hub" in place.refusal(archive, "--yes")
    assert place.names() == ["node-2"]
    place.settings["WIREGUARD_HUB_PUBLIC_KEY"] = genkey()[1]
    for options in (["--yes"], ["--yes", "--config"]):
        assert "WIREGUARD_HUB_PUBLIC_KEY names another one" in place.refusal(archive, *options)
    del place.settings["WIREGUARD_HUB_PUBLIC_KEY"]
    place.restore(archive, "--config")
    assert place.names() == ["node-7"]
    assert place.config.read_bytes() == other.config.read_bytes()


def test_records_that_can_not_be_read_are_saved_as_they_are(place: Place) -> None:
    place.commit(1, 2)
    archive = place.back_up()
    database = place.state / "provisioning.sqlite"
    damaged = b"no database" * 1000
    database.write_bytes(damaged)
    said = place.restore(archive)
    assert "records:  " in said
    assert "is damaged" in said
    (saved,) = place.saved()
    assert (saved.read_bytes(), saved.stat().st_mode & 0o777) == (damaged, 0o600)
    assert place.names() == ["node-2"]


def test_records_of_a_newer_version_are_saved_as_they_are(place: Place) -> None:
    place.commit(1, 2)
    archive = place.back_up()
    with closing(sqlite3.connect(place.state / "provisioning.sqlite")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    assert "was made by a newer version" in place.restore(archive)
    (saved,) = place.saved()
    with closing(sqlite3.connect(saved)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)
    assert place.names() == ["node-2"]


@pytest.mark.parametrize(
    "damage", ["UPDATE peers SET assigned_ip = '9.9'", "UPDATE alembic_version SET version_num = '9999'"]
)
def test_rows_in_postgresql_that_can_not_be_read_are_left_alone(make_place: MakePlace, damage: str) -> None:
    place = make_place("hub", "postgresql")
    place.init()
    place.commit(1, 2)
    archive = place.back_up()
    with closing(Database(place.url)) as database, database.engine.begin() as connection:
        connection.exec_driver_sql(damage)
    assert "save them with pg_dump(1), and name an empty database" in place.refusal(archive, "--yes")
    assert place.saved() == []


def test_write_ahead_log_of_the_replaced_records_is_not_taken_for_the_new_ones(place: Place) -> None:
    place.commit(1, 2)
    archive = place.back_up()
    place.commit(2, 3)
    # As a service that was killed leaves it: the newest peer is in the log alone.
    path = place.state / "provisioning.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE hubs SET generation = 3")
        connection.commit()
        for end in ("", "-wal"):
            shutil.copyfile(f"{path}{end}", place.directory / f"copy{end}")
    for end in ("", "-wal"):
        shutil.copyfile(place.directory / f"copy{end}", f"{path}{end}")
    said = place.restore(archive)
    assert "records:  generation 3, 2 peers" in said
    assert (place.names(), place.records().generation) == (["node-2"], 1)


def test_database_that_another_program_has_open_is_left_alone(place: Place) -> None:
    place.commit(1, 2)
    archive = place.back_up()
    place.commit(2, 3)
    with closing(sqlite3.connect(place.state / "provisioning.sqlite")) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT * FROM peers").fetchall()
        assert "another program has the database" in place.refusal(archive, "--yes")
    assert place.names() == ["node-2", "node-3"]


def unpacked(archive: Path, directory: Path) -> Path:
    directory.mkdir()
    subprocess.run(["tar", "-xzf", archive, "-C", directory], check=True)
    return directory


def test_backup_of_a_newer_version_is_refused(place: Place, tmp_path: Path) -> None:
    place.commit(1, 2)
    parts = unpacked(place.back_up(), tmp_path / "parts")
    with closing(sqlite3.connect(parts / RECORDS)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    archive = repacked(parts, tmp_path, schema_revision="9999", peers=1, generation=1)
    assert "made by a newer version; use that version to restore it" in place.refusal(archive, "--yes")
    assert place.names() == ["node-2"]


def repacked(parts: Path, directory: Path, **over: Any) -> Path:
    """Pack these parts under a manifest that fits them."""
    files = {name: (parts / name).read_bytes() for name in (CONFIG, RECORDS)}
    key = subprocess.run(
        ["wg", "pubkey"],
        input=files[CONFIG].split(b"PrivateKey = ")[1].splitlines()[0],
        capture_output=True,
        check=True,
    ).stdout.decode()
    said = manifest(files, **{"hub_public_key": key.strip(), "observed_generation": 0, **over})
    archive = directory / "repacked.tar.gz"
    members: Sequence[tuple[str, bytes]] = [
        ("manifest.json", said.model_dump_json().encode()),
        *files.items(),
    ]
    archive.write_bytes(packed(members).getvalue())
    return archive


def test_backup_of_an_older_version_comes_back_in_the_present_schema(each: Place, tmp_path: Path) -> None:
    parts = unpacked(each.back_up(), tmp_path / "parts")
    (parts / RECORDS).unlink()
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    with closing(Database(f"sqlite:///{parts}/{RECORDS}", exclusive=False)) as database:
        with database.engine.begin() as connection:
            config.attributes["connection"] = connection
            alembic.upgrade(config, "0001")
        with database.engine.begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO peers (node_id, wireguard_public_key, assigned_ip, public_key, provisioned_at, "
                "version, capabilities, generation) VALUES ('node-1', ?, '10.0.0.2', 'libp2p', "
                "'2026-02-19 12:00:00.000000', '1.0.0', '{}', 1)",
                (new_key(),),
            )
    with closing(sqlite3.connect(parts / RECORDS)) as plain:
        plain.execute("PRAGMA journal_mode=DELETE").close()
        generation = plain.execute("SELECT generation FROM hub_state").fetchone()[0]
    archive = repacked(
        parts, tmp_path, schema_revision="0001", peers=1, generation=generation, observed_generation=0
    )
    each.restore(archive)
    assert each.names() == ["node-1"]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE peers SET node_id = 'a' || char(10) || 'PostUp = true'",
        "UPDATE peers SET capabilities = '{'",
        "INSERT INTO notices (at, text, hub) VALUES ('x', 'y', 1)",
        "CREATE VIEW more AS SELECT 1",
    ],
)
def test_records_that_no_service_could_start_on_are_refused(each: Place, tmp_path: Path, damage: str) -> None:
    each.commit(1, 2)
    parts = unpacked(each.back_up(), tmp_path / "parts")
    with closing(sqlite3.connect(parts / RECORDS)) as connection:
        connection.execute(damage)
        connection.commit()
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    archive = repacked(parts, tmp_path, schema_revision=revision, peers=1, generation=1)
    assert "the backup's records" in each.refusal(archive, "--yes")
    assert (each.names(), each.saved()) == (["node-2"], [])


def test_what_an_archive_says_does_not_reach_the_terminal_as_it_is(place: Place, tmp_path: Path) -> None:
    place.commit(1, 2)
    parts = unpacked(place.back_up(), tmp_path / "parts")
    with closing(sqlite3.connect(parts / RECORDS)) as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    over = {"schema_revision": revision, "peers": 1, "generation": 1}
    archive = repacked(parts, tmp_path, interface="wg0\nwhole: \x1b[2J", **over)
    said = place.run("backup", "verify", archive).stdout
    assert (said.count("\n"), r"wg0\nwhole: \x1b[2J" in said) == (1, True)
    text = packed([("manifest.json", b'{"format": 1, "\\u001b[2J\\n": 1}')])
    archive.write_bytes(text.getvalue())
    assert "\x1b" not in place.refusal(archive, "--yes")


def test_torn_backup_and_no_backup_are_refused(place: Place, tmp_path: Path) -> None:
    place.commit(1, 2)
    archive = place.back_up()
    torn = tmp_path / "torn.tar.gz"
    torn.write_bytes(archive.read_bytes()[:-1])
    assert "the backup is torn" in place.refusal(torn, "--yes")
    assert "this is no backup" in place.refusal(place.config, "--yes")
    assert "doesn't exist" in place.refusal("nothing", "--yes")
    assert "is no file" in place.refusal(place.directory, "--yes")
    place.settings["ENABLE_DBOS"] = "false"
    assert "live in the service's memory" in place.refusal(archive, "--yes")
    place.settings["ENABLE_DBOS"] = "true"
    assert (place.names(), place.saved()) == (["node-2"], [])


def test_service_that_runs_keeps_its_records(each: Place) -> None:
    archive = each.back_up()
    with closing(Database(each.url)):
        assert "is already " in each.refusal(archive, "--yes")
    each.restore(archive)


def test_place_that_can_not_be_made_is_named(place: Place, tmp_path: Path) -> None:
    archive = place.back_up()
    (tmp_path / "file").touch()
    place.settings["WIREGUARD_CONFIG_PATH"] = tmp_path / "file" / "wg0.conf"
    assert "file can't be read or written" in place.refusal(archive, "--yes")


def test_owner_of_the_replaced_database_stays(place: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    archive = place.back_up()
    path = place.state / "provisioning.sqlite"
    os.chown(path, -1, 4711)
    place.restore(archive)
    assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (4711, 0o600)
