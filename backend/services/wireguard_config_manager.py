"""The hub's wg-quick(8) file: read when somebody changed it, replaced as a whole when our peers change.

What the text means is in `wireguard_config_text`; this is about the file: one process writes it at a time
(the lock file beside it sees to that), an operator may edit it whenever they like.
"""

import errno
import os
import stat
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Final, Literal

from backend.errors import ConfigFileError, HubUpdateError
from backend.models.operator_commands import command, put_key_back
from backend.models.wireguard.interface import InterfaceName
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey
from backend.services.hub.config_changes import Content, NewPeer, with_peer, without_peer
from backend.services.hub.config_reader import ConfigReader, FileIdentity
from backend.services.hub.config_text import (
    HubKeyError,
    InvalidConfigError,
    OperatorPeer,
    ParsedConfig,
    PeerBlock,
    parse,
    render,
)
from backend.services.hub.drift import DesiredInterface
from backend.services.hub.staged_file import (
    StagedFile,
    is_temporary,
    stage_file,
    sync_directory,
    try_directory,
)

__all__ = ["OperatorPeer", "PeerBlock", "WireGuardConfigManager"]

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
    """The file as it was last read or written. Never changed, so it's read without the lock."""

    text: bytes = field(repr=False)
    identity: FileIdentity
    settled: bool
    config: ParsedConfig
    hub_public_key: WireGuardKey
    # Whether the text is the operator's text and our blocks as they are rendered, and nothing else.
    as_rendered: bool = False


