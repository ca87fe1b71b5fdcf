"""The hub's wg-quick(8) file: read after an operator changed it, replaced as a whole when our peers change.

`hub/config_text.py` says what the text means. This module is about the file: one process writes it at a time,
which a lock file beside it ensures, and an operator may edit it at any time.
"""

import errno
import os
import stat
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from threading import RLock
from typing import Final, Literal

from backend.errors import ConfigFileError, HubUpdateError
from backend.models.operator_commands import command, put_key_back
from backend.models.wireguard.interface import InterfaceName
from backend.models.wireguard.keys import WireGuardKey
from backend.services.hub.config_changes import Content, NewPeer, with_peer, without_peer
from backend.services.hub.config_reader import ConfigReader, FileIdentity
from backend.services.hub.config_text import ParsedConfig, PeerBlock, parse, render
from backend.services.hub.config_values import HubKeyError, InvalidConfigError
from backend.services.hub.staged_file import (
    StagedFile,
    stage_file,
    sync_directory,
    temporaries,
    try_directory,
)
from backend.services.ip_pool_manager import LONGEST_PREFIX, SHORTEST_PREFIX

_ATTEMPTS: Final = 5
# What a batch may add to the file, and a block for the directory.
_SPARE_BYTES: Final = 128 * 1024
_REMEDIES: Final = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room in the quota of this process's user",
    errno.EROFS: "mount its file system for writing",
    errno.EPERM: "take the immutable attribute from it and its directory (`chattr -i`)",
}


@dataclass(frozen=True, slots=True)
class _Version:
    """The file as it was last read or written. Immutable, so it is read without the lock."""

    text: bytes = field(repr=False)
    identity: FileIdentity
    settled: bool
    config: ParsedConfig
    # Whether the text is known to be what `render` makes of the config.
    as_rendered: bool = False


@dataclass(frozen=True, slots=True)
class StagedConfig:
    """The file's next text, and the one that it was made from. Nothing is replaced yet."""

    blocks: tuple[PeerBlock, ...]
    text: bytes = field(repr=False)
    before: bytes = field(repr=False)
    # None where the file has that text already.
    file: StagedFile | None

    def discard(self) -> None:
        """Take the temporary file away."""
        if self.file is not None:
            self.file.discard()


