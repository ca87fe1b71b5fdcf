"""The service in a Python program, without the command line: see docs/python.md."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backend.composition import running_service
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService
from backend.settings import load_settings


@contextmanager
def open_service(  # noqa: PLR0913 - each of them is a setting
    *,
    ip_pool_network: str | None = None,
    hub_public_key: str | None = None,
    hub_endpoint: str | None = None,
    hub_ip: str | None = None,
    config_path: str | Path | None = None,
    enable_dbos: bool | None = None,
    **settings: Any,
) -> Iterator[WireGuardProvisioningService]:
    """Run the service until the end of the `with` block; raise StartRefusedError, which says what to do.

    Each keyword is the setting of that name, with WIREGUARD_ in front where it has that; `settings` are all
    others, by their names in small letters. Settings that aren't given, or are None, come from the
    environment.
    """
    named = {
        "wireguard_ip_pool": ip_pool_network,
        "wireguard_hub_public_key": hub_public_key,
        "wireguard_hub_endpoint": hub_endpoint,
        "wireguard_hub_ip": hub_ip,
        "wireguard_config_path": config_path,
        "enable_dbos": enable_dbos,
    }
    given = {name: value for name, value in (named | settings).items() if value is not None}
    with running_service(load_settings(**given)) as service:
        yield service
