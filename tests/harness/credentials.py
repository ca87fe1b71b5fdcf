"""Keys, tokens and the audit log of a running service, over HTTP."""

from typing import Any

from tests.harness.requests import AUDIT, KEYS, TOKENS
from tests.harness.service import ServiceProcess


def with_admin_key(service: ServiceProcess) -> ServiceProcess:
    """Make an admin's key over HTTP, and have the service's own client show it from now on."""
    made = service.client.post(KEYS, json={"role": "admin"})
    made.raise_for_status()
    service.client.headers["Authorization"] = f"Bearer {made.json()['secret']}"
    return service


def new_token(service: ServiceProcess, max_uses: int = 1) -> str:
    """Make an enrolment token; return its secret."""
    made = service.client.post(TOKENS, json={"max_uses": max_uses})
    made.raise_for_status()
    secret: str = made.json()["secret"]
    return secret


def uses(service: ServiceProcess) -> dict[str, int]:
    """Return how often each token was used, by its ID."""
    tokens = service.client.get(TOKENS).raise_for_status().json()
    return {token["id"]: token["uses"] for token in tokens}


def token_id(token: str) -> str:
    """Return the ID that a token's secret begins with."""
    return token.split("_")[1]


def audit_entries(service: ServiceProcess, **parameters: str) -> list[dict[str, Any]]:
    """Return all entries of the audit log that match, the newest first."""
    entries: list[dict[str, Any]] = []
    query: dict[str, Any] = {"limit": 1000, **parameters}
    while True:
        page = service.client.get(AUDIT, params=query).raise_for_status().json()
        entries += page["entries"]
        if page["next"] is None:
            return entries
        query["before"] = page["next"]


def refusals(service: ServiceProcess, reason: str) -> int:
    """Return how many failed authentications the audit log counts for this reason."""
    entries = audit_entries(service, action="authenticate")
    return sum(entry["count"] for entry in entries if entry["reason"] == reason)
