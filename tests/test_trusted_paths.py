"""Who else could change what the service uses, and the sentence that its start is refused with."""

import grp
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.adapters.host.locks import lock_file
from backend.adapters.http.unix_socket import listening_at
from backend.errors import StartRefusedError
from backend.models import trusted_paths
from backend.models.trusted_paths import (
    make_private_directory,
    problem_with,
    require_trusted,
    require_trusted_file,
)

SOMEBODY = 4711


def made(path: Path, mode: int, user: int = -1, group: int = -1) -> Path:
    """Make a directory, whatever the umask."""
    path.mkdir()
    os.chown(path, user, group)
    path.chmod(mode)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(StartRefusedError) as caught:
        require_trusted(path, "STATE_DIRECTORY")
    prefix = "STATE_DIRECTORY is within other users' reach: "
    assert str(caught.value).startswith(prefix)
    return str(caught.value).removeprefix(prefix)


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files away")


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755, 0o2755])
def test_a_directory_that_others_may_only_look_into_is_trusted(tmp_path: Path, mode: int) -> None:
    require_trusted(made(tmp_path / "state", mode), "STATE_DIRECTORY")


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o2777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    directory = made(tmp_path / "state of it", mode)
    assert refusal(directory) == (
        f"they can write to {directory} (mode {mode:04o}); run `chmod go-w '{directory}'`, or choose another "
        "place"
    )


def test_the_remedy_is_one(tmp_path: Path) -> None:
    directory = made(tmp_path / "state", 0o777)
    command = refusal(directory).split("`")[1]
    assert os.system(command) == 0  # noqa: S605 - as pasted
    require_trusted(directory, "STATE_DIRECTORY")


@pytest.mark.usefixtures("as_root")
def test_group_writable_directory_is_refused_unless_the_group_is_roots(tmp_path: Path) -> None:
    assert refusal(made(tmp_path / "staff", 0o770, group=SOMEBODY)).startswith("they can write to")
    require_trusted(made(tmp_path / "root", 0o770, group=0), "STATE_DIRECTORY")


@pytest.mark.usefixtures("as_root")
def test_private_group_of_a_user_is_trusted_until_it_has_another_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = made(tmp_path / "state", 0o775, group=SOMEBODY)
    members = ["root"]
    name = pwd.getpwuid(0).pw_name
    monkeypatch.setattr(grp, "getgrgid", lambda number: grp.struct_group((name, "x", number, members)))
    require_trusted(directory, "STATE_DIRECTORY")
    members.append("mallory")
    assert refusal(directory).startswith("they can write to")


@pytest.mark.usefixtures("as_root")
def test_an_access_list_may_stand_behind_the_groups_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = made(tmp_path / "state", 0o770, group=0)
    monkeypatch.setattr(
        os, "getxattr", lambda _, name: b"\2\0\0\0" if name == "system.posix_acl_access" else b""
    )
    assert refusal(directory).startswith("they can write to")


@pytest.mark.usefixtures("as_root")
def test_directory_of_another_user_is_refused_with_any_mode(tmp_path: Path) -> None:
    directory = made(tmp_path / "state", 0o700, user=SOMEBODY)
    assert refusal(directory) == (
        f"{directory} belongs to {SOMEBODY}; run `chown root {directory}`, or choose another place"
    )


@pytest.mark.usefixtures("as_root")
def test_the_owner_of_this_program_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.touch()
    os.chown(program, SOMEBODY, -1)
    monkeypatch.setattr(trusted_paths, "__file__", str(program))
    require_trusted(made(tmp_path / "state", 0o755, user=SOMEBODY), "STATE_DIRECTORY")


@pytest.mark.usefixtures("as_root")
def test_a_directory_above_is_as_good_as_the_directory(tmp_path: Path) -> None:
    above = made(tmp_path / "above", 0o777)
    below = made(above / "state", 0o700)
    assert refusal(below).startswith(f"they can write to {above} (mode 0777)")
    assert refusal(below / "not" / "there").startswith(f"they can write to {above} (mode 0777)")
    above.chmod(0o755)
    require_trusted(below, "STATE_DIRECTORY")
    os.chown(above, SOMEBODY, -1)
    assert refusal(below).startswith(f"{above} belongs to {SOMEBODY}")