class WireGuardConfigManager:
    """Keeps our peers in the file, and everything else in it as the operator wrote it, byte for byte."""

    def __init__(
        self,
        config_path: str | os.PathLike[str],
        reload: Callable[[bytes], None] | None = None,
        *,
        stated_key: WireGuardKey | None = None,
        require_trusted: Callable[[Path], None] = lambda _path: None,
    ) -> None:
        """Read nothing yet. `reload` is what `reload_config` calls with the text for `wg syncconf`.

        `stated_key` is WIREGUARD_HUB_PUBLIC_KEY: a file with another hub's key can't be used.
        `require_trusted` is called before a version of the file is used, and raises ConfigFileError to
        refuse it.
        """
        self._reader: Final = ConfigReader(Path(config_path))
        self._stem: Final = Path(config_path).stem
        self._reload = reload
        self._stated_key = stated_key
        self._require_trusted = require_trusted
        self._lock = RLock()  # guards the file against our own threads, and _version; held across file I/O
        self._version: _Version | None = None
        # Where the file was when `require_trusted` last let it pass.
        self._trusted_at: Path | None = None

    @property
    def path(self) -> Path:
        """The file that is read and replaced: where the given path leads to now, if it is a symbolic link."""
        return self._reader.path

    @property
    def interface(self) -> InterfaceName:
        """The interface's name, which is the file's (wg-quick(8)); ConfigFileError if it can't be one."""
        try:
            return InterfaceName.parse(self._stem)
        except ValueError as exc:
            raise ConfigFileError(
                str(self.path), f"{exc}, which it gets from the file's", "Give the file another name"
            ) from None

    @property
    def parsed(self) -> ParsedConfig:
        """The file as last read or written; a damaged block of ours is missing in it."""
        return (self._version or self._refresh()).config

    def refresh(self) -> bool:
        """Read the file if it was changed; return whether the operator's text is another.

        Raises ConfigFileError on every call while the file can't be used.
        """
        before = self._version
        after = self._refresh()
        return before is None or after.config.operator_text != before.config.operator_text

    def write(self, blocks: Collection[PeerBlock]) -> bool:
        """Make the file hold these blocks, durably; return whether it had to be replaced.

        Raises ConfigFileError if an operator has to repair the file first, HubUpdateError if it can't be
        replaced. In both cases it is unchanged.
        """
        replaced = self.put_in_place(self.stage(blocks))
        if replaced:
            self.sync_directory()
        return replaced

    def stage(self, blocks: Collection[PeerBlock], executor: Executor | None = None) -> StagedConfig:
        """Write and sync, beside the file, a file with these blocks; raise ConfigFileError or HubUpdateError.

        The file is unchanged. Either `put_in_place` or `discard` has to follow. With an executor it is synced
        there, and `put_in_place` waits for that.
        """
        blocks = tuple(blocks)
        with self._lock:
            for _ in range(_ATTEMPTS):
                known = self._refresh()
                text = _rendered(known, blocks)
                if text == known.text:
                    return StagedConfig(blocks, text, known.text, None)
                with self._replacing():
                    file = stage_file(self.path, text, known.identity, executor)
                if file is not None:
                    return StagedConfig(blocks, text, known.text, file)
        raise self._never_still()

    def put_in_place(self, staged: StagedConfig) -> bool:
        """Replace the file by the staged one; return whether that was needed. Raises as `stage` does.

        It is staged again if the file was changed meanwhile. `sync_directory` makes it durable.
        """
        with self._lock, self._replacing():
            try:
                for _ in range(_ATTEMPTS):
                    known = self._refresh()
                    if known.text == staged.before and (staged.file is None or staged.file.replace()):
                        # Before the directory is synced: the file is the new one from here on.
                        self._note_written(known, staged)
                        return staged.file is not None
                    staged.discard()
                    staged = self.stage(staged.blocks)
            except BaseException:
                staged.discard()  # the private key is in it
                raise
            staged.discard()
        raise self._never_still()

    def sync_directory(self) -> None:
        """Make a replacement durable; raise HubUpdateError."""
        with self._replacing():
            sync_directory(self.path.parent)

    def check_replaceable(self) -> None:
        """Raise HubUpdateError where the file could not be replaced now: a full disk, a read-only mount."""
        with self._replacing():
            try_directory(self.path, len((self._version or self._refresh()).text) + _SPARE_BYTES)

    def remove_stale_temporaries(self) -> None:
        """Delete what a killed process has left of its writing. Only while no other process writes."""
        try:
            for path in temporaries(self.path):
                if stat.S_ISREG(path.lstat().st_mode):
                    path.unlink(missing_ok=True)
        except OSError as exc:
            raise HubUpdateError(f"{self.path.parent} can't be tidied up: {_reason(exc)}") from exc

    def add_peer(
        self,
        public_key: str,
        allowed_ips: Sequence[str],
        endpoint: str | None = None,
        persistent_keepalive: int | None = None,
        label: str = "manual",
    ) -> None:
        """Write a peer into the file, instead of one with the same key that was added before.

        `allowed_ips` are addresses or networks in CIDR notation, `endpoint` is host:port, the keepalive is in
        seconds. ValueError, and the file is not touched, if anything about the peer can't be.
        """
        peer = NewPeer.parse(label, public_key, allowed_ips, endpoint, persistent_keepalive)
        self._change(lambda config: with_peer(config, peer))

    def remove_peer(self, public_key: str) -> bool:
        """Take a peer of ours, or one that was added, out of the file; return whether it was there."""
        return self._change(lambda config: without_peer(config, public_key))

    def get_config(self) -> str:
        """Return the file's text as it is now, the private key included; odd bytes as lone surrogates."""
        with self._lock:
            text, _, _ = self._reader.read()
        return text.decode(errors="surrogateescape")

    def reload_config(self) -> Literal[True]:
        """Bring the interface up to the file; HubUpdateError if that can't be done."""
        if self._reload is None:
            raise HubUpdateError(
                f"nothing was given that could bring the interface {self.interface} up to date"
            )
        with self._lock:
            self._reload(self._refresh().config.stripped)
        return True

    def validate_config(self) -> Literal[True]:
        """Read the file afresh; raise ConfigFileError if it can't be used."""
        with self._lock:
            self._version = self._load()
        return True

    def _refresh(self) -> _Version:
        """Return the present version. One that can't be used is never kept, so each call finds it anew."""
        with self._lock:
            known = self._version
            # The file may have been moved, and a link put in its place.
            if (
                known is None
                or not known.settled
                or self._reader.look() != (self._trusted_at, known.identity)
            ):
                self._version = known = self._load()
            return known

    def _load(self) -> _Version:
        path = self._reader.path
        text, identity, settled = self._reader.read()
        self._require_trusted(path)
        self._trusted_at = path
        known = self._version
        if known is not None and known.text == text:
            return replace(known, identity=identity, settled=settled)
        try:
            config = parse(text)
        except HubKeyError as exc:
            raise ConfigFileError(str(self.path), exc.problem, put_key_back(self._stem)) from None
        except InvalidConfigError as exc:
            raise ConfigFileError(str(self.path), exc.problem, exc.remedy) from None
        if self._stated_key not in {None, config.hub_public_key}:
            raise ConfigFileError(
                str(self.path),
                # The setting isn't repeated: by mistake it may be the private key.
                f"its PrivateKey belongs to {config.hub_public_key}, and WIREGUARD_HUB_PUBLIC_KEY names "
                "another key",
                f"{put_key_back(self._stem)}. Where the key was changed on purpose, set that to it, run "
                f"{command('hub up --replace-key')}, and restart the service",
            )
        return _Version(text, identity, settled, config)

    def _change(self, change: Callable[[ParsedConfig], Content | None]) -> bool:
        """Replace the file by what `change` makes of the present version; return whether it is another."""
        with self._lock:
            for _ in range(_ATTEMPTS):
                known = self._refresh()
                content = change(known.config)
                text = known.text if content is None else render(*content)
                if text == known.text:
                    return False
                with self._replacing():
                    file = stage_file(self.path, text, known.identity)
                    if file is not None and file.replace():
                        self._version = None
                        sync_directory(self.path.parent)
                        return True
            raise self._never_still()

    def _note_written(self, known: _Version, staged: StagedConfig) -> None:
        file = staged.file or known
        config = replace(known.config, blocks=staged.blocks)
        self._version = _Version(staged.text, file.identity, file.settled, config, as_rendered=True)

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        """Turn an OSError into the HubUpdateError that says how to let the file be replaced."""
        try:
            yield
        except OSError as exc:
            remedy = _REMEDIES.get(exc.errno or 0, "let this process write to its directory")
            raise HubUpdateError(f"{self.path} could not be replaced: {_reason(exc)}; {remedy}") from exc

    def _never_still(self) -> HubUpdateError:
        return HubUpdateError(f"{self.path} could not be replaced: another program keeps changing it")


