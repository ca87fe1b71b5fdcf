"""`make run`'s command, from nothing, in pytest's own network namespace."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from backend.adapters.host import programs
from backend.cli import quickstart
from backend.errors import HubUpdateError, StartRefusedError
from backend.models.wireguard.keys import WireGuardKey
from backend.services.hub.mark import HubMark, Mark
from backend.settings import Settings
from tests.harness.command_line import invoke
from tests.harness.requirements import require
from tests.harness.service import free_port
from tests.harness.wireguard import HubInterface

ROOT = Path(__file__).parents[2]


class Run:
    """`python -m backend run` as a real process in a directory."""

    def __init__(self, directory: Path, *prefix: str, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._output = directory / f"run-{self.port}.log"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name == "PATH" or name.startswith("COVERAGE_")
        }
        given = {name: str(value) for name, value in settings.items()}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "backend", "run", "--port", str(self.port)],
                cwd=directory,
                env={**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **given},
                stdout=output,
                stderr=output,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 40
        while True:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            try:
                if httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


@contextmanager
def running(directory: Path, *prefix: str, **settings: object) -> Iterator[Run]:
    run = Run(directory, *prefix, **settings)
    try:
        run.wait_ready()
        yield run
        assert run.stop() == 0, run.output
    finally:
        run.process.kill()
        run.process.wait()


def peers(interface: str) -> list[str]:
    shown = subprocess.run(["wg", "show", interface, "peers"], check=True, capture_output=True, text=True)
    return shown.stdout.split()


@pytest.fixture
def no_wg0(needs_wireguard: None) -> Iterator[None]:
    """See that wg0, which `run` takes first, is free, and is so again afterwards."""
    yield
    for name in ("wg0", "wg1"):
        subprocess.run(["ip", "link", "delete", "dev", name], check=False, capture_output=True)


def test_what_it_prints_can_be_pasted_and_a_second_run_goes_on(no_wg0: None, tmp_path: Path) -> None:
    require("curl")
    with running(tmp_path) as run:
        join, look, leave = (line for line in run.output.splitlines() if line.startswith("curl "))
        joined = subprocess.run(join, shell=True, check=True, capture_output=True, text=True)  # noqa: S602 - as pasted
        assert '"status":"success"' in joined.stdout
        key = re.search(r'"wireguard_public_key": "([^"]+)"', join)
        assert key is not None
        name = Path(next((tmp_path / "var").glob("wg*.conf"))).stem
        assert peers(name) == [key[1]]
    assert "stays up after Ctrl-C" in run.output
    assert (tmp_path / "var").stat().st_mode & 0o777 == 0o700
    with running(tmp_path) as again:
        assert f"interface {name} was up already" in again.output
        moved = {run.url: again.url}
        for old, new in moved.items():
            look, leave = look.replace(old, new), leave.replace(old, new)
        looked = subprocess.run(look, shell=True, check=True, capture_output=True, text=True)  # noqa: S602 - as pasted
        assert '"assigned_ip":"10.0.0.2"' in looked.stdout
        subprocess.run(leave, shell=True, check=True, capture_output=True, text=True)  # noqa: S602 - as pasted
        assert peers(name) == []
    down = subprocess.run(
        [sys.executable, "-m", "backend", "hub", "down"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        | {"WIREGUARD_CONFIG_PATH": f"{tmp_path}/var/{name}.conf"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert down.stdout == f"interface {name} is gone\n"


def test_without_the_privilege_it_keeps_the_file_only_and_says_what_is_missing(
    no_wg0: None, tmp_path: Path
) -> None:
    require("setpriv")
    with running(tmp_path, "setpriv", "--bounding-set=-net_admin") as run:
        assert "it takes root (CAP_NET_ADMIN): run it with sudo" in run.output
        assert "WIREGUARD_RELOAD=off" in run.output
        (join,) = (line for line in run.output.splitlines() if "/provision" in line)
        joined = subprocess.run(join, shell=True, check=True, capture_output=True, text=True)  # noqa: S602 - as pasted
        assert '"status":"success"' in joined.stdout
    assert len(list((tmp_path / "var").glob("wg*.conf"))) == 1


def prepare(**settings: Any) -> tuple[Settings, list[str]]:
    said: list[str] = []
    return quickstart.prepare(Settings(wireguard_reload="off", **settings), said.append), said


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "system").mkdir()
    monkeypatch.setattr(quickstart, "_SYSTEM_CONFIGS", tmp_path / "system")


@pytest.mark.usefixtures("clean_environment")
class TestNames:
    def test_a_name_in_use_is_left_alone_and_the_next_is_taken(
        self, hub_interface: HubInterface, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(quickstart, "_NAMES", [hub_interface.name, "wgsys", "wgfree"])
        system = tmp_path / "system" / "wgsys.conf"
        system.touch()
        settings, said = prepare()
        assert settings.wireguard_config_path == tmp_path / "var" / "wgfree.conf"
        assert said == [
            f"{hub_interface.name} is left alone: an interface of that name exists",
            f"wgsys is left alone: {system} exists",
            f"made {tmp_path}/var/wgfree.conf with a new key",
        ]
        assert system.read_bytes() == b""

    def test_no_name_left_is_a_sentence(
        self, hub_interface: HubInterface, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(quickstart, "_NAMES", [hub_interface.name])
        with pytest.raises(StartRefusedError, match="name another one with WIREGUARD_CONFIG_PATH"):
            prepare()

    def test_the_config_of_an_earlier_run_is_taken_again(self, tmp_path: Path) -> None:
        (tmp_path / "var").mkdir()
        for name in ("wg10.conf", "wg2.conf", "wg-backup.conf"):
            (tmp_path / "var" / name).touch()
        settings, said = prepare()
        assert settings.wireguard_config_path == tmp_path / "var" / "wg2.conf"
        assert said == []

    def test_commands_beside_it_find_its_hub(self, tmp_path: Path) -> None:
        made, _ = prepare()
        beside = quickstart.beside_run(Settings())
        assert beside.wireguard_config_path == made.wireguard_config_path
        assert beside.wireguard_hub_endpoint == made.wireguard_hub_endpoint
        shown = invoke("reconcile", "--show", directory=tmp_path)
        assert (shown.returncode, "nothing is to be decided" in shown.stdout) == (0, True), shown.stderr
        HubMark(made.wireguard_config_path).write(Mark(1, 1000))
        verified = invoke("audit", "verify", directory=tmp_path)
        assert (verified.returncode, "has reached row 1000" in verified.stderr) == (1, True), verified.stdout
        for command in ("show", "down"):
            done = invoke("hub", command, directory=tmp_path)
            assert (done.returncode, made.interface in done.stdout) == (0, True), done.stderr

    def test_commands_beside_it_prefer_the_hub_that_is_named_or_the_systems(self, tmp_path: Path) -> None:
        prepare()
        named = Settings(wireguard_config_path=tmp_path / "mine.conf")
        assert quickstart.beside_run(named) is named
        (tmp_path / "system" / "wg0.conf").touch()
        assert quickstart.beside_run(Settings()).wireguard_config_path == Path("/etc/wireguard/wg0.conf")

    def test_a_lost_config_is_made_under_its_own_name_with_the_interfaces_key(
        self, hub_interface: HubInterface, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Under the next free name the hub would come up with a new key, and its nodes would be lost."""
        monkeypatch.setattr(quickstart, "_OWN_CONFIG", re.compile(r"wghub([0-9]+)\.conf"))
        monkeypatch.setattr(quickstart, "_PATTERN", "wghub*.conf")
        (tmp_path / "var").mkdir(mode=0o700)
        path = tmp_path / "var" / hub_interface.config_path.name
        (path.parent / f".{path.name}.lock").touch()
        said: list[str] = []
        with pytest.raises(HubUpdateError, match=r"hub init --recover` makes .*/var/wghub"):
            quickstart.prepare(Settings(), said.append)
        # `hub init` means the same hub.
        assert quickstart.beside_lost(Settings()).wireguard_config_path == path
        settings = quickstart.prepare(
            Settings(wireguard_hub_public_key=WireGuardKey.parse(hub_interface.public_key)), said.append
        )
        assert settings.wireguard_config_path == path
        assert said[:2] == [
            f"made {path} with the key of interface {hub_interface.name}, {hub_interface.public_key}",
            f"interface {hub_interface.name} was up already",
        ]
        assert f"PrivateKey = {hub_interface.private_key}\n" in path.read_text()
        assert quickstart.beside_lost(Settings()).wireguard_config_path != path

    def test_the_config_that_is_set_is_taken(self, tmp_path: Path) -> None:
        settings, _ = prepare(wireguard_config_path=tmp_path / "mine.conf")
        assert settings.wireguard_config_path == tmp_path / "mine.conf"

    def test_a_port_in_use_is_passed_over_and_remembered(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text(f"WIREGUARD_CONFIG_PATH={tmp_path}/wgport.conf\n")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
            holder.bind(("", 51820))
            first, _ = prepare()
        assert first.listen_port > 51820
        second, _ = prepare()
        assert second.wireguard_hub_endpoint == first.wireguard_hub_endpoint

    def test_an_endpoint_that_is_set_is_taken(self) -> None:
        settings, _ = prepare(wireguard_hub_endpoint="hub.example.com:4500")
        assert settings.wireguard_hub_endpoint == "hub.example.com:4500"
        assert "ListenPort = 4500\n" in settings.wireguard_config_path.read_text()

    def test_a_state_directory_that_cannot_be_made_is_a_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "var").touch()
        with pytest.raises(StartRefusedError, match="set STATE_DIRECTORY to another one"):
            prepare()


@pytest.mark.usefixtures("clean_environment")
def test_without_the_tools_it_keeps_the_file_only_and_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(programs, "_SYSTEM_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    settings = quickstart.prepare(Settings(), said.append)
    assert settings.wireguard_reload == "off"
    assert any(
        "`wg` isn't installed: install the package wireguard-tools (on Debian and Ubuntu: "
        "`sudo apt-get install --no-install-recommends wireguard-tools`)" in text
        for text in said
    )
