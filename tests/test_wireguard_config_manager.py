"""The hub's wg-quick file: what is the operator's stays, what is ours is replaced as a whole."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from backend.errors import ConfigFileError, HubUpdateError
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services import wireguard_config_manager
from backend.services.hub.config_text import PeerBlock, parse, render
from backend.services.wireguard_config_manager import WireGuardConfigManager
from tests.harness.config_files import (
    HUB,
    KEYS,
    MINIMAL,
    OPERATOR_PEERS,
    OPERATORS,
    PRIVATE,
    ZERO,
    numbered,
    numbered_text,
)
from tests.harness.peers import block
from tests.harness.torture import tried


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "wg0.conf"
    path.write_bytes(OPERATORS)
    path.chmod(0o600)
    return path


@pytest.fixture
def manager(config: Path) -> WireGuardConfigManager:
    return WireGuardConfigManager(config)


def test_hundred_peers_come_and_go_and_the_operators_bytes_stay(
    config: Path, manager: WireGuardConfigManager
) -> None:
    peers: dict[int, PeerBlock] = {}
    for step in range(100):
        number = step * 7 % 40
        if number in peers:
            del peers[number]
        else:
            peers[number] = numbered(number)
        assert manager.write(peers.values())
        assert config.read_bytes() == OPERATORS + b"".join(map(numbered_text, peers))
    assert manager.parsed.operator_peers == OPERATOR_PEERS
    assert manager.write([])
    assert config.read_bytes() == OPERATORS


def _unread(path: Path) -> tuple[int, int, int]:
    """Return what reading a file doesn't change."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def test_file_that_is_as_it_should_be_is_left_alone(config: Path, manager: WireGuardConfigManager) -> None:
    assert manager.write([numbered(0)])
    before = _unread(config)
    assert not manager.write([numbered(0)])
    assert not WireGuardConfigManager(config).write([numbered(0)])
    assert _unread(config) == before


def test_stripped_text_is_the_one_that_strip_makes_of_the_file(
    config: Path, manager: WireGuardConfigManager
) -> None:
    peers = [numbered(0), numbered(1)]
    manager.write(peers)
    stripped = manager.parsed.stripped
    assert stripped == parse(config.read_bytes()).stripped
    assert b"PostUp" not in stripped
    assert manager.parsed.blocks == tuple(peers)


def test_file_is_read_at_first_use(config: Path, manager: WireGuardConfigManager) -> None:
    assert manager.path == config
    assert manager.interface == "wg0"
    assert manager.parsed.hub_public_key == HUB
    assert not manager.refresh()
    assert WireGuardConfigManager(str(config)).refresh()


@tried(50, HealthCheck.filter_too_much)
@given(
    turns=st.lists(st.lists(st.integers(0, 5), unique=True), min_size=1, max_size=8),
    comes_to_the_end=st.booleans(),
)
def test_the_file_is_rendered_the_same_whatever_came_and_went(
    tmp_path_factory: pytest.TempPathFactory, turns: list[list[int]], comes_to_the_end: bool
) -> None:
    config = tmp_path_factory.mktemp("hub") / "wg0.conf"
    config.write_bytes(OPERATORS)
    manager = WireGuardConfigManager(config)
    for numbers in turns:
        peers = list(map(numbered, sorted(numbers) if comes_to_the_end else numbers))
        manager.write(peers)
        assert config.read_bytes() == render(OPERATORS, peers)
        assert manager.parsed.blocks == tuple(peers)


@pytest.mark.parametrize("settle", [True, False])
def test_operators_edit_between_two_writes_is_kept(
    config: Path, manager: WireGuardConfigManager, settle: bool
) -> None:
    config.write_bytes(MINIMAL + b"# a\n")
    manager.write([numbered(0)])
    text = config.read_bytes()
    if settle:
        os.utime(config, (1_000_000_000, 1_000_000_000))
        assert not manager.refresh()
    # Same size, and perhaps within the same tick of the file system's clock.
    config.write_bytes(text.replace(b"# a\n", b"# b\n"))
    assert manager.write([numbered(0), numbered(1)])
    assert config.read_bytes() == MINIMAL + b"# b\n" + numbered_text(0) + numbered_text(1)


def test_refresh_says_whether_the_operators_part_is_new(
    config: Path, manager: WireGuardConfigManager
) -> None:
    assert manager.refresh()
    assert not manager.refresh()
    config.write_bytes(render(OPERATORS, [numbered(0)]))
    assert not manager.refresh()
    assert manager.parsed.blocks == (numbered(0),)
    other = WireGuardPrivateKey(bytes([99] * 32))
    config.write_bytes(OPERATORS.replace(PRIVATE.encode(), other.reveal().encode(), 1))
    assert manager.refresh()
    assert manager.parsed.hub_public_key == other.public_key()