def require_address(path: Path, config: ParsedConfig, hub_ip: IPv4Address) -> None:
    """Raise ConfigFileError if the file has addresses and `hub_ip` lies within none of them.

    Only wg-quick(8) reads its Address lines; no route would lead to the peers. Without any Address there is
    nothing to compare: another program than wg-quick may give the interface its addresses.
    """
    found = config.addresses
    if not found or any(hub_ip in address.network for address in found):
        return
    remedy = "Change Address in the file to one that does"
    fitting = (
        address
        for address in found
        if isinstance(address, IPv4Interface)
        and SHORTEST_PREFIX <= address.network.prefixlen <= LONGEST_PREFIX
    )
    if other := next(fitting, None):
        remedy = f"Set WIREGUARD_IP_POOL={other.network} and WIREGUARD_HUB_IP={other.ip}, or c{remedy[1:]}"
    raise ConfigFileError(
        str(path),
        f"Address = {', '.join(map(str, found))} doesn't hold WIREGUARD_HUB_IP={hub_ip}, so no route would "
        "lead to the peers",
        remedy,
    )


def _rendered(known: _Version, blocks: tuple[PeerBlock, ...]) -> bytes:
    """Return the text with these blocks; by what is there where some were added or one was removed."""
    before = known.config.blocks
    if known.as_rendered and blocks[: len(before)] == before:
        return render(known.text, blocks[len(before) :])
    if known.as_rendered and len(blocks) == len(before) - 1:
        # Up to the removed block they are the same, and from there on none is.
        gone = bisect_left(range(len(blocks)), 1, key=lambda index: blocks[index] is not before[index])
        if blocks[:gone] == before[:gone] and blocks[gone:] == before[gone + 1 :]:
            return known.text.replace(before[gone].text, b"", 1)
    return render(known.config.operator_text, blocks)


def _reason(exc: OSError) -> str:
    return exc.strerror or type(exc).__name__
