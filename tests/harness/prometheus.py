"""What deploy/ has for Prometheus, the programs that judge it, and a Prometheus that runs."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import httpx
import yaml  # type: ignore[import-untyped]  # PyYAML comes without types

from tests.harness.command_line import ROOT
from tests.harness.patience import eventually
from tests.harness.requests import NO_TLS
from tests.harness.requirements import find_tool, require
from tests.harness.service import free_port

RULES: Final = ROOT / "deploy" / "prometheus" / "wireguard-provisioning.rules.yml"
SCRAPE_CONFIG: Final = ROOT / "deploy" / "prometheus" / "prometheus.yml"
# What the configuration names as the file of the key, beside itself.
CREDENTIALS: Final = "wireguard-provisioning.key"

_INTERVAL: Final = "250ms"
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


class Prometheus:
    """Debian's Prometheus with the configuration and the rules of deploy/, on a free port of 127.0.0.1.

    It scrapes the target and evaluates the rules four times a second, and its alerts don't wait.
    """

    def __init__(self, directory: Path, target: str) -> None:
        require("prometheus")
        self._directory = directory
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{free_port()}", trust_env=False, verify=NO_TLS
        )

    def __enter__(self) -> Self:
        self._configure()
        self._start()
        return self

    def _start(self) -> None:
        command: list[str | Path] = [str(find_tool("prometheus"))]
        command += [f"--config.file={self._directory / SCRAPE_CONFIG.name}"]
        command += [f"--storage.tsdb.path={self._directory / 'data'}"]
        command += [f"--web.listen-address={self._client.base_url.host}:{self._client.base_url.port}"]
        self._log = self._directory / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            eventually(self._answers)
        except BaseException:
            self.__exit__()
            raise

    def restart(self) -> None:
        """Kill it, and start it again with what it has stored."""
        self._kill()
        self._start()

    def __exit__(self, *exc: object) -> None:
        self._client.close()
        self._kill()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def show(self, key: str) -> None:
        """Have it show this key: some versions from the next scrape on, others after a restart."""
        (self._directory / CREDENTIALS).write_text(key)

    def get(self, path: str, **parameters: str) -> Any:
        """Ask the HTTP API and return the `data` of its answer."""
        answer = self._client.get(f"/api/v1/{path}", params=parameters)
        answer.raise_for_status()
        return answer.json()["data"]

    def value(self, expression: str) -> float | None:
        """Return the one value of an expression, None where it has none."""
        result = self.get("query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else None

    def firing(self) -> dict[str, dict[str, str]]:
        """Return the annotations of each alert that fires."""
        found = self.get("alerts")["alerts"]
        return {one["labels"]["alertname"]: one["annotations"] for one in found if one["state"] == "firing"}

    def _configure(self) -> None:
        config = read_yaml(SCRAPE_CONFIG)
        config["global"] = {"scrape_interval": _INTERVAL, "evaluation_interval": _INTERVAL}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [self._target]}]
        rules = read_yaml(RULES)
        for group in rules["groups"]:
            for rule in group["rules"]:
                del rule["for"]
        for name, content in ((SCRAPE_CONFIG.name, config), (RULES.name, rules)):
            (self._directory / name).write_text(yaml.safe_dump(content))
        (self._directory / CREDENTIALS).touch(mode=0o600)

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(self._log.read_text())
        with suppress(httpx.TransportError):
            return self._client.get("/-/ready").is_success
        return False