def test_writing_does_not_parse_again_what_has_not_changed(
    manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.refresh()

    def no_parse(text: bytes) -> NoReturn:
        raise AssertionError(f"{len(text)} bytes were parsed again")

    monkeypatch.setattr(wireguard_config_manager, "parse", no_parse)
    for number in range(10):
        assert manager.write([numbered(number)])
        assert numbered_text(number) in manager.parsed.stripped


def test_broken_file_is_refused_until_it_is_mended(config: Path, manager: WireGuardConfigManager) -> None:
    manager.write([numbered(0)])
    broken = config.read_bytes() + b"\n[Peer]\nnonsense\n"
    last_line = broken.count(b"\n")
    config.write_bytes(broken)
    for _ in range(3):
        with pytest.raises(ConfigFileError, match=rf"line {last_line}: a key") as caught:
            manager.refresh()
        assert caught.value.path == str(config)
        with pytest.raises(ConfigFileError):
            manager.write([])
        with pytest.raises(ConfigFileError):
            manager.validate_config()
    assert config.read_bytes() == broken
    assert manager.parsed.operator_peers == OPERATOR_PEERS
    config.write_bytes(OPERATORS)
    assert manager.validate_config() is True
    assert manager.write([numbered(1)])


def test_missing_file_says_how_to_make_one(config: Path, manager: WireGuardConfigManager) -> None:
    manager.refresh()
    config.unlink()
    with pytest.raises(ConfigFileError, match=r"doesn't exist.*python -m backend hub init"):
        manager.write([numbered(0)])
    assert not config.exists()


def test_file_that_vanishes_after_it_was_known_for_long_is_missed(
    config: Path, manager: WireGuardConfigManager
) -> None:
    os.utime(config, (1_000_000_000, 1_000_000_000))
    manager.refresh()
    config.unlink()
    with pytest.raises(ConfigFileError, match="doesn't exist"):
        manager.refresh()


def test_file_that_is_being_written_into_is_not_taken_for_whole(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat = os.fstat

    def write_then_look(fd: int) -> os.stat_result:
        with config.open("ab") as file:
            file.write(b"#")
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", write_then_look)
    with pytest.raises(ConfigFileError, match="another program keeps writing into the file"):
        manager.refresh()


def test_something_else_than_a_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    pipe = tmp_path / "wg0.conf"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(ConfigFileError, match="not a regular file"):
            WireGuardConfigManager(path).refresh()


def test_file_that_cannot_be_read_says_why(
    manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(ConfigFileError, match="can't be read: Permission denied"):
            manager.refresh()
    manager.refresh()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_owner_and_mode_stay(config: Path, manager: WireGuardConfigManager, mode: int) -> None:
    config.chmod(mode)
    if os.geteuid() == 0:
        os.chown(config, 12345, 54321)
    before = config.stat()
    manager.write([numbered(0)])
    after = config.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_temporary_file_is_private_before_the_rename(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    fsync = os.fsync

    def look(fd: int) -> None:
        modes.extend(path.stat().st_mode & 0o777 for path in config.parent.iterdir())
        fsync(fd)

    monkeypatch.setattr(os, "fsync", look)
    umask = os.umask(0)
    try:
        manager.write([numbered(0)])
    finally:
        os.umask(umask)
    assert modes == [0o600, 0o600, 0o600]


def test_symbolic_link_stays_one(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "hub.conf"
    target.parent.mkdir()
    target.write_bytes(MINIMAL)
    link = tmp_path / "wg7.conf"
    link.symlink_to(target)
    manager = WireGuardConfigManager(link)
    assert manager.interface == "wg7"
    assert manager.path == target
    manager.write([numbered(0)])
    assert link.is_symlink()
    assert target.read_bytes() == MINIMAL + numbered_text(0)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("replace", OSError(errno.EROFS, os.strerror(errno.EROFS))),
        ("fsync", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        ("fchmod", PermissionError(errno.EPERM, os.strerror(errno.EPERM))),
        ("replace", KeyboardInterrupt()),
    ],
)
def test_failed_replacement_leaves_the_old_file_and_nothing_else(
    config: Path,
    manager: WireGuardConfigManager,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: BaseException,
) -> None:
    manager.write([numbered(0)])

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        if isinstance(error, OSError):
            with pytest.raises(HubUpdateError, match=f"{config} could not be replaced: {error.strerror}"):
                manager.write([numbered(0), numbered(1)])
        else:
            with pytest.raises(KeyboardInterrupt):
                manager.write([numbered(0), numbered(1)])
    assert config.read_bytes() == OPERATORS + numbered_text(0)
    assert list(config.parent.iterdir()) == [config]
    assert manager.parsed.blocks == (numbered(0),)
    assert manager.write([numbered(0), numbered(1)])


def test_directory_that_cannot_be_made_durable_is_said_and_the_file_is_known_to_be_new(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.refresh()
    fsync = os.fsync

    def fail_for_directory(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):  # noqa: PTH112 - a descriptor, which is no path of ours
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_for_directory)
        with pytest.raises(HubUpdateError, match="Input/output error"):
            manager.write([numbered(0)])
    assert manager.parsed.blocks == (numbered(0),)
    assert config.read_bytes() == OPERATORS + numbered_text(0)


def _edit_before_replacing(
    monkeypatch: pytest.MonkeyPatch, config: Path, edits: Iterator[Callable[[], object]]
) -> None:
    """Let an operator be quicker: an edit between our look and our replacement."""
    fsync = os.fsync

    def edit_then_sync(fd: int) -> None:
        fsync(fd)
        next(edits, lambda: None)()

    monkeypatch.setattr(os, "fsync", edit_then_sync)


def test_edit_that_is_quicker_than_our_replacement_is_kept(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = iter([lambda: config.write_bytes(OPERATORS + b"\n# quick\n"), lambda: config.chmod(0o640)])
    _edit_before_replacing(monkeypatch, config, edits)
    assert manager.write([numbered(0)])
    assert config.read_bytes() == OPERATORS + b"\n# quick\n" + numbered_text(0)
    assert config.stat().st_mode & 0o777 == 0o640
    assert manager.parsed.operator_peers == OPERATOR_PEERS


def test_file_that_never_holds_still_is_not_replaced(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edits() -> Iterator[Callable[[], Any]]:
        for number in range(1000):
            yield lambda: config.write_bytes(MINIMAL + b"#" * number)  # noqa: B023 - called at once

    _edit_before_replacing(monkeypatch, config, edits())
    with pytest.raises(HubUpdateError, match="another program keeps changing it"):
        manager.write([numbered(0)])
    assert list(config.parent.iterdir()) == [config]


def test_file_that_is_taken_away_meanwhile_is_not_brought_back(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    _edit_before_replacing(monkeypatch, config, iter([config.unlink]))
    with pytest.raises(ConfigFileError, match="doesn't exist"):
        manager.write([numbered(0)])
    assert list(config.parent.iterdir()) == []


def test_reader_sees_whole_files_only(config: Path, manager: WireGuardConfigManager) -> None:
    stop = threading.Event()
    seen: set[int] = set()
    problems: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(len(parse(config.read_bytes()).blocks))
            except Exception as exc:  # noqa: BLE001 - whatever it is, it's what the test looks for
                problems.append(exc)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for step in range(200):
            manager.write([numbered(number) for number in range(step % 40)])
    finally:
        stop.set()
        reader.join()
    assert problems == []
    assert seen <= set(range(40))


def test_what_a_killed_process_left_is_removed_and_nothing_else(config: Path) -> None:
    stale = config.parent / ".wg0.conf.abc_12x9.tmp"
    stale.touch()
    others = [".wg0.conf.lock", ".wg0.conf.d.abc_12x9.tmp", ".wg1.conf.abc_12x9.tmp", ".wg0.conf.abc.tmp"]
    for name in others:
        (config.parent / name).touch()
    manager = WireGuardConfigManager(config)
    manager.remove_stale_temporaries()
    assert {path.name for path in config.parent.iterdir()} == {"wg0.conf", *others}
    with pytest.raises(HubUpdateError, match="No such file"):
        WireGuardConfigManager(config.parent / "nowhere" / "wg0.conf").remove_stale_temporaries()


def test_leftover_of_a_real_writer_has_the_name_that_is_looked_for(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            manager.write([numbered(0)])
    assert len(list(config.parent.iterdir())) == 2
    manager.remove_stale_temporaries()
    assert list(config.parent.iterdir()) == [config]


# The short way, for one peer at a time


def test_peer_is_added_replaced_and_removed(config: Path, manager: WireGuardConfigManager) -> None:
    manager.add_peer(KEYS[0], ["10.0.0.2/32"])
    manager.add_peer(KEYS[1], ["10.0.0.3"], None, 25, label="node-1")
    assert manager.parsed.blocks == (
        block("manual", KEYS[0], "10.0.0.2"),
        numbered(1),
    )
    manager.add_peer(KEYS[0], ["10.0.0.9/32"], persistent_keepalive=0)
    assert [peer.allowed_ips for peer in manager.parsed.blocks] == [("10.0.0.3/32",), ("10.0.0.9/32",)]
    assert manager.remove_peer(KEYS[0])
    assert not manager.remove_peer(KEYS[0])
    assert not manager.remove_peer(KEYS[30])
    assert config.read_bytes() == OPERATORS + numbered_text(1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("jKlMnOpQrStUvWxYzAbCdEfGhIjKlMnO=", ["10.0.0.3/32"], None, None, "a"),
        (KEYS[1] + "\n", ["10.0.0.3/32"], None, None, "a"),
        (ZERO, ["10.0.0.3/32"], None, None, "a"),
        (HUB, ["10.0.0.3/32"], None, None, "a"),
        (KEYS[1], [], None, None, "a"),
        (KEYS[1], ["10.0.0.3/32", "10.0.0.2/32"], None, None, "a"),
        (KEYS[1], ["10.0.0.3/32", "192.168.7.0/24"], None, None, "a"),
        (KEYS[1], ["10.0.0.3/32", "10.0.0.4/33"], None, None, "a"),
        (KEYS[1], ["10.0.0.3/32", "10.0.0.4/32 # a"], None, None, "a"),
        (KEYS[1], ["10.0.0.3/32", "fd00::200"], None, None, "a"),
        (KEYS[1], "10.0.0.3/32", None, None, "a"),
        (KEYS[1], "7", None, None, "a"),
        (KEYS[1], ["10.0.0.3/32"], "hub.example.com", None, "a"),
        (KEYS[1], ["10.0.0.3/32"], "hub.example.com:0", None, "a"),
        (KEYS[1], ["10.0.0.3/32"], "a:1\nPostUp = id", None, "a"),
        (KEYS[1], ["10.0.0.3/32\n"], None, None, "a"),
        (KEYS[1], ["10.0.0.2/32"], None, None, "a"),
        (KEYS[1], ["10.0.0.3/32"], None, -1, "a"),
        (KEYS[1], ["10.0.0.3/32"], None, 65_536, "a"),
        (KEYS[1], ["10.0.0.3/32"], None, None, "a\n[Interface]\nPostUp = id"),
    ],
)
def test_peer_that_cannot_be_is_refused_without_touching_the_file(
    config: Path,
    manager: WireGuardConfigManager,
    arguments: tuple[str, list[str], str | None, int | None, str],
) -> None:
    manager.add_peer(KEYS[0], ["10.0.0.2/32"])
    before, text = _unread(config), config.read_bytes()
    with pytest.raises(ValueError):
        manager.add_peer(*arguments)
    assert _unread(config) == before
    assert config.read_bytes() == text


def test_text_is_given_back_with_its_odd_bytes(manager: WireGuardConfigManager) -> None:
    assert manager.get_config().encode(errors="surrogateescape") == OPERATORS


def test_reload_is_given_the_stripped_text_of_the_file(config: Path) -> None:
    given_texts: list[bytes] = []
    manager = WireGuardConfigManager(config, given_texts.append)
    manager.add_peer(KEYS[0], ["10.0.0.2/32"], None, 25, "node-0")
    assert manager.reload_config() is True
    assert given_texts == [parse(OPERATORS + numbered_text(0)).stripped]
    config.write_bytes(b"")
    with pytest.raises(ConfigFileError, match="PrivateKey"):
        manager.reload_config()
    assert len(given_texts) == 1


def test_reload_without_a_way_to_do_it_says_so(manager: WireGuardConfigManager) -> None:
    with pytest.raises(HubUpdateError, match="wg0"):
        manager.reload_config()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"/32", b"/31"),
        (b"10.0.0.2/32", b"10.0.0.2/32, 10.0.0.9/32"),
        (b"10.0.0.2/32", b"fd00::2/128"),
        (b"AllowedIPs", b"#"),
        (b"PublicKey", b"#"),
        (KEYS[0].encode(), ZERO.encode()),
        (KEYS[0].encode(), b"x"),
        (b"= 25", b"= 65536"),
    ],
)
def test_damaged_block_is_no_peer_and_goes_with_the_next_write(config: Path, old: bytes, new: bytes) -> None:
    config.write_bytes(MINIMAL + numbered_text(0).replace(old, new) + numbered_text(1))
    manager = WireGuardConfigManager(config)
    assert manager.parsed.blocks == (numbered(1),)
    assert manager.write(manager.parsed.blocks)
    assert config.read_bytes().replace(b"#\n", b"").endswith(numbered_text(1))
    assert b"node-0" not in config.read_bytes()


def test_secrets_are_not_shown_by_what_was_parsed(manager: WireGuardConfigManager) -> None:
    assert PRIVATE not in repr(parse(OPERATORS))
    manager.refresh()
    assert PRIVATE not in repr(manager._version)