@pytest.mark.usefixtures("as_root")
def test_below_a_sticky_directory_only_the_owner_counts(tmp_path: Path) -> None:
    shared = made(tmp_path / "tmp", 0o1777)
    ours = made(shared / "ours", 0o700)
    require_trusted(ours, "STATE_DIRECTORY")
    require_trusted(shared / "not there", "STATE_DIRECTORY")
    assert refusal(shared) == f"they can make files in {shared}; choose another place"
    assert refusal(made(shared / "theirs", 0o700, user=SOMEBODY)).startswith(f"{shared}/theirs belongs to")


@pytest.mark.usefixtures("as_root")
def test_link_and_its_directories_are_checked(tmp_path: Path) -> None:
    good, bad = made(tmp_path / "good", 0o700), made(tmp_path / "bad", 0o777)
    (tmp_path / "to-bad").symlink_to(bad)
    (bad / "to-good").symlink_to(good)
    (tmp_path / "relative").symlink_to("./good/../good")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(tmp_path / "to-bad").startswith(f"they can write to {bad} ")
    assert refusal(bad / "to-good").startswith(f"they can write to {bad} ")
    for name in ("relative", "dangling", "loop"):
        require_trusted(tmp_path / name, "STATE_DIRECTORY")
    # Of a link elsewhere it doesn't matter who owns it: they can't change it.
    os.lchown(tmp_path / "relative", SOMEBODY, -1)
    require_trusted(tmp_path / "relative", "STATE_DIRECTORY")


@pytest.mark.usefixtures("as_root")
def test_symlink_of_another_user_in_a_shared_directory_is_refused(tmp_path: Path) -> None:
    shared, good = made(tmp_path / "tmp", 0o1777), made(tmp_path / "good", 0o700)
    link = shared / "link"
    link.symlink_to(good)
    require_trusted(link, "STATE_DIRECTORY")
    os.lchown(link, SOMEBODY, -1)
    assert refusal(link).startswith(f"{link} belongs to {SOMEBODY}")


def test_a_file_is_as_good_as_its_mode_and_its_directory(tmp_path: Path) -> None:
    shared = made(tmp_path / "tmp", 0o1777)
    path, link = shared / "wg0.conf", tmp_path / "wg0.conf"
    link.symlink_to(path)
    for there in (False, True):
        if there:
            path.touch(0o600)
        for way in (path, link):
            with pytest.raises(StartRefusedError, match=f"WG is within .*: they can make files in {shared};"):
                require_trusted_file(way, "WG")
    link.unlink()
    link.touch()
    link.chmod(0o644)
    require_trusted_file(link, "WG")
    link.chmod(0o646)
    with pytest.raises(StartRefusedError, match=r"they can write to .*/wg0.conf \(mode 0646\)"):
        require_trusted_file(link, "WG")


def test_everyday_places_are_trusted() -> None:
    for path in ("/", "/etc", "/usr/bin", "/var/lib"):
        assert problem_with(Path(path)) is None
    assert problem_with(Path("/tmp")) is not None  # noqa: S108 - that's what is asked


def test_directories_are_created_private_with_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private_directory(tmp_path / "one" / "two")
        lock = lock_file(tmp_path / "one" / "lock", "it")
    finally:
        os.umask(before)
    lock.close()
    for path, mode in (("one", 0o700), ("one/two", 0o700), ("one/lock", 0o600)):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == mode


def test_lock_file_becomes_private(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    path.chmod(0o666)
    lock_file(path, "it").close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def laid_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def laid_hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def laid_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("lay", "said"),
    [
        (laid_link, "is a symbolic link"),
        (laid_hard_link, "has another name too"),
        (laid_pipe, "is not a regular file"),
    ],
)
def test_a_lock_file_never_empties_the_file_that_a_link_leads_to(
    tmp_path: Path, lay: Callable[[Path, Path], None], said: str
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "lock"
    victim.write_text("all that there is")
    victim.chmod(0o640)
    lay(path, victim)
    with pytest.raises(StartRefusedError, match=f"lock file {path} {said}, .* remove it"):
        lock_file(path, "it")
    assert victim.read_text() == "all that there is"
    assert stat.S_IMODE(victim.stat().st_mode) == 0o640


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("mode", [0o770, 0o1777])
def test_socket_is_refused_in_a_directory_that_others_may_write(tmp_path: Path, mode: int) -> None:
    directory = made(tmp_path / "run", mode, group=SOMEBODY)
    path = directory / "hub.sock"
    said = rf"^the directory of {path} \(--unix-socket\) is within other"
    with pytest.raises(StartRefusedError, match=said), listening_at(path):
        pass
    assert list(directory.iterdir()) == []
    directory.chmod(0o750)
    with listening_at(path):
        assert path.is_socket()
