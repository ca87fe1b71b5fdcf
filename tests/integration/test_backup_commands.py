"""`python -m backend backup`: what its commands print, and the sentences that they refuse with."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.command_line import ROOT, hub_settings, invoke

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return what runs `backup` with the settings of a hub that is a file, which exists."""
    settings = {**hub_settings(tmp_path), "ENABLE_DBOS": "true"}
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    assert invoke("key", "list", directory=tmp_path, settings=settings).returncode == 0

    def backup(*arguments: str, **over: Any) -> subprocess.CompletedProcess[str]:
        return invoke("backup", *arguments, directory=tmp_path, settings={**settings, **over})

    return backup


def test_backup_is_made_listed_and_verified_by_its_name(run: Run, tmp_path: Path) -> None:
    made = run("create")
    path = Path(made.stdout.strip())
    assert (made.returncode, path.parent) == (0, tmp_path / "state" / "backups")
    assert "wg0, generation 0, 0 peers" in made.stderr
    torn = path.with_name(path.name.replace("-g0", "-g1"))
    torn.write_bytes(path.read_bytes()[:100])
    (path.parent / "notes.txt").touch()
    listed = run("list").stdout.splitlines()
    assert [line.split("  ")[0] for line in listed] == [torn.name, path.name]
    assert "can't be read: the backup is torn" in listed[0]
    assert "generation 0, 0 peers" in listed[1]
    for named in (path.name, str(path)):
        verified = run("verify", named)
        assert (verified.returncode, verified.stdout.partition(":")[0]) == (0, "whole")
    refused = run("verify", torn.name)
    assert (refused.returncode, refused.stderr) == (1, "error: the backup is torn: its end is missing\n")
    assert "doesn't exist; `backup list` prints the names" in run("verify", "nothing").stderr


def test_backup_goes_through_a_pipe_into_another_command(run: Run, tmp_path: Path) -> None:
    settings = {**hub_settings(tmp_path), "ENABLE_DBOS": "true"}
    exports = " ".join(f"{name}={value}" for name, value in {**settings, "PYTHONPATH": ROOT}.items())
    ours = f"env {exports} {sys.executable} -m backend backup"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{ours} create --output - | {ours} verify -"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("whole: ")
    assert run("list").stdout == ""


def test_records_that_are_elsewhere_are_not_taken_for_empty_ones(run: Run, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    refused = run("create", STATE_DIRECTORY=elsewhere)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert f"there are no records at {elsewhere}/provisioning.sqlite" in refused.stderr
    assert not elsewhere.exists()


def test_records_of_another_user_are_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "state"))

    monkeypatch.setattr(Path, "is_file", refuse)
    refused = run("create")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert f"{tmp_path}/state can't be read or written (Permission denied)" in refused.stderr


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("create --output=- >&-", "there is no output to write to"),
        ("verify - <&-", "there is no input to read a backup from"),
        ("restore - --yes <&-", "there is no input to read a backup from"),
        ("restore mine.tar.gz <&-", "there is no terminal to ask at"),
    ],
)
def test_closed_input_or_output_is_refused_with_a_sentence(
    run: Run, tmp_path: Path, command: str, problem: str
) -> None:
    assert run("create", "--output", str(tmp_path / "mine.tar.gz")).returncode == 0
    settings = {**hub_settings(tmp_path), "ENABLE_DBOS": "true", "PYTHONPATH": ROOT}
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m backend backup {command}"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **{name: str(value) for name, value in settings.items()}},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert problem in done.stderr


def test_output_is_a_new_private_file(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "mine.tar.gz"
    assert run("create", "--output", str(output)).returncode == 0
    assert output.stat().st_mode & 0o777 == 0o600
    assert run("verify", str(output)).returncode == 0
    assert "is there already; name a new file" in run("create", "--output", str(output)).stderr
    assert "No such file" in run("create", "--output", str(tmp_path / "no" / "where")).stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"mine.tar.gz"}
    assert list(tmp_path.glob(".*.tmp")) == []


def test_directory_within_other_users_reach_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for command in (("create",), ("list",)):
        refused = run(*command, WIREGUARD_BACKUP_DIRECTORY=tmp_path / "open")
        assert (refused.returncode, "WIREGUARD_BACKUP_DIRECTORY is within" in refused.stderr) == (1, True)


def test_records_in_memory_have_no_backup(run: Run) -> None:
    for command in (("create",), ("list",), ("verify", "x")):
        refused = run(*command, ENABLE_DBOS="false")
        assert (refused.returncode, "live in the service's memory" in refused.stderr) == (1, True)
