"""How an interface differs from the file that it is made from."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from backend.models.wireguard.interface import InterfacePeer, InterfaceState, preshared_key_digest
from backend.models.wireguard.peer import cidr
from backend.services.hub.config_text import ParsedConfig


class DriftKind(StrEnum):
    """What differs from the records."""

    # Peers of the file that the interface doesn't have, has with other values, or has beyond the file.
    MISSING = "missing"
    CHANGED = "changed"
    SURPLUS = "surplus"
    # The interface's port or mark.
    SETTINGS = "settings"
    # Our own blocks in wg0.conf.
    FILE = "file"


@dataclass(slots=True)
class Drift:
    """The differences: in words for the log, and those that `wg syncconf` may leave as they are."""

    found: list[str] = field(default_factory=list)
    kinds: set[DriftKind] = field(default_factory=set)
    fwmark: bool = False
    preshared_keys: set[str] = field(default_factory=set)
    keepalives: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.found)

    def __str__(self) -> str:
        return ", ".join(self.found)


def compare(actual: InterfaceState, desired: ParsedConfig) -> Drift:
    """Compare the whole interface with the whole file, except private key and endpoints, which roam."""
    drift = Drift()
    if desired.listen_port is not None and actual.listen_port != desired.listen_port:
        drift.kinds.add(DriftKind.SETTINGS)
        drift.found.append(f"ListenPort {actual.listen_port} instead of {desired.listen_port}")
    if actual.fwmark != desired.fwmark:
        drift.fwmark = desired.fwmark == 0
        drift.kinds.add(DriftKind.SETTINGS)
        drift.found.append(f"FwMark {actual.fwmark:#x} instead of {desired.fwmark:#x}")
    missing = changed = 0
    # Those of the interface that the file has.
    known = 0
    for key, peer in _wanted(desired):
        present = actual.peers.get(key)
        if present is None:
            missing += 1
            continue
        known += 1
        if present != peer:
            changed += 1
            if peer.preshared_key_digest is None and present.preshared_key_digest is not None:
                drift.preshared_keys.add(key)
            if peer.persistent_keepalive == 0 and present.persistent_keepalive != 0:
                drift.keepalives.add(key)
    surplus = len(actual.peers) - known - len(_left_out(desired) & actual.peers.keys())
    for number, what, kind in (
        (missing, "missing", DriftKind.MISSING),
        (changed, "changed", DriftKind.CHANGED),
        (surplus, "not in the file", DriftKind.SURPLUS),
    ):
        if number:
            drift.kinds.add(kind)
            drift.found.append(f"{number} peer(s) {what}")
    return drift


def _wanted(desired: ParsedConfig) -> Iterator[tuple[str, InterfacePeer]]:
    """Yield what `wg` would make of the file's peers, with their keys, except those that are left out."""
    for peer in desired.blocks:
        allowed, keepalive = tuple(sorted(peer.allowed_ips)), peer.persistent_keepalive or 0
        yield peer.public_key, InterfacePeer(allowed, persistent_keepalive=keepalive)
    if not desired.operator_peers:
        return
    left_out = _left_out(desired)
    # An address that several peers claim goes to the last of them, and ours are behind all others.
    owners: dict[str, str] = {}
    for operators in desired.operator_peers:
        owners.update(dict.fromkeys(map(cidr, operators.allowed_ips), operators.public_key))
    for peer in desired.blocks:
        owners.update(dict.fromkeys(peer.allowed_ips, peer.public_key))
    ours = {peer.public_key for peer in desired.blocks}
    for operators in desired.operator_peers:
        key = operators.public_key
        if key in left_out or key in ours:
            continue
        held = {text for text in map(cidr, operators.allowed_ips) if owners[text] == key}
        digest = None if operators.preshared_key is None else preshared_key_digest(operators.preshared_key)
        yield key, InterfacePeer(tuple(sorted(held)), digest, operators.persistent_keepalive)


def _left_out(desired: ParsedConfig) -> set[str]:
    """Return the keys of peers whose form on the interface depends on more than the file.

    A key that stands there twice takes some values of each section, and the hub's own key is passed over.
    """
    named = Counter(peer.public_key for peer in desired.operator_peers)
    ours = {peer.public_key for peer in desired.blocks} if named else set()
    return {
        key
        for key, count in named.items()
        if (count > 1 or key == desired.hub_public_key) and key not in ours
    }
