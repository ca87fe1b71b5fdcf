"""The two requirements.txt, and when make installs which."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
TESTS: Final = "requirements.txt"
RUNS: Final = "deploy/requirements.txt"
PINNED: Final = re.compile(
    r"([a-z0-9-]+)(\[[a-z,]+\])?==[^ ]+( ; [^\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n"
)


def pinned(file: str) -> dict[str, str]:
    """Return what is pinned for each package, markers and hashes included."""
    text = "".join(
        line for line in (ROOT / file).read_text().splitlines(keepends=True) if not line.startswith("#")
    )
    found = {match[1]: match[0] for match in PINNED.finditer(text)}
    # Nothing stands between them: no option, no address, no package without a hash.
    assert "".join(found.values()) == text
    return found


def named(*requirements: str) -> set[str]:
    return {re.split(r"[^A-Za-z0-9-]", requirement, maxsplit=1)[0] for requirement in requirements}


def imported() -> Iterator[str]:
    for path in (ROOT / "backend").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (name.name.partition(".")[0] for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield str(node.module).partition(".")[0]


def test_all_that_is_installed_has_hashes_and_production_has_the_versions_that_were_tested() -> None:
    runs, tests = pinned(RUNS), pinned(TESTS)
    assert runs.items() < tests.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert named(*project["dependencies"], *extras["redis"]) <= runs.keys()
    assert named(*extras["test"]) <= tests.keys()


def test_production_installs_what_runs_and_no_tool_of_the_tests() -> None:
    runs = pinned(RUNS).keys()
    assert {"hypothesis", "mypy", "pytest", "ruff", "coverage"}.isdisjoint(runs)
    distributions = packages_distributions()
    external = set(imported()) - set(sys.stdlib_module_names) - {"backend"}
    assert external
    for module in external:
        assert {name.lower().replace("_", "-") for name in distributions[module]} <= set(runs), module


class Checkout:
    """The Makefile with programs in .venv that say how they were called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._called = directory / "called"
        (directory / "deploy").mkdir()
        for file in ("Makefile", TESTS, RUNS):
            shutil.copyfile(ROOT / file, directory / file)
        self.python = self._program(directory / "python", '[ "$1" != -m ] || mkdir -p .venv/bin')
        for name in ("pip", "python", "pytest"):
            self._program(directory / ".venv" / "bin" / name, "")

    def _program(self, path: Path, does: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >>{self._called}\n{does}\n')
        path.chmod(0o755)
        return path

    @property
    def called(self) -> str:
        """Which programs of .venv were called, a line each."""
        return self._called.read_text()

    def make(self, target: str) -> list[str]:
        """Return what a target installs."""
        self._called.unlink(missing_ok=True)
        subprocess.run(
            ["make", target, f"PYTHON={self.python}"], cwd=self.directory, check=True, capture_output=True
        )
        return [
            line.rpartition(" ")[2]
            for line in self.called.splitlines()
            if line.startswith("pip install") and "--require-hashes" in line
        ]

    def change(self, file: str) -> None:
        """Have a file look newer than all that was installed."""
        now = time.time()
        for installed in (self.directory / ".venv").glob(".*"):
            os.utime(installed, (now - 10, now - 10))
        for each in (TESTS, RUNS):
            changed = now - (5 if each == file else 20)
            os.utime(self.directory / each, (changed, changed))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_make_run_installs_what_runs_and_make_test_the_rest_once(checkout: Checkout) -> None:
    assert checkout.make("run") == [RUNS]
    assert checkout.make("run") == []
    assert checkout.make("unit") == [TESTS]
    for target in ("run", "unit", "run"):
        assert checkout.make(target) == []


def test_make_run_after_make_test_installs_nothing(checkout: Checkout) -> None:
    assert checkout.make("unit") == [TESTS]
    for target in ("run", "unit"):
        assert checkout.make(target) == []


def test_changed_requirements_are_installed_again(checkout: Checkout) -> None:
    assert (checkout.make("run"), checkout.make("unit")) == ([RUNS], [TESTS])
    checkout.change(RUNS)
    assert (checkout.make("unit"), checkout.make("run"), checkout.make("run")) == ([], [RUNS], [])


class Host:
    """A machine whose only programs are those in one directory. apt-get writes down what it was asked."""

    def __init__(self, checkout: Checkout, *tools: str) -> None:
        self._checkout = checkout
        self._bin = checkout.directory / "bin"
        self._asked = checkout.directory / "asked"
        self._bin.mkdir()
        for name in ("make", "touch", "mkdir", "grep"):
            (self._bin / name).symlink_to(str(shutil.which(name)))
        for name in tools:
            self.program(name)
        self.program("id", "echo 0")
        self.program("modprobe", "exit 1")
        self.apt("exit 0")

    def program(self, name: str, does: str = "") -> None:
        path = self._bin / name
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)

    def apt(self, does: str) -> None:
        self.program("apt-get", f"echo \"$@\" >>'{self._asked}'\n{does}")

    def asked_by_make_run(self, **environment: str) -> list[str]:
        done = subprocess.run(
            ["make", "run", f"PYTHON={self._checkout.python}", f"TOOL_PATH={self._bin}"],
            cwd=self._checkout.directory,
            env={"PATH": str(self._bin), **environment},
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        assert "python -m backend run --port 8000" in self._checkout.called
        return self._asked.read_text().splitlines() if self._asked.exists() else []


INSTALL = "install --yes --quiet --no-install-recommends"
# A kernel with WireGuard needs no wireguard-go.
IN_KERNEL = Path("/sys/module/wireguard").exists()


def test_make_run_installs_the_tools_that_are_missing_and_nothing_that_they_recommend(
    checkout: Checkout,
) -> None:
    host = Host(checkout, "ip")
    wireguard_go = "" if IN_KERNEL else " wireguard-go"
    assert host.asked_by_make_run() == [f"{INSTALL} wireguard-tools{wireguard_go}"]


def test_make_run_needs_no_wireguard_go_where_the_kernel_has_wireguard(checkout: Checkout) -> None:
    host = Host(checkout)
    host.program("modprobe", '[ "$*" = "--dry-run --quiet wireguard" ]')
    assert host.asked_by_make_run() == [f"{INSTALL} wireguard-tools iproute2"]


def test_make_run_fetches_the_lists_of_packages_when_it_takes_them(checkout: Checkout) -> None:
    host = Host(checkout, "ip", "wireguard-go")
    lists = checkout.directory / "lists"
    host.apt(f"case $1 in update) : >'{lists}';; *) [ -e '{lists}' ];; esac")
    install = f"{INSTALL} wireguard-tools"
    assert host.asked_by_make_run() == [install, "update --quiet", install]


def test_make_run_goes_on_where_apt_fails(checkout: Checkout) -> None:
    host = Host(checkout, "ip", "wireguard-go")
    host.apt("exit 100")
    assert host.asked_by_make_run() == [f"{INSTALL} wireguard-tools", "update --quiet"]


def test_make_run_installs_nothing_that_it_does_not_need(checkout: Checkout) -> None:
    host = Host(checkout, "ip", "wg", "wireguard-go")
    assert host.asked_by_make_run() == []


def test_make_run_installs_nothing_where_no_interface_is_wanted(checkout: Checkout) -> None:
    host = Host(checkout)
    assert host.asked_by_make_run(WIREGUARD_RELOAD="off") == []
    (checkout.directory / ".env").write_text("LOG_LEVEL=debug\nWIREGUARD_RELOAD=off\n")
    assert host.asked_by_make_run() == []


def test_make_run_installs_nothing_for_another_user_than_root(checkout: Checkout) -> None:
    host = Host(checkout)
    host.program("id", "echo 1000")
    assert host.asked_by_make_run() == []
