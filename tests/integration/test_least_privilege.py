"""The service needs CAP_NET_ADMIN and no other privilege, in the systemd unit's environment."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import pytest

from tests.harness.hosts import Host, LocalHost, connect
from tests.harness.requests import PEERS, PROVISION, provision_body
from tests.harness.requirements import require
from tests.harness.service import ServiceProcess
from tests.harness.wireguard import HubInterface

ROOT: Final = Path(__file__).parents[2]
SOMEBODY: Final = 4711
# MemoryDenyWriteExecute= by prctl(2), PR_SET_MDWE; a kernel before 6.3 doesn't know it.
DENY_WRITE_EXECUTE: Final = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


def privileges(user: int, *names: str) -> list[str]:
    """Return a prefix that leaves a command these capabilities, by whatever user, and no way to any other."""
    given = "-all," + ",".join(f"+{name}" for name in names)
    identity = [f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
    sets = [f"--bounding-set={given}", f"--inh-caps={given}", f"--ambient-caps={given}"]
    return ["setpriv", *identity, "--no-new-privs", *sets, "--"]


class Confined(LocalHost):
    """A host on which the service runs with few privileges."""

    def __init__(self, host: Host, prefix: Sequence[str]) -> None:
        self.name = host.name
        self._host = host
        self._prefix = prefix

    @property
    def pid(self) -> int:
        return self._host.pid

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **streams: int | IO[bytes],
    ) -> subprocess.Popen[bytes]:
        return self._host.popen([*self._prefix, *argv], env=env, cwd=cwd, **streams)


@dataclass
class Hub:
    """A hub's interface on a host where /proc is as ProtectProc= and ProcSubset= make it."""

    host: Host
    address: str
    user: int
    directory: Path
    interface: HubInterface


@pytest.fixture(params=["root", "somebody"])
def hub(request: pytest.FixtureRequest, needs_wireguard: None) -> Iterator[Hub]:
    require("setpriv", "mount")
    user = SOMEBODY if request.param == "somebody" else 0
    with ExitStack() as stack:
        # Not below pytest's own directory, which is for its user only.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        host = stack.enter_context(Host("hub"))
        address, _ = connect(host, LocalHost(), "192.0.2.0/30")
        host.run(["mount", "-t", "proc", "-o", "hidepid=2,subset=pid", "proc", "/proc"])
        if user:
            os.chown(directory, user, user)
            can = Confined(host, privileges(user, "net_admin")).run(
                ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", "import backend.main"], check=False
            )
            if can.returncode != 0:
                pytest.skip(f"needs a Python and a checkout that other users can read: {can.stderr.strip()}")
        # wireguard-go stands in for the kernel: it opens /dev/net/tun and makes a socket of its user's.
        maker = Confined(host, privileges(user, "net_admin", "dac_override"))
        interface = HubInterface(maker, "wgleast", directory)
        os.chown(interface.config_path, user, user)
        stack.enter_context(interface).start()
        yield Hub(host, str(address), user, directory, interface)


def test_the_service_needs_no_privilege_but_cap_net_admin(hub: Hub) -> None:
    settings = {
        "WIREGUARD_CONFIG_PATH": hub.interface.config_path,
        "STATE_DIRECTORY": hub.directory / "state",
        "HOME": hub.directory,
    }
    confined = Confined(
        hub.host, [*privileges(hub.user, "net_admin"), sys.executable, "-c", DENY_WRITE_EXECUTE]
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    environment |= {name: str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "backend"]
    raised = confined.run([*command, "hub", "up"], env=environment)
    assert raised.stdout == "interface wgleast was up already\n"
    assert "inet 10.0.0.1/24 " in hub.host.run(["ip", "address", "show", "dev", "wgleast"]).stdout
    with ServiceProcess(hub.directory, settings, host=confined, address=hub.address) as service:
        # By the service's own user: records that belong to another one are nothing that root would trust.
        made = confined.run([*command, "key", "create", "--role", "admin"], env=environment)
        service.client.headers["Authorization"] = f"Bearer {made.stdout.strip()}"
        status = Path(f"/proc/{service.pid}/status").read_text()
        only = f"{1 << 12:016x}"  # CAP_NET_ADMIN, linux/capability.h
        for line in (f"CapEff:\t{only}", f"CapPrm:\t{only}", f"CapBnd:\t{only}", "NoNewPrivs:\t1"):
            assert line in status
        # Not dumpable: root's, whoever runs it (proc(5)).
        assert Path(f"/proc/{service.pid}/environ").stat().st_uid == 0
        body = provision_body("node-1")
        key = body["wireguard_public_key"]
        answer = service.client.post(PROVISION, json=body)
        assert answer.status_code == 200, answer.text
        assert hub.interface.peers() == {key: {"10.0.0.2/32"}}
        service.restart()
        assert service.client.delete(f"{PEERS}/node-1").status_code == 200
        assert hub.interface.peers() == {}
        owners = {path.stat().st_uid for path in hub.directory.rglob("*") if path.suffix != ".log"}
    assert owners == {hub.user}
