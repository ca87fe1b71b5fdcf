"""`python -m backend` as a user types it: output and exit status."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from backend import __version__
from tests.harness.command_line import ROOT, backend, hub_settings, invoke
from tests.harness.service import ServiceProcess, free_port

KEY = "vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8="


def test_help_names_the_commands(tmp_path: Path) -> None:
    done = backend("--help", directory=tmp_path)
    assert done.returncode == 0
    assert [name for name in ("serve", "run", "hub") if name not in done.stdout] == []
    done = invoke("hub", "--help", directory=tmp_path)
    assert [name for name in ("init", "up", "down", "show") if name not in done.stdout] == []


def test_version_is_printed_alone(tmp_path: Path) -> None:
    done = invoke("--version", directory=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_help_waits_for_no_framework() -> None:
    program = "import sys, backend.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"fastapi", "uvicorn", "sqlalchemy", "dbos", "pydantic", "cryptography"} & set(
        done.stdout.split()
    )


@pytest.mark.parametrize("command", [["serve"], ["run"], ["hub", "init"], ["hub", "show"]])
def test_a_wrong_setting_ends_every_command_with_one_sentence(tmp_path: Path, command: list[str]) -> None:
    done = invoke(*command, directory=tmp_path, settings={"WIREGUARD_IP_POOL": "10.0.0.5/24"})
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: WIREGUARD_IP_POOL has host bits set; write 10.0.0.0/24.\n"
    assert list(tmp_path.iterdir()) == []


def test_init_makes_a_private_file_and_prints_no_key(tmp_path: Path) -> None:
    settings = hub_settings(tmp_path / "etc") | {
        "WIREGUARD_HUB_ENDPOINT": "hub.example.com:51999",
        "WIREGUARD_IP_POOL": "10.77.0.0/16",
        "WIREGUARD_HUB_IP": "10.77.3.4",
    }
    first = backend("hub", "init", directory=tmp_path, settings=settings)
    assert (first.returncode, first.stderr) == (0, "")
    path = tmp_path / "etc" / "wg0.conf"
    section, private_key, address, port = path.read_text().splitlines()
    assert section == "[Interface]"
    assert private_key.startswith("PrivateKey = ")
    assert address == "Address = 10.77.3.4/16"
    assert port == "ListenPort = 51999"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    shown = invoke("hub", "show", directory=tmp_path, settings=settings)
    assert private_key.removeprefix("PrivateKey = ") not in first.stdout + shown.stdout + shown.stderr
    assert "endpoint:       hub.example.com:51999\n" in shown.stdout
    assert "peers:          0 in the file\n" in shown.stdout


def test_init_leaves_a_config_that_is_there_alone(tmp_path: Path) -> None:
    settings = hub_settings(tmp_path)
    path = tmp_path / "wg0.conf"
    path.write_bytes(b"# mine\n")
    done = invoke("hub", "init", directory=tmp_path, settings=settings)
    assert (done.returncode, done.stdout) == (0, f"{path} is there already and was left as it is\n")
    assert path.read_bytes() == b"# mine\n"


@pytest.mark.parametrize("command", ["up", "down", "show"])
def test_a_hub_without_a_config_is_told_how_to_get_one(tmp_path: Path, command: str) -> None:
    done = invoke("hub", command, directory=tmp_path, settings=hub_settings(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'wg0.conf'}: ")
    assert "hub init" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["serve", "run"])
def test_a_port_that_is_taken_is_said_in_a_sentence_before_anything_is_made(
    tmp_path: Path, command: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        settings = {"STATE_DIRECTORY": tmp_path / "state", "WIREGUARD_RELOAD": "off"}
        done = invoke(command, "--port", str(port), directory=tmp_path, settings=settings)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: 127.0.0.1 port {port} can't be listened on (Address already in use); stop what holds it, or "
        "choose another one with --port (with make: PORT=8001)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_address_of_no_host_is_refused_in_one_sentence(tmp_path: Path) -> None:
    settings = hub_settings(tmp_path)
    done = invoke("serve", "--host", "256.0.0.1.invalid", directory=tmp_path, settings=settings)
    assert done.returncode == 1
    assert done.stderr.startswith("error: 256.0.0.1.invalid is no address of this host (")
    assert done.stderr.count("\n") == 1


def test_a_start_that_is_refused_ends_with_the_reason_and_no_traceback(tmp_path: Path) -> None:
    port = free_port()
    done = backend("serve", "--port", str(port), directory=tmp_path, settings=hub_settings(tmp_path))
    assert done.returncode == 1
    assert f"error: {tmp_path / 'wg0.conf'}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_misspelt_setting_is_warned_about_without_its_value(tmp_path: Path) -> None:
    """WIREGUARD_IPPOOL was ignored in silence, and the default pool handed out."""
    settings = hub_settings(tmp_path)
    assert backend("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    (tmp_path / ".env").write_text("WIREGUARD_HUB_PUBLICKEY=hunter2\n")
    with ServiceProcess(tmp_path, settings | {"WIREGUARD_IPPOOL": "10.8.0.0/24"}) as service:
        service.terminate()
    assert "unknown_setting setting=WIREGUARD_IPPOOL nearest=WIREGUARD_IP_POOL\n" in service.log
    assert "unknown_setting setting=WIREGUARD_HUB_PUBLICKEY nearest=WIREGUARD_HUB_PUBLIC_KEY\n" in service.log
    assert service.log.count("unknown_setting") == 2
    assert "hunter2" not in service.log
    assert "10.8.0.0" not in service.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_ends_the_service_with_status_0(tmp_path: Path, number: signal.Signals) -> None:
    settings = hub_settings(tmp_path)
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    with ServiceProcess(tmp_path, settings) as service:
        os.kill(service.pid, number)
        assert service.wait_exit() == 0
        assert "Traceback" not in service.log


@pytest.mark.parametrize(("settings", "lines"), [({}, 0), ({"ACCESS_LOG": "true"}, 1)])
def test_a_request_is_logged_only_where_it_is_asked_for(
    tmp_path: Path, settings: dict[str, object], lines: int
) -> None:
    settings |= hub_settings(tmp_path)
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    with ServiceProcess(tmp_path, settings) as service:
        assert service.client.get("/healthz?token=secret").status_code == 200
        service.terminate()
        logged = [line for line in service.log.splitlines() if "/healthz" in line]
        assert len(logged) == lines, logged
        assert all("INFO uvicorn.access 127.0.0.1:" in line for line in logged)
        assert "secret" not in service.log


def test_a_response_does_not_name_the_server(tmp_path: Path) -> None:
    settings = hub_settings(tmp_path)
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    with ServiceProcess(tmp_path, settings) as service:
        assert "server" not in service.client.get("/healthz").headers
        service.terminate()
