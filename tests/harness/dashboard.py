"""The dashboard of deploy/grafana, and what it asks Prometheus."""

import json
from collections.abc import Iterator
from typing import Any, Final

from tests.harness.command_line import ROOT

GRAFANA: Final = ROOT / "deploy" / "grafana"
BOARD: Final[dict[str, Any]] = json.loads((GRAFANA / "wireguard-provisioning.json").read_text())
# What Grafana puts into a query in place of its variables.
VARIABLES: Final = {"$__rate_interval": "1m", "$instance": ".+"}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each query, with Grafana's variables in it."""
    for panel in BOARD["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']}, {target['refId']}", target["expr"]
    for annotation in BOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


def queries() -> dict[str, str]:
    """Return each query as Prometheus gets it, by its place."""
    found = {}
    for place, expression in expressions():
        query = expression
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        found[place] = query
    return found
