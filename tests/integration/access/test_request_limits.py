"""Rate limits by source, credential and failure, over real sockets."""

import re
import time
from pathlib import Path

import httpx
import pytest

from tests.harness.access_clients import client_at, id_of, make_key
from tests.harness.patience import eventually
from tests.harness.requests import API, AUDIT, PEERS, PROVISION, bearer, provision_body
from tests.harness.service import StartService
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface


def limited(hub: HubInterface, directory: Path, **limits: str) -> dict[str, object]:
    """Return settings with these limits."""
    named = {f"WIREGUARD_RATE_LIMIT_{kind.upper()}": limit for kind, limit in limits.items()}
    return settings_for(hub, directory, **named)


def test_source_with_too_many_failures_is_limited_and_others_are_not(
    hub_interface: HubInterface, start_service: StartService, here: str, tmp_path: Path
) -> None:
    settings = limited(hub_interface, tmp_path, failed_authentication="5/minute")
    service = start_service(settings, address="0.0.0.0")  # noqa: S104 - for the other host
    secret = make_key(service)
    with client_at(service, secret=secret) as operator, client_at(service) as guesser:
        assert operator.get(PEERS).status_code == 200
        answers = [
            guesser.get(PEERS, headers={"Authorization": f"Bearer ocw_{'0' * 16}_{number:064x}"})
            for number in range(9)
        ]
        assert [answer.status_code for answer in answers] == [401] * 5 + [429] * 4
        for late in answers[5:]:
            assert 1 <= int(late.headers["Retry-After"]) <= 60
            assert late.headers["Cache-Control"] == "no-store"
            assert late.headers["X-Request-ID"]
        # Nothing at all and a wrong secret fail, too.
        assert guesser.get(PEERS).status_code == 429
        wrong = {"Authorization": f"Bearer {secret[:-64]}{'0' * 64}"}
        assert guesser.get(PEERS, headers=wrong).status_code == 429
        assert operator.get(PEERS).status_code == 200
        with client_at(service, here) as elsewhere:
            assert elsewhere.get(PEERS).status_code == 401
        logged = operator.get(AUDIT, params={"action": "authenticate"}).json()["entries"]
        counts: dict[str, int] = {}
        for entry in logged:
            counts[entry["reason"]] = counts.get(entry["reason"], 0) + entry["count"]
        # What came too often is only counted, but for the secret of a real key that was tried.
        assert counts == {"unknown": 5, "rate": 1, "missing": 1}
        (tried,) = [entry for entry in logged if entry["reason"] == "rate"]
        assert (tried["subject"], tried["source"]) == (id_of(secret), "127.0.0.1")
    service.terminate()
    counted = re.findall(r"requests_limited requests=(\d+)", service.log)
    assert sum(map(int, counted)) == 6


@pytest.mark.parametrize("kind", ["token", "key"])
def test_a_credential_is_limited_by_itself(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, kind: str
) -> None:
    service = start_service(limited(hub_interface, tmp_path, **{kind: "5/minute"}))
    with client_at(service, secret=make_key(service)) as admin:
        asked: dict[str, object] = {"max_uses": 100} if kind == "token" else {"role": "operate"}
        made = [admin.post(f"{API}/{kind}s", json=asked).json() for _ in range(2)]
        first, second = (bearer(one["secret"]) for one in made)
        answers = [
            service.client.post(PROVISION, json=provision_body(f"node-{number}"), headers=first)
            for number in range(7)
        ]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
        last = service.client.post(PROVISION, json=provision_body("node-5"), headers=second)
        assert last.status_code == 200
        assert len(admin.get(PEERS).json()) == 6
        assert admin.get(AUDIT, params={"actor": "nobody"}).json()["entries"] == []
    service.terminate()
    counted = re.findall(r"requests_limited requests=(\d+)", service.log)
    assert sum(map(int, counted)) == 2


def test_source_is_limited_whatever_credential_it_shows(
    hub_interface: HubInterface, start_service: StartService, here: str, tmp_path: Path
) -> None:
    service = start_service(limited(hub_interface, tmp_path, source="5/minute"), address="0.0.0.0")  # noqa: S104 - for the other host
    # Not 127.0.0.1, from where the harness has asked whether it is ready.
    from_there = httpx.HTTPTransport(local_address="127.0.0.2")
    with (
        httpx.Client(base_url=service.url, transport=from_there, timeout=30) as local,
        client_at(service, here) as elsewhere,
    ):
        assert [elsewhere.get(PEERS).status_code for _ in range(7)] == [401] * 5 + [429] * 2
        secret = bearer(make_key(service))
        # A credential doesn't make the source another one.
        assert elsewhere.get(PEERS, headers=secret).status_code == 429
        assert [local.get(PEERS, headers=secret).status_code for _ in range(6)] == [200] * 5 + [429]


def test_a_limit_ends(hub_interface: HubInterface, start_service: StartService, tmp_path: Path) -> None:
    service = start_service(limited(hub_interface, tmp_path, failed_authentication="2/second"))
    with client_at(service) as client:
        eventually(lambda: client.get(PEERS).status_code == 401)
        answers = [client.get(PEERS) for _ in range(6)]
        late = next(answer for answer in answers if answer.status_code == 429)
        time.sleep(int(late.headers["Retry-After"]))
        assert client.get(PEERS).status_code == 401
