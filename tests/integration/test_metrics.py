"""The metrics of a service that runs, as Prometheus reads them."""

import re
import time
from pathlib import Path

import httpx
import pytest

from tests.harness.command_line import ROOT
from tests.harness.patience import eventually
from tests.harness.requests import PEERS, PROVISION, TOKENS, bearer, new_key, provision_body
from tests.harness.scrapes import Scrape, promtool
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface

HOSTILE = "hostile-4711"


def scraped(service: ServiceProcess) -> Scrape:
    answer = service.client.get("/metrics")
    answer.raise_for_status()
    return Scrape(answer.text)


@pytest.fixture
def service(hub_interface: HubInterface, start_service: StartService, tmp_path: Path) -> ServiceProcess:
    return start_service(settings_for(hub_interface, tmp_path, WIREGUARD_METRICS_PER_PEER="true"))


def test_promtool_has_nothing_to_say_about_the_metrics(service: ServiceProcess) -> None:
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    service.client.get("/nowhere")
    assert promtool(scraped(service).text) == ("", 0)


def test_a_provision_shows_in_the_metrics(service: ServiceProcess) -> None:
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    found = scraped(service)
    assert found.value("provisions_total", outcome="provisioned") == 1
    assert found.value("http_requests_total", method="POST", route=PROVISION, status="200") == 1
    assert found.value("pool_addresses", state="allocated") == 1
    assert (found.value("generation"), found.value("hub_reconciled")) == (1, 1)
    assert (found.value("reloads_total") or 0) >= 1
    for operation in ("read", "write"):
        assert (found.value("database_duration_seconds_count", operation=operation) or 0) > 0
    assert {"hub", "credentials", "audit"} <= found.by("loop_interval_seconds", "loop").keys()
    assert found.series["process_start_time_seconds", frozenset()] > 0

    def every_second_loop_has_succeeded() -> bool:
        loops = scraped(service).by("loop_last_success_timestamp_seconds", "loop")
        return {"hub", "credentials", "audit"} <= loops.keys()

    eventually(every_second_loop_has_succeeded)


def test_a_backup_of_before_the_start_shows_in_the_metrics(service: ServiceProcess) -> None:
    assert scraped(service).value("backup_last_success_timestamp_seconds") is None
    before = time.time()
    assert service.command("backup", "create").returncode == 0
    service.restart()
    made_at = scraped(service).value("backup_last_success_timestamp_seconds")
    assert made_at is not None
    assert before - 1 <= made_at <= time.time()


def test_manual_lists_every_metric(service: ServiceProcess) -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()
    section = manual.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    shown = set(re.findall(r"(?m)^# TYPE (wireguard_\w+) ", scraped(service).text))
    assert shown <= set(re.findall(r"`(\w+)(?:\{[\w,]+\})?`", section))


def test_no_label_holds_what_a_caller_sent_or_a_secret(
    service: ServiceProcess, hub_interface: HubInterface
) -> None:
    """A label with a caller's text is a leak, and a way to make series without end."""
    key = new_key()
    token = service.client.post(TOKENS, json={}).json()["secret"]
    sent = provision_body("node-1", key, public_key=HOSTILE, metadata={HOSTILE: HOSTILE})
    service.client.post(PROVISION, json=sent, headers={"X-Request-ID": HOSTILE}).raise_for_status()
    with httpx.Client(base_url=service.url, trust_env=False) as stranger:
        for path in (
            f"/{HOSTILE}",
            f"{PEERS}/{HOSTILE}",
            f'{PEERS}/%22%7D{HOSTILE}%0A"',
            f"/metrics?{HOSTILE}",
        ):
            for method in ("GET", "DELETE", "PROPFIND", "PUT", "OPTIONS"):
                for headers in ({}, {"Authorization": f"Bearer {HOSTILE}"}, bearer(token)):
                    assert stranger.request(method, path, headers=headers).status_code < 500
        stranger.post(PROVISION, json={HOSTILE: HOSTILE}, headers=bearer(token))
        stranger.post(PROVISION, content=HOSTILE.encode() * 10_000, headers=bearer(token))
    found = scraped(service)
    endpoint = settings_for(hub_interface, service.directory)["WIREGUARD_HUB_ENDPOINT"]
    secret = token.rpartition("_")[2]
    for text in (HOSTILE, key, token, secret, str(endpoint), "127.0.0.1", "10.0.0.", "PROPFIND"):
        assert text not in found.text
    assert found.value("http_requests_total", method="other", route="unmatched", status="404") == 3


def test_metrics_that_are_off_have_no_path(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    off = start_service(settings_for(hub_interface, tmp_path, WIREGUARD_METRICS="false"))
    off.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    assert off.client.get("/metrics").status_code == 404
