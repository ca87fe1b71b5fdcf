"""The dashboard in deploy/grafana: Grafana can show every panel, and Prometheus can answer every query."""

import re
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from tests.harness.command_line import ROOT
from tests.harness.dashboard import BOARD, GRAFANA, VARIABLES, expressions, queries
from tests.harness.prometheus import SCRAPE_CONFIG, promtool, read_yaml, write_expressions

PANELS: Final[list[dict[str, Any]]] = BOARD["panels"]
SHOWN: Final = [panel for panel in PANELS if panel["type"] != "row"]
COLUMNS: Final = 24
# A panel of another type is shown as an error: these are Grafana's own.
TYPES: Final = {"heatmap", "row", "stat", "table", "timeseries"}


def test_every_panel_has_an_id_of_its_own_a_description_and_a_unit() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    for panel in SHOWN:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    assert {panel["type"] for panel in PANELS} <= TYPES


def test_no_panel_covers_another_one() -> None:
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] >= 0, panel["title"]
        assert place["x"] + place["w"] <= COLUMNS, panel["title"]
    for one, other in combinations(PANELS, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (one["title"], other["title"])


def test_the_viewer_chooses_the_data_source() -> None:
    """A fixed one has another name in each Grafana."""
    (source,) = (one for one in BOARD["templating"]["list"] if one["type"] == "datasource")
    assert (source["name"], source["query"]) == ("datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    asks = [*SHOWN, *(target for panel in SHOWN for target in panel["targets"])]
    asks += BOARD["annotations"]["list"]
    asks += [one for one in BOARD["templating"]["list"] if one["type"] == "query"]
    assert [one for one in asks if one["datasource"] != chosen] == []


def test_every_variable_of_a_query_is_one_that_the_dashboard_or_grafana_has() -> None:
    ours = {f"${one['name']}" for one in BOARD["templating"]["list"]}
    used = {name for _, text in expressions() for name in re.findall(r"\$\w+", text)}
    assert used <= ours | {"$__rate_interval"}
    assert used == VARIABLES.keys()


def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    found = queries()
    assert len(found) == sum(len(panel["targets"]) for panel in SHOWN) + 1
    done = promtool("check", "rules", write_expressions(found, tmp_path / "expressions.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(found)} rules found" in done.stdout


def test_grafana_is_shown_the_dashboards_directory_and_where_prometheus_is() -> None:
    (provider,) = read_yaml(GRAFANA / "dashboards.yml")["providers"]
    assert provider["type"] == "file"
    # The command that puts the dashboard there.
    documented = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"deploy/grafana/wireguard-provisioning.json {provider['options']['path']}/" in documented
    (source,) = read_yaml(GRAFANA / "datasources.yml")["datasources"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == read_yaml(SCRAPE_CONFIG)["global"]["scrape_interval"]
