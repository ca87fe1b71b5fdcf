"""The parts as a whole: what runs while the service does, and what is left when it has stopped."""

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backend.adapters.host.private_files import ADMIN_HEADER
from backend.command_parts import open_access
from backend.composition import running_service
from backend.errors import StartRefusedError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome, AuditQuery
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.models.wireguard.provisioning import ProvisioningRequest
from backend.settings import Settings, load_settings
from tests.harness.requests import provision_body

MakeSettings = Callable[..., Settings]


@pytest.fixture
def make_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeSettings:
    """Return the settings of a hub of its own that is a file only."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "wg7", *, enable_dbos: bool = True) -> Settings:
        path = tmp_path / f"{name}.conf"
        path.touch(mode=0o600)
        path.write_text(f"[Interface]\nPrivateKey = {WireGuardPrivateKey.generate().reveal()}\n")
        return load_settings(
            wireguard_config_path=path,
            wireguard_reload="off",
            state_directory=tmp_path / f"state-{name}",
            enable_dbos=enable_dbos,
        )

    return make


def loops_that_run() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("loop-")}


def test_loops_run_as_long_as_the_service(make_settings: MakeSettings) -> None:
    with running_service(make_settings(enable_dbos=False)):
        assert {"loop-credentials", "loop-audit"} <= loops_that_run()
    assert loops_that_run() == set()


def test_service_makes_backups_of_durable_records_unless_it_keeps_none(make_settings: MakeSettings) -> None:
    settings = make_settings()
    with running_service(settings):
        assert "loop-backups" in loops_that_run()
    with running_service(settings.model_copy(update={"wireguard_backup_keep": 0})):
        assert "loop-backups" not in loops_that_run()
    with running_service(make_settings("wg8", enable_dbos=False)):
        assert "loop-backups" not in loops_that_run()


def test_start_is_refused_where_other_users_could_change_the_backups(make_settings: MakeSettings) -> None:
    settings = make_settings()
    settings.backup_directory.mkdir(parents=True)
    settings.backup_directory.chmod(0o777)
    with (
        pytest.raises(StartRefusedError, match="WIREGUARD_BACKUP_DIRECTORY is within"),
        running_service(settings),
    ):
        pass


def test_header_of_the_admin_is_there_as_long_as_its_key_is_good(make_settings: MakeSettings) -> None:
    settings = make_settings(enable_dbos=False)
    header = settings.state_directory / ADMIN_HEADER
    with running_service(settings):
        assert header.exists()
    assert not header.exists()


def test_last_audit_events_are_written_at_stop(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings()
    event = AuditEvent(datetime.now(UTC), AuditAction.AUTHENTICATE, AuditOutcome.REFUSED, "nobody", "last")
    with running_service(settings) as service:
        service.access.audit.note(event)
    with open_access(settings) as store:
        assert [
            record.event.subject for record in store.audit_page(AuditQuery(limit=10, subject="last"))
        ] == ["last"]


def test_start_that_is_refused_halfway_leaves_every_lock_to_the_next(
    make_settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make_settings("wg7"), make_settings("wg8")
    with running_service(first), caplog.at_level(logging.INFO):
        # DBOS runs once in a process; nearly everything else has been started by then.
        with pytest.raises(StartRefusedError, match="DBOS runs once in a process"), running_service(second):
            pass
        assert caplog.messages[-1] == "service_stopped"
        assert not (second.state_directory / ADMIN_HEADER).exists()
    with running_service(second) as service:
        request = ProvisioningRequest.model_validate(provision_body("node-1"))
        assert str(service.provision_peer(request, 30).assigned_ip) == "10.0.0.2"
