"""The service makes its files private, and refuses to start where other users could change them."""

import os
import re
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.command_line import hub_settings, invoke
from tests.harness.requests import PROVISION, provision_body
from tests.harness.service import ServiceFailedError, ServiceProcess

ROOT = Path(__file__).parents[2]

# A host program with the loosest umask there is, and nothing of ours around the router.
FOREIGN_APP = """
    import asyncio, os, sys
    os.umask(0)
    import httpx
    from pathlib import Path
    from fastapi import FastAPI
    from backend.api.v1.endpoints.wireguard_provisioning import router
    from tests.integration.test_file_modes import FILES, modes

    async def main():
        app = FastAPI()
        app.include_router(router, prefix="/api/v1")
        async with app.router.lifespan_context(app):
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")
            from tests.harness.requests import PROVISION, provision_body
            name, _, value = Path("var/lib/admin.header").read_text().strip().partition(": ")
            client.headers[name] = value
            answer = await client.post(PROVISION, json=provision_body("node-1"))
            assert answer.status_code == 200, answer.text
            assert modes(Path.cwd()) == FILES, modes(Path.cwd())

    asyncio.run(main())
"""

FILES = {
    "etc": 0o40700,
    "etc/.wg0.conf.lock": 0o100600,
    "etc/.wg0.conf.mark": 0o100600,
    "etc/wg0.conf": 0o100600,
    "var": 0o40700,
    "var/lib": 0o40700,
    "var/lib/admin.header": 0o100600,
    "var/lib/provisioning.sqlite": 0o100600,
    "var/lib/provisioning.sqlite-shm": 0o100600,
    "var/lib/provisioning.sqlite-wal": 0o100600,
    "var/lib/provisioning.sqlite.lock": 0o100600,
}


def modes(directory: Path) -> dict[str, int]:
    """Return the type and mode of everything below."""
    return {
        str(path.relative_to(directory)): path.lstat().st_mode
        for path in sorted(directory.rglob("*"))
        if path.name != "service.log"  # the harness's
    }


def durable_settings(directory: Path) -> dict[str, object]:
    return {
        "WIREGUARD_CONFIG_PATH": directory / "etc" / "wg0.conf",
        "WIREGUARD_RELOAD": "off",
        "STATE_DIRECTORY": directory / "var" / "lib",
    }


def test_every_file_of_a_running_service_is_private(tmp_path: Path) -> None:
    settings = durable_settings(tmp_path)
    before = os.umask(0)
    try:
        assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
        with ServiceProcess(tmp_path, settings) as service:
            for number in range(3):
                body = provision_body(f"node-{number}")
                assert service.client.post(PROVISION, json=body).status_code == 200
            status = Path(f"/proc/{service.pid}/status").read_text()
            limits = Path(f"/proc/{service.pid}/limits").read_text()
            found = modes(tmp_path)
    finally:
        os.umask(before)
    assert "Umask:\t0077\n" in status
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    assert found == FILES


def test_the_router_in_an_app_without_a_umask_makes_private_files_too(tmp_path: Path) -> None:
    settings = {name: str(value) for name, value in durable_settings(tmp_path).items()}
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    inherited = {
        name: value for name, value in os.environ.items() if name == "PATH" or name.startswith("COVERAGE_")
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FOREIGN_APP)],
        cwd=tmp_path,
        env={**inherited, "PYTHONPATH": str(ROOT), **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["run", "--port", "0"], ["hub", "up"]])
def test_config_in_a_world_writable_directory_is_refused(tmp_path: Path, command: list[str]) -> None:
    settings = hub_settings(tmp_path / "etc")
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    (tmp_path / "etc").chmod(0o777)
    done = invoke(*command, directory=tmp_path, settings=settings | {"STATE_DIRECTORY": tmp_path / "state"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: WIREGUARD_CONFIG_PATH is within other users' reach: they can write to {tmp_path}/etc (mode "
        f"0777); run `chmod go-w {tmp_path}/etc`, or choose another place"
    )
    assert [path.name for path in (tmp_path / "etc").iterdir()] == ["wg0.conf"]


def test_init_writes_no_key_where_others_could_take_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    done = invoke("hub", "init", directory=tmp_path, settings=hub_settings(tmp_path))
    assert done.returncode == 1
    assert f"they can make files in {tmp_path}; choose another place" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["serve", "run"])
def test_world_writable_state_directory_is_refused(tmp_path: Path, command: str) -> None:
    settings = hub_settings(tmp_path)
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o777)
    done = invoke(command, "--port", "0", directory=tmp_path, settings=settings)
    assert done.returncode == 1
    assert f"error: STATE_DIRECTORY is within other users' reach: they can write to {state} " in done.stderr
    assert list(state.iterdir()) == []


def test_a_database_that_others_may_write_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    database = elsewhere / "records.sqlite"
    database.touch()
    database.chmod(0o666)
    settings = durable_settings(tmp_path) | {"DATABASE_URL": f"sqlite:///{database}"}
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    done = invoke("serve", "--port", "0", directory=tmp_path, settings=settings)
    assert done.returncode == 1
    assert f"they can write to {database} (mode 0666); run `chmod go-w {database}`" in done.stderr
    assert database.read_bytes() == b""


def test_a_config_that_others_may_write_is_refused_and_one_they_may_read_is_warned_of(
    start_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    settings: dict[str, Any] = hub_settings(tmp_path)
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    path = tmp_path / "wg0.conf"
    path.chmod(0o646)
    with pytest.raises(ServiceFailedError, match=r"they can write to .*wg0\.conf \(mode 0646\)"):
        start_service(settings)
    path.chmod(0o644)
    service = start_service(settings)
    assert f"private_key_readable path={path} mode=0644 remedy='chmod go-r {path}'" in service.log
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
