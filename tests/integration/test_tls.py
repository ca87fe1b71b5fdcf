"""`serve --tls-cert --tls-key`: over real sockets, with certificates that change while it serves."""

import datetime as dt
import os
import re
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from backend.adapters.http.connections import Connections
from backend.adapters.http.http_protocol import BoundedProtocol
from backend.adapters.http.tls import Certificate, TlsServer
from backend.errors import StartRefusedError
from tests.harness.patience import eventually
from tests.harness.raw_http import Client, Server, get
from tests.harness.service import ServiceProcess, StartService

HEALTH = get("/healthz")


def make_certificate(number: int) -> tuple[bytes, bytes]:
    """Return a self-signed certificate for localhost and its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(number)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(encoding), private


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    certificate, key = tmp_path / "hub.pem", tmp_path / "hub.key"
    for path, content in zip((certificate, key), make_certificate(1), strict=True):
        path.write_bytes(content)
    return certificate, key


def with_tls(files: tuple[Path, Path]) -> dict[str, object]:
    return {"ready": None, "options": ("--tls-cert", str(files[0]), "--tls-key", str(files[1]))}


@pytest.fixture
def service(
    start_service: StartService, settings: dict[str, object], files: tuple[Path, Path]
) -> ServiceProcess:
    service = start_service(settings, **with_tls(files))
    wait_until_it_serves(service)
    return service


@contextmanager
def connected(port: int, source: str = "127.0.0.1") -> Iterator[Client]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection(("127.0.0.1", port), 10, (source, 0))
    with plain, context.wrap_socket(plain) as connection, Client(connection) as client:
        yield client


def wait_until_it_serves(service: ServiceProcess) -> None:
    # From then on it listens, and who connects waits for it.
    eventually(lambda: "serving" in service.log)
    with connected(service.port) as client:
        client.send(HEALTH)
        assert client.status() == 200


def serial(client: Client) -> int:
    connection = client._connection
    assert isinstance(connection, ssl.SSLSocket)
    shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def serial_now(service: ServiceProcess) -> int:
    with connected(service.port) as client:
        return serial(client)


def test_certificate_is_read_again_and_no_connection_is_dropped(
    service: ServiceProcess, files: tuple[Path, Path], tmp_path: Path
) -> None:
    with connected(service.port) as early:
        early.send(HEALTH)
        assert (early.status(), serial(early)) == (200, 1)
        new = make_certificate(2)
        files[0].write_bytes(new[0])
        # The key isn't there yet: the old pair goes on.
        eventually(lambda: serial_now(service) == 1 and "certificate_unusable" in service.log)
        # As certbot does, in one step.
        (tmp_path / "new.key").write_bytes(new[1])
        (tmp_path / "new.key").replace(files[1])
        eventually(lambda: serial_now(service) == 2)
        early.send(HEALTH)
        assert (early.status(), serial(early)) == (200, 1)
        files[1].unlink()
        eventually(lambda: serial_now(service) == 2 and "No such file" in service.log)
    assert service.terminate() == 0
    assert "Traceback" not in service.log


def test_plain_http_gets_no_answer_and_leaves_nothing_behind(service: ServiceProcess) -> None:
    before = service.open_descriptors
    with socket.create_connection(("127.0.0.1", service.port), 10) as plain:
        client = Client(plain)
        client.send(HEALTH)
        # An alert at most.
        with pytest.raises(ConnectionError):
            client.answer()
    eventually(lambda: service.open_descriptors <= before)
    assert "Traceback" not in service.log


def test_handshakes_that_never_end_count_as_connections(
    start_service: StartService, settings: dict[str, object], files: tuple[Path, Path]
) -> None:
    few = {"WIREGUARD_MAX_CONNECTIONS_PER_SOURCE": "10", "DESCRIPTORS": "256"}
    service = start_service(settings | few, module=("tests.harness.few_descriptors",), **with_tls(files))
    wait_until_it_serves(service)
    before = service.open_descriptors
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(socket.create_connection(("127.0.0.1", service.port), 10))
        eventually(lambda: "connections_refused" in service.log)
        with connected(service.port, "127.0.0.2") as client:
            client.send(HEALTH)
            assert client.status() == 200
            assert service.open_descriptors <= before + 11
        with pytest.raises(OSError), connected(service.port):
            pass
    eventually(lambda: service.open_descriptors <= before)
    with connected(service.port) as client:
        client.send(HEALTH)
        assert client.status() == 200


def cpu_seconds(service: ServiceProcess) -> float:
    fields = Path(f"/proc/{service.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_connection_waits_idly_while_no_descriptor_is_left(service: ServiceProcess) -> None:
    limit = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (3, limit[1]))
    with socket.create_connection(("127.0.0.1", service.port), 10):
        eventually(lambda: "accepting_paused" in service.log)
        before = cpu_seconds(service)
        paused = service.log.count("accepting_paused")
        # It looks again once a second.
        eventually(lambda: service.log.count("accepting_paused") > paused)
        assert cpu_seconds(service) - before < 0.5
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, limit)
    with connected(service.port) as client:
        client.send(HEALTH)
        assert client.status() == 200


@pytest.mark.parametrize(
    ("certificate", "key", "reason"),
    [
        ("no.pem", "hub.key", "No such file or directory"),
        ("hub.key", "hub.pem", "no certificate and key in PEM"),
        ("hub.pem", "other.key", "KEY_VALUES_MISMATCH"),
    ],
)
def test_files_that_can_not_be_used_are_refused(
    files: tuple[Path, Path], certificate: str, key: str, reason: str
) -> None:
    directory = files[0].parent
    (directory / "other.key").write_bytes(make_certificate(3)[1])
    with pytest.raises(StartRefusedError, match=re.escape(f"can't be used ({reason})")):
        Certificate(directory / certificate, directory / key)


def test_certificate_that_could_not_be_read_at_first_is_read_later(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = Certificate(*files)
    monkeypatch.setattr("backend.adapters.http.tls._LOOK_SECONDS", 0.0)
    before = certificate.context()
    for path, content in zip(files, make_certificate(2), strict=True):
        path.write_bytes(content)
    # As where a renewed key is given to this user afterwards, or no descriptor is left for a moment.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert certificate.context() is before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    after = certificate.context()
    assert after is not before
    assert certificate.context() is after


def test_pipe_in_the_place_of_a_key_does_not_hold_up_the_service(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = Certificate(*files)
    monkeypatch.setattr("backend.adapters.http.tls._LOOK_SECONDS", 0.0)
    before = certificate.context()
    files[1].unlink()
    os.mkfifo(files[1])
    read = threading.Thread(target=certificate.context, daemon=True)
    read.start()
    read.join(10)
    assert not read.is_alive()
    assert certificate.context() is before


def test_certificate_without_a_key_refuses_the_start(
    start_service: StartService, settings: dict[str, object], files: tuple[Path, Path]
) -> None:
    service = start_service(settings, ready=None, options=["--tls-cert", str(files[0])])
    assert service.wait_exit() == 1
    assert service.log == "error: --tls-cert and --tls-key belong together; give both, or neither\n"


class TlsTestServer(Server):
    def __init__(self, listener: socket.socket, files: tuple[Path, Path], counted: Connections) -> None:
        super().__init__(listener, partial(BoundedProtocol, connections=counted))
        self._server = TlsServer(self._server.config, listener, counted, Certificate(*files))
        self._thread = threading.Thread(target=self._server.run)


def test_client_that_never_reads_is_cut_off(files: tuple[Path, Path]) -> None:
    counted = Connections(10, 10, stalled_seconds=0.5)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        TlsTestServer(listener, files, counted) as server,
    ):

        @server.app.get("/large")
        async def large() -> str:
            return "x" * 8 * 1024 * 1024

        with connected(listener.getsockname()[1]) as client:
            client.send(get("/large") * 20)
            eventually(lambda: len(counted) == 1)
            eventually(lambda: len(counted) == 0)
