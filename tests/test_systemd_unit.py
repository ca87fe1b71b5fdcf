"""The unit in deploy/: what systemd says of it, and that it fits the wrapper and the code."""

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Final

import pytest

from backend.settings import Settings
from tests.harness.requirements import find_tool, require

DEPLOY: Final = Path(__file__).parent.parent / "deploy"
UNIT: Final = DEPLOY / "wireguard-provisioning.service"
# Of 10 (systemd-analyze(1)); 252 says 1.5. What is left is the network, which is the service's work.
EXPOSURE: Final = 2.0
NAME = re.compile(r"^#?([A-Z_]+)=", re.MULTILINE)


def parsed() -> dict[str, list[str]]:
    """Return each option's values, in order; configparser keeps only the last."""
    options = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            options[name].append(value)
    return options


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    require("systemd-analyze")
    return subprocess.run(
        [str(find_tool("systemd-analyze")), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    # What it starts isn't installed here, and systemd looks.
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/wireguard-provisioning/.venv/bin/python", sys.executable))
    done = analyze("verify", "--recursive-errors=no", "--man=no", "--generators=no", unit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_finds_little_that_it_could_be_denied() -> None:
    threshold = f"--threshold={EXPOSURE * 10:g}"
    done = analyze("security", "--offline=true", "--no-pager", threshold, UNIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Overall exposure level for {UNIT.name}" in done.stdout


def test_one_privilege_and_one_place_to_write_to() -> None:
    unit = parsed()
    assert unit["CapabilityBoundingSet"] == unit["AmbientCapabilities"] == ["CAP_NET_ADMIN"]
    assert unit["User"] == unit["Group"] == ["wireguard-provisioning"]
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["UMask"] == ["0077"]
    assert unit["LimitCORE"] == ["0"]
    # As many as the service would raise its soft limit to, which the filter of system calls refuses.
    assert unit["LimitNOFILE"] == ["8192"]
    assert (unit["StateDirectory"], unit["StateDirectoryMode"]) == (["wireguard-provisioning"], ["0700"])
    assert "ReadWritePaths" not in unit
    # No plus and no exclamation mark: nothing of it is run with more than that.
    for name in ("ExecStartPre", "ExecStart"):
        assert [value for value in unit[name] if not value.startswith("/opt/wireguard-provisioning/")] == []


def test_unit_starts_existing_commands() -> None:
    unit = parsed()
    options = "--tls-cert /etc/hub/tls.pem --tls-key /etc/hub/tls.key"
    values = {"${SERVE_HOST}": "127.0.0.1", "${SERVE_PORT}": "8000", "$SERVE_OPTIONS": options}
    for command in (*unit["ExecStartPre"], *unit["ExecStart"]):
        # Of the last one systemd makes several arguments.
        _, *arguments = shlex.split(" ".join(values.get(word, word) for word in shlex.split(command)))
        done = subprocess.run(
            [sys.executable, *arguments, "--help"],
            cwd=DEPLOY.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Usage:" in done.stdout


def test_example_names_existing_settings() -> None:
    known = {name.upper() for name in Settings.model_fields} | {"SERVE_HOST", "SERVE_PORT", "SERVE_OPTIONS"}
    names = NAME.findall((DEPLOY / "wireguard-provisioning.env").read_text())
    assert set(names) - known == set()
    defaults = " ".join(parsed()["Environment"])
    for name in ("WIREGUARD_CONFIG_PATH", "SERVE_HOST", "SERVE_PORT", "SERVE_OPTIONS"):
        assert f"{name}=" in defaults


@pytest.fixture
def wrapper(tmp_path: Path) -> Path:
    """Install the wrapper below tmp_path, with programs that say how they were called."""
    for name, text in {
        "setpriv": 'printf "%s\\n" "$PWD" "$@" >called; env >environment',
        "python": "exit 1",
    }.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    script = tmp_path / "wireguard-provisioning"
    text = (DEPLOY / script.name).read_text()
    for installed in ("/opt/wireguard-provisioning\n", "/etc/"):
        assert text.count(installed) == 1
        text = text.replace(installed, f"{tmp_path}{installed[-1]}")
    script.write_text(text)
    script.chmod(0o755)
    return script


def test_the_wrapper_runs_a_command_with_the_units_user_privilege_and_settings(
    wrapper: Path, tmp_path: Path
) -> None:
    url = "DATABASE_URL=postgresql://u:p%40@h/d?a=b&c=$(touch pwned) '`"
    (tmp_path / "wireguard-provisioning.env").write_text(f"# A=1\n\nLOG_LEVEL=debug\n{url}\nSERVE_PORT=1")
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    subprocess.run([wrapper, "hub", "show me"], check=True, env={"PATH": path})
    place, *called = (tmp_path / "called").read_text().splitlines()
    assert place == str(tmp_path)
    assert called[-5:] == [".venv/bin/python", "-m", "backend", "hub", "show me"]
    unit = parsed()
    assert f"--reuid={unit['User'][0]}" in called
    assert f"--regid={unit['Group'][0]}" in called
    for option in ("--bounding-set", "--inh-caps", "--ambient-caps"):
        assert f"{option}=-all,+net_admin" in called
    environment = (tmp_path / "environment").read_text().splitlines()
    for line in (
        f"STATE_DIRECTORY=/var/lib/{unit['StateDirectory'][0]}",
        unit["Environment"][0],
        "LOG_LEVEL=debug",
        url,
        "SERVE_PORT=1",
    ):
        assert line in environment
    assert not (tmp_path / "pwned").exists()
