"""Clients of a service with and without credentials, and how they get those."""

import httpx

from tests.harness.command_line import invoke
from tests.harness.requests import NO_TLS, bearer
from tests.harness.service import ServiceProcess


def shown(secret: str | None) -> dict[str, str]:
    """Return the header that shows a credential, or none."""
    return {} if secret is None else bearer(secret)


def client_at(service: ServiceProcess, address: str = "127.0.0.1", secret: str | None = None) -> httpx.Client:
    """Return a client of the service at one of this host's addresses."""
    url = f"http://{address}:{service.port}"
    return httpx.Client(base_url=url, headers=shown(secret), trust_env=False, verify=NO_TLS, timeout=30.0)


def local_secret(service: ServiceProcess) -> str:
    """Return what the service has left for this host's admin."""
    return service.local_admin.authorization.removeprefix("Bearer ")


def make_key(service: ServiceProcess, role: str = "admin") -> str:
    """Make a key as an operator does on the command line."""
    settings = {name: service.settings[name] for name in ("STATE_DIRECTORY", "WIREGUARD_CONFIG_PATH")}
    done = invoke("key", "create", "--role", role, directory=service.directory, settings=settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def id_of(secret: str) -> str:
    """Return the ID of the credential that a secret belongs to."""
    return secret.split("_")[1]
