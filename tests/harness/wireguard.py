"""Real WireGuard interfaces, made with wireguard-go."""

import os
import subprocess
import time
from pathlib import Path
from typing import Final, Self

from tests.harness.hosts import LocalHost

_START_SECONDS: Final = 15.0
_STOP_SECONDS: Final = 10.0
# __SO_ACCEPTCON among the flags in /proc/net/unix, proc_pid_net(5).
_LISTENING: Final = "00010000"


def genkey() -> tuple[str, str]:
    """Make a key pair with wg(8): private, public."""
    private = subprocess.run(["wg", "genkey"], check=True, capture_output=True, text=True).stdout
    public = subprocess.run(
        ["wg", "pubkey"], check=True, capture_output=True, text=True, input=private
    ).stdout
    return private.strip(), public.strip()


class Interface:
    """A WireGuard interface on a host, by name; `directory` takes wireguard-go's log."""

    def __init__(self, host: LocalHost, name: str, directory: Path) -> None:
        self.host = host
        self.name = name
        self._log_path = directory / f"wireguard-go-{host.name}-{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def up(self) -> None:
        """Make the interface: no key, no port, no peers."""
        with self._log_path.open("ab") as log:
            process = self.host.popen(
                # In the foreground, so that its end can be waited for.
                ["wireguard-go", "--foreground", self.name],
                stdout=log,
                stderr=log,
                env=dict(os.environ, LOG_LEVEL="error"),
            )
        self._process = process
        deadline = time.monotonic() + _START_SECONDS
        while not self._listens():
            if process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"no interface {self.name}: {self._log_path.read_text()}")
            time.sleep(0.01)
        self.host.run(["ip", "link", "set", self.name, "mtu", "1420", "up"])

    def _listens(self) -> bool:
        """Say whether wireguard-go can be talked to, from what the kernel says of its socket.

        Not with `wg`, which deletes a control socket that doesn't listen yet, so that wireguard-go gives up.
        """
        sockets = (line.split() for line in Path(f"/proc/{self.host.pid}/net/unix").read_text().splitlines())
        return any(
            fields[3] == _LISTENING and fields[-1].endswith(f"/wireguard/{self.name}.sock")
            for fields in sockets
        )

    def exists(self) -> bool:
        """Say whether wg(8) can talk to the interface."""
        return self.host.run(["wg", "show", self.name, "listen-port"], check=False).returncode == 0

    def configure(self, text: str) -> None:
        """Give the interface a configuration that `wg setconf` takes."""
        self.host.run(["wg", "setconf", self.name, "/dev/stdin"], text=text)

    def show(self, what: str) -> str:
        """Return what `wg show NAME what` prints."""
        return self.host.run(["wg", "show", self.name, what]).stdout.strip()

    def peers(self) -> dict[str, set[str]]:
        """Return each peer's AllowedIPs by its public key."""
        rows = (line.split("\t", 1) for line in self.show("allowed-ips").splitlines())
        return {key: set() if allowed == "(none)" else set(allowed.split()) for key, allowed in rows}

    def down(self) -> None:
        """Delete the interface, if it is there, and wait for the end of its wireguard-go."""
        self.host.run(["ip", "link", "delete", self.name], check=False)
        if self._process is None:
            return
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End its wireguard-go with SIGKILL; the kernel deletes the interface with it."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has no wireguard-go of its own")
        self._process.kill()
        self._process.wait()
        self._process = None

    def close(self) -> None:
        """Delete the interface, even if another program made it."""
        self.down()


class HubInterface(Interface):
    """An interface with the wg0.conf that belongs to it: a PrivateKey and a ListenPort, mode 0600.

    `address` is the hub's in the tunnel.
    """

    address = "10.0.0.1"

    def __init__(self, host: LocalHost, name: str, directory: Path, *, listen_port: int = 51820) -> None:
        super().__init__(host, name, directory)
        self.private_key, self.public_key = genkey()
        self.listen_port = listen_port
        self.config_path = directory / f"{name}.conf"
        self.config_path.touch(mode=0o600)
        self.config_path.write_text(self.interface_section)

    @property
    def interface_section(self) -> str:
        """The configuration without peers."""
        return f"[Interface]\nPrivateKey = {self.private_key}\nListenPort = {self.listen_port}\n"

    def start(self) -> None:
        """Make the interface with the hub's key, port and address, as a boot does."""
        self.up()
        self.configure(self.interface_section)
        self.give_address()

    def give_address(self) -> None:
        """Give the interface the hub's address in the tunnel."""
        self.host.run(["ip", "address", "add", f"{self.address}/32", "dev", self.name])
