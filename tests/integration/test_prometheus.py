"""Debian's Prometheus reads the metrics of a service that runs, and evaluates the rules and the dashboard."""

import re
from collections.abc import Iterator
from typing import Final

import pytest

from tests.harness.dashboard import queries
from tests.harness.hosts import LocalHost
from tests.harness.patience import eventually
from tests.harness.prometheus import Prometheus, alerts, metrics_in
from tests.harness.requests import PEERS, PROVISION, bearer, provision_body
from tests.harness.service import ServiceProcess
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface

# What there is nothing of yet: an alert, a peer's first packet, a backup.
EMPTY: Final = {"Alerts that fire, A", "Received by peer, A", "Sent by peer, A", "Last good backup, A"}


@pytest.fixture(scope="module")
def hub(needs_wireguard: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubInterface]:
    """Make an interface for all tests here: Prometheus waits five seconds before its first scrape."""
    with HubInterface(LocalHost(), "wgwatched", tmp_path_factory.mktemp("hub"), listen_port=39990) as hub:
        hub.start()
        yield hub


@pytest.fixture(scope="module")
def service(hub: HubInterface, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("service")
    # Without `for` a service without a backup, as each new one is, raises an alert of its own.
    over = {"WIREGUARD_METRICS_PER_PEER": "true", "WIREGUARD_BACKUP_KEEP": "0"}
    settings = settings_for(hub, directory, STATE_DIRECTORY="var", **over)
    with ServiceProcess(directory, settings) as service:
        yield service


@pytest.fixture(scope="module")
def key(service: ServiceProcess) -> str:
    """Make the key that Prometheus shows."""
    return service.credential("key", "create", "--role", "read")


@pytest.fixture(scope="module")
def prometheus(
    service: ServiceProcess, key: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{service.port}") as prometheus:
        prometheus.show(key)
        eventually(lambda: prometheus.value("up") == 1)
        yield prometheus


def test_every_metric_of_the_alerts_and_the_dashboard_exists(service: ServiceProcess) -> None:
    scrape = service.client.get("/metrics").text
    exist = set()
    for name, kind in re.findall(r"^# TYPE (wireguard_\w+) (\w+)$", scrape, re.MULTILINE):
        parts = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
        exist |= {f"{name}{part}" for part in parts}
    used = {name for text in queries().values() for name in metrics_in(text)}
    used |= {name for alert in alerts() for name in metrics_in(alert.expression)}
    assert len(used) > 30
    assert used - exist == set()


def test_prometheus_evaluates_every_alert_and_every_query_of_the_dashboard(
    prometheus: Prometheus, service: ServiceProcess
) -> None:
    """Some mistakes show with series alone, such as several that match one."""
    for number in range(2):
        service.client.post(PROVISION, json=provision_body(f"node-{number}")).raise_for_status()
    assert service.client.get(PEERS, headers=bearer("wrong")).status_code == 401

    def all_rules_are_evaluated() -> bool:
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        assert [rule["lastError"] for rule in rules if "lastError" in rule] == []
        return len(rules) == len(alerts()) and all(rule["health"] == "ok" for rule in rules)

    def all_queries_are_answered() -> bool:
        asked = queries().items()
        empty = {place for place, query in asked if not prometheus.get("query", query=query)["result"]}
        return empty <= EMPTY

    eventually(all_rules_are_evaluated)
    eventually(all_queries_are_answered)


def test_alert_fires_when_the_interface_goes_and_ends_when_it_is_back(
    prometheus: Prometheus, hub: HubInterface
) -> None:
    eventually(lambda: prometheus.firing() == {})
    hub.down()
    eventually(lambda: "WireGuardHubNotReconciled" in prometheus.firing())
    annotations = prometheus.firing()["WireGuardHubNotReconciled"]
    assert annotations["summary"].startswith("The hub of 127.0.0.1:")
    assert annotations["runbook_url"] == "docs/operations.md#wireguardhubnotreconciled"
    hub.start()
    eventually(lambda: prometheus.firing() == {})


def test_alert_fires_when_the_key_of_prometheus_is_revoked_and_ends_with_a_new_one(
    prometheus: Prometheus, service: ServiceProcess, key: str
) -> None:
    assert service.command("key", "revoke", key.split("_")[1]).returncode == 0
    eventually(lambda: "WireGuardServiceDown" in prometheus.firing())
    (target,) = prometheus.get("targets")["activeTargets"]
    assert re.search(r"401|429", target["lastError"])
    prometheus.show(service.credential("key", "create", "--role", "read"))
    # Prometheus 2.42 reads the file for each scrape, 3.5 once.
    prometheus.restart()
    eventually(lambda: prometheus.firing() == {})
