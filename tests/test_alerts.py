"""The rules and the configuration in deploy/prometheus: what promtool says of them, and the runbook."""

import re
import shutil
from pathlib import Path
from typing import Any, Final

import pytest

from tests.harness.command_line import ROOT
from tests.harness.prometheus import (
    CREDENTIALS,
    RULES,
    SCRAPE_CONFIG,
    Alert,
    alerts,
    promtool,
    read_yaml,
)

CASES: Final = ROOT / "tests" / "alerts"
RUNBOOK: Final = "docs/operations.md"
ALERTS: Final = pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)


def test_prometheus_understands_every_rule() -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(alerts())} rules found" in done.stdout


def test_prometheus_understands_the_configuration_with_the_rules_beside_it(tmp_path: Path) -> None:
    for file in (RULES, SCRAPE_CONFIG):
        shutil.copy(file, tmp_path)
    (tmp_path / CREDENTIALS).touch()
    done = promtool("check", "config", tmp_path / SCRAPE_CONFIG.name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rule files found" in done.stdout


@pytest.mark.parametrize("cases", ["fires.yml", "quiet.yml"])
def test_alerts_fire_when_they_should_and_only_then(cases: str) -> None:
    done = promtool("test", "rules", CASES / cases)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    fires = set()
    for case in read_yaml(CASES / "fires.yml")["tests"]:
        fires |= {one["alertname"] for one in case.get("alert_rule_test", ()) if one["exp_alerts"]}
        for one in case.get("promql_expr_test", ()):
            fires.update(re.findall(r'alertname="(\w+)"', str(one["exp_samples"])))
    assert fires == {alert.name for alert in alerts()}


def test_every_case_without_an_alarm_looks_for_all_alerts_at_every_moment() -> None:
    for case in read_yaml(CASES / "quiet.yml")["tests"]:
        (one,) = case["promql_expr_test"]
        assert one == {
            "expr": 'count_over_time(ALERTS{alertstate="firing"}[6h])',
            "eval_time": "4h",
            "exp_samples": [],
        }, case["name"]


@ALERTS
def test_every_alert_says_how_bad_it_is_and_what_it_means(alert: Alert) -> None:
    assert alert.labels.keys() == {"severity"}
    assert alert.labels["severity"] in {"critical", "warning", "info"}
    assert alert.annotations.keys() == {"summary", "description", "runbook_url"}
    assert not alert.annotations["summary"].endswith(".")
    assert alert.annotations["description"].endswith(".")


@ALERTS
def test_every_alert_waits_before_it_fires(alert: Alert) -> None:
    """A restart of the service, or of Prometheus, misses a few scrapes."""
    assert re.fullmatch(r"[1-9]\d*[mhd]", alert.wait)


def test_every_alert_has_its_section_of_the_runbook_and_every_section_its_alert() -> None:
    _, _, runbook = (ROOT / RUNBOOK).read_text(encoding="utf-8").partition("\n## Alerts\n")
    runbook, _, _ = runbook.partition("\n## ")
    sections = re.findall(r"^### (\w+)$", runbook, re.MULTILINE)
    assert sections == [alert.name for alert in alerts()]
    # An anchor is the heading in lower case, see test_documents.py.
    assert [alert.annotations["runbook_url"] for alert in alerts()] == [
        f"{RUNBOOK}#{name.lower()}" for name in sections
    ]


def test_the_job_that_the_alerts_look_for_is_the_one_that_is_scraped() -> None:
    (job,) = read_yaml(SCRAPE_CONFIG)["scrape_configs"]
    named = {name for alert in alerts() for name in re.findall(r'job="([^"]*)"', alert.expression)}
    assert named == {job["job_name"]}


def test_the_key_stands_in_a_file_of_its_own() -> None:
    config: dict[str, Any] = read_yaml(SCRAPE_CONFIG)
    (job,) = config["scrape_configs"]
    assert job["authorization"] == {"credentials_file": CREDENTIALS}
    assert config["rule_files"] == [RULES.name]
