"""The same service with its records in PostgreSQL."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from backend.adapters.records.database import Database
from tests.harness.crowds import post_all
from tests.harness.requests import PEERS, PROVISION, provision_body
from tests.harness.service import StartService
from tests.harness.three_places import assert_in_step, settings_for
from tests.harness.wireguard import HubInterface


def test_peers_survive_a_kill_in_postgresql_too(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, postgres_database: str
) -> None:
    settings = settings_for(hub_interface, tmp_path, DATABASE_URL=postgres_database)
    service = start_service(settings)
    odd = provision_body("odd", metadata={"nul": "\x00", "text": "\u2028"})
    answers = asyncio.run(
        post_all(service, iter([odd, *(provision_body(f"node-{n}") for n in range(100))]), clients=16)
    )
    assert Counter(answer.status_code for answer in answers) == {200: 101}
    assert service.client.delete(f"{PEERS}/node-7").status_code == 200
    before = assert_in_step(service, hub_interface)
    service.kill()
    service.start()
    assert assert_in_step(service, hub_interface) == before
    assert service.client.post(PROVISION, json=odd).status_code == 409
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["admin.header"]


def test_a_database_has_one_hub(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, postgres_database: str
) -> None:
    settings = settings_for(hub_interface, tmp_path, DATABASE_URL=postgres_database)
    first = start_service(settings)
    other = tmp_path / "other" / hub_interface.config_path.name
    other.parent.mkdir()
    other.write_bytes(hub_interface.config_path.read_bytes())
    # Without the interface, which has a lock of its own.
    alone = {"WIREGUARD_CONFIG_PATH": other, "WIREGUARD_RELOAD": "off"}
    second = start_service({**settings, **alone}, ready=None)
    assert second.wait_exit() != 0
    assert "already used by another hub's service; give each hub its own" in second.log
    assert first.client.post(PROVISION, json=provision_body("node-1")).status_code == 200


def test_a_database_that_does_not_answer_stops_the_start_without_its_password(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    url = "postgresql+psycopg://user:sesame@127.0.0.1:1/nothing"
    service = start_service(settings_for(hub_interface, tmp_path, DATABASE_URL=url), ready=None)
    assert service.wait_exit() != 0
    assert "does not answer; check DATABASE_URL" in service.log
    assert "sesame" not in service.log
    assert "Traceback" not in service.log


def test_records_are_durable_in_the_database_that_the_environment_names(
    postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where DATABASE_URL has no name, libpq takes it from PGDATABASE, or the user's."""
    url = sa.make_url(postgres_database)
    monkeypatch.setenv("PGDATABASE", url.database or "")
    database = Database(url.set(database=None).render_as_string(hide_password=False))
    try:
        assert database.durable
        with database.engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT current_database()").scalar_one() == url.database
    finally:
        database.close()