@dataclass(frozen=True, slots=True)
class StagedConfig:
    """What the file is to hold, and the text that it was rendered from; nothing is replaced yet."""

    peers: tuple[PeerBlock, ...]
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
        admit: Callable[[Path], None] = lambda _path: None,
    ) -> None:
        """Read nothing yet. `reload` is what `reload_config` calls with the text for `wg syncconf`.

        `stated_key` is WIREGUARD_HUB_PUBLIC_KEY: a file with another hub's key can't be used. `admit` is
        asked before a version of the file is used, and raises ConfigFileError where that must not be.
        """
        self._reader: Final = ConfigReader(Path(config_path))
        self._stem: Final = Path(config_path).stem
        self._reload = reload
        self._stated_key = stated_key
        self._admit = admit
        self._lock = Lock()  # guards the file against our own threads, and _version; held across file I/O
        self._version: _Version | None = None
        # Where the file was when it was last admitted.
        self._admitted: Path | None = None

    @property
    def path(self) -> Path:
        """The file that is read and replaced. A symbolic link stays one: this is where it leads to by now."""
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
    def operator_text(self) -> bytes:
        """Everything in the file that isn't ours, as last found."""
        return self._known().config.operator_text

    @property
    def operator_peers(self) -> tuple[OperatorPeer, ...]:
        """The operator's peers, as last found."""
        return self._known().config.operator_peers

    @property
    def blocks(self) -> tuple[PeerBlock, ...]:
        """Our peers, as last found or written; a damaged block is none."""
        return self._known().config.blocks

    @property
    def operator_stripped(self) -> bytes:
        """What `wg` is told of everything in the file that isn't ours, as last found."""
        return self._known().config.operator_stripped

    @property
    def desired_interface(self) -> DesiredInterface:
        """What the interface should be by the file, as last found or written."""
        version = self._known()
        config = version.config
        return DesiredInterface(
            version.hub_public_key,
            config.listen_port,
            config.fwmark,
            config.operator_peers,
            config.blocks,
        )

    @property
    def hub_public_key(self) -> WireGuardKey:
        """The public half of the file's PrivateKey."""
        return self._known().hub_public_key

    @property
    def private_key(self) -> WireGuardPrivateKey:
        """The file's PrivateKey, as last found."""
        return self._known().config.private_key

    def refresh(self) -> bool:
        """Read the file if somebody changed it; return whether the operator's text is new.

        Raises ConfigFileError on every call for as long as the file can't be used.
        """
        with self._lock:
            before = self._version
            after = self._refresh()
        return before is None or after.config.operator_text != before.config.operator_text

    def write(self, peers: Collection[PeerBlock]) -> bool:
        """Make the file hold these peers of ours; return whether it had to be replaced.

        Raises ConfigFileError if an operator has to mend the file first, HubUpdateError if it can't be
        replaced. In both cases it is what it was.
        """
        with self._lock:
            return self._write(tuple(peers))

    def stage(self, peers: Collection[PeerBlock], executor: Executor | None = None) -> StagedConfig:
        """Write and sync, beside the file, what is to replace it; raise ConfigFileError or HubUpdateError.

        The file is what it was. Either `put_in_place` or `discard` has to follow. With an executor it is
        synced there, and `put_in_place` waits for that.
        """
        with self._lock:
            return self._stage(tuple(peers), executor)

    def put_in_place(self, staged: StagedConfig) -> bool:
        """Replace the file by what was staged; return whether that was needed. Raises as `stage` does.

        It is staged anew where the file was changed meanwhile. `sync_directory` makes it durable.
        """
        with self._lock:
            return self._put_in_place(staged)

    def sync_directory(self) -> None:
        """Make a replacement durable; raise HubUpdateError."""
        try:
            sync_directory(self.path.parent)
        except OSError as exc:
            raise self._not_replaced(exc) from exc

    def check_replaceable(self) -> None:
        """Raise HubUpdateError where the file could not be replaced now: a full disk, a read-only mount."""
        try:
            try_directory(self.path, len(self._known().text) + _SPARE_BYTES)
        except OSError as exc:
            raise self._not_replaced(exc) from exc

    def render_stripped(self, peers: Collection[PeerBlock]) -> bytes:
        """Return the text for `wg syncconf`: the operator's part as last found, and these peers of ours."""
        return render(self._known().config.operator_stripped, peers)

    def remove_stale_temporaries(self) -> None:
        """Remove what a killed process has left of its writing. Only while no other process writes."""
        try:
            for entry in list(self.path.parent.iterdir()):
                if is_temporary(entry.name, self.path) and stat.S_ISREG(entry.lstat().st_mode):
                    entry.unlink(missing_ok=True)
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
        self._change(lambda known: with_peer(known.config, known.hub_public_key, peer))

    def remove_peer(self, public_key: str) -> bool:
        """Take a peer of ours, or one that was added, out of the file; return whether it was there."""
        return self._change(lambda known: without_peer(known.config, public_key))

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
            config = self._refresh().config
            self._reload(render(config.operator_stripped, config.blocks))
        return True

    def validate_config(self) -> Literal[True]:
        """Read the file afresh; raise ConfigFileError if it can't be used."""
        with self._lock:
            self._version = self._load()
        return True

    def _known(self) -> _Version:
        version = self._version
        if version is None:
            with self._lock:
                version = self._refresh()
        return version

    def _refresh(self) -> _Version:
        """Return the present version. One that can't be used is never kept, so each call finds it anew."""
        known = self._version
        # The file may have been moved, and a link put in its place.
        if known is None or not known.settled or self._reader.look() != (self._admitted, known.identity):
            self._version = known = self._load()
        return known

    def _load(self) -> _Version:
        path = self._reader.path
        text, identity, settled = self._reader.read()
        self._admit(path)
        self._admitted = path
        known = self._version
        if known is not None and known.text == text:
            return replace(known, identity=identity, settled=settled)
        try:
            config = parse(text)
        except HubKeyError as exc:
            raise ConfigFileError(str(self.path), exc.problem, put_key_back(self._stem)) from None
        except InvalidConfigError as exc:
            raise ConfigFileError(str(self.path), exc.problem, exc.remedy) from None
        private_key = config.private_key
        if known is not None and known.config.private_key.reveal() == private_key.reveal():
            hub_public_key = known.hub_public_key
        else:
            hub_public_key = private_key.public_key()
        if self._stated_key not in {None, hub_public_key}:
            raise ConfigFileError(
                str(self.path),
                # The setting isn't repeated: by mistake it may be the private key.
                f"its PrivateKey belongs to {hub_public_key}, and WIREGUARD_HUB_PUBLIC_KEY names another key",
                f"{put_key_back(self._stem)}. Where the key was changed on purpose, set that to it, run "
                f"{command('hub up --replace-key')}, and restart the service",
            )
        return _Version(text, identity, settled, config, hub_public_key)

    def _change(self, change: Callable[[_Version], Content | None]) -> bool:
        """Replace the file by what `change` makes of the present version; return whether it is another."""
        with self._lock:
            for _ in range(_ATTEMPTS):
                known = self._refresh()
                content = change(known)
                text = known.text if content is None else render(*content)
                if text == known.text:
                    return False
                try:
                    file = stage_file(self.path, text, known.identity)
                    if file is not None and file.replace():
                        self._version = None
                        sync_directory(self.path.parent)
                        return True
                except OSError as exc:
                    raise self._not_replaced(exc) from exc
            raise self._never_still()

    def _write(self, peers: tuple[PeerBlock, ...]) -> bool:
        replaced = self._put_in_place(self._stage(peers))
        if replaced:
            self.sync_directory()
        return replaced

    def _stage(self, peers: tuple[PeerBlock, ...], executor: Executor | None = None) -> StagedConfig:
        for _ in range(_ATTEMPTS):
            known = self._refresh()
            text = _rendered(known, peers)
            if text == known.text:
                return StagedConfig(peers, text, known.text, None)
            try:
                file = stage_file(self.path, text, known.identity, executor)
            except OSError as exc:
                raise self._not_replaced(exc) from exc
            if file is not None:
                return StagedConfig(peers, text, known.text, file)
        raise self._never_still()

    def _put_in_place(self, staged: StagedConfig) -> bool:
        try:
            for _ in range(_ATTEMPTS):
                known = self._refresh()
                if known.text == staged.before:
                    if staged.file is None:
                        return False
                    if staged.file.replace():
                        self._note_replaced(known, staged, staged.file)
                        return True
                staged.discard()
                staged = self._stage(staged.peers)
        except BaseException as exc:
            staged.discard()  # the private key is in it
            if isinstance(exc, OSError):
                raise self._not_replaced(exc) from exc
            raise
        staged.discard()
        raise self._never_still()

    def _note_replaced(self, known: _Version, staged: StagedConfig, file: StagedFile) -> None:
        # Before the directory is made durable: the file is the new one from here on.
        config = replace(known.config, blocks=staged.peers)
        self._version = _Version(
            staged.text, file.identity, file.settled, config, known.hub_public_key, as_rendered=True
        )

    def _not_replaced(self, exc: OSError) -> HubUpdateError:
        remedy = _REMEDIES.get(exc.errno or 0, "let this process write to its directory")
        return HubUpdateError(f"{self.path} could not be replaced: {_reason(exc)}; {remedy}")

    def _never_still(self) -> HubUpdateError:
        return HubUpdateError(f"{self.path} could not be replaced: another program keeps changing it")


def _rendered(known: _Version, peers: tuple[PeerBlock, ...]) -> bytes:
    """Return the file's text with these peers of ours; by what is there, where some only came or one went."""
    before = known.config.blocks
    if known.as_rendered and peers[: len(before)] == before:
        return b"".join([known.text, *(peer.text for peer in peers[len(before) :])])
    if known.as_rendered and len(peers) == len(before) - 1:
        # Up to the one that went they are the same, and from there on none is.
        gone = bisect_left(range(len(peers)), 1, key=lambda n: peers[n] is not before[n])
        if peers[:gone] == before[:gone] and peers[gone:] == before[gone + 1 :]:
            return known.text.replace(before[gone].text, b"", 1)
    return render(known.config.operator_text, peers)


def _reason(exc: OSError) -> str:
    return exc.strerror or type(exc).__name__
