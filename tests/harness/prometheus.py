"""What deploy/ has for Prometheus, the programs that judge it, and a Prometheus that runs."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]  # PyYAML comes without types

from tests.harness.command_line import ROOT
from tests.harness.requirements import find_tool, require

RULES: Final = ROOT / "deploy" / "prometheus" / "wireguard-provisioning.rules.yml"
SCRAPE_CONFIG: Final = ROOT / "deploy" / "prometheus" / "prometheus.yml"
# What the configuration names as the file of the key, beside itself.
CREDENTIALS: Final = "wireguard-provisioning.key"

_METRIC: Final = re.compile(r"\bwireguard_[a-z_]+\b")


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule of RULES."""

    name: str
    expression: str
    wait: str
    labels: dict[str, str]
    annotations: dict[str, str]


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def alerts() -> list[Alert]:
    """Return all alerts of RULES, in order."""
    return [
        Alert(rule["alert"], rule["expr"], rule["for"], rule["labels"], rule["annotations"])
        for group in read_yaml(RULES)["groups"]
        for rule in group["rules"]
    ]


def metrics_in(expression: str) -> Iterator[str]:
    """Yield the service's metrics that an expression names."""
    # A label's value is no name.
    yield from _METRIC.findall(re.sub(r'"[^"]*"', '""', expression))


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run promtool and return what it says; skip the test where it isn't installed."""
    require("promtool")
    return subprocess.run(
        [str(find_tool("promtool")), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def write_expressions(expressions: dict[str, str], path: Path) -> Path:
    """Write PromQL expressions as recording rules, which `promtool check rules` parses, and return `path`."""
    rules = [
        {"record": "parsed", "labels": {"place": name}, "expr": text} for name, text in expressions.items()
    ]
    path.write_text(yaml.safe_dump({"groups": [{"name": "expressions", "rules": rules}]}))
    return path
