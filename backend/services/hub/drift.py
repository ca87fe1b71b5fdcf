"""How an interface differs from the file that it is made from."""

from collections import Counter
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
    wanted = _wanted(desired)
    for key, peer in wanted.items():
        present = actual.peers.get(key)
        if present is None:
            missing += 1
        elif present != peer:
            changed += 1
            if peer.preshared_key_digest is None and present.preshared_key_digest is not None:
                drift.preshared_keys.add(key)
            if peer.persistent_keepalive == 0 and present.persistent_keepalive != 0:
                drift.keepalives.add(key)
    # Those that `wanted` leaves out are in the file all the same.
    named = {peer.public_key for peer in desired.operator_peers}
    surplus = len(actual.peers.keys() - wanted.keys() - named)
    for number, what, kind in (
        (missing, "missing", DriftKind.MISSING),
        (changed, "changed", DriftKind.CHANGED),
        (surplus, "not in the file", DriftKind.SURPLUS),
    ):
        if number:
            drift.kinds.add(kind)
            drift.found.append(f"{number} peer(s) {what}")
    return drift


def _wanted(desired: ParsedConfig) -> dict[str, InterfacePeer]:
    """Return what `wg` would make of the file's peers, by key.

    Left out is what depends on more than the file: a key that stands there twice takes some values of each
    section, and the hub's own key is passed over.
    """
    peers: dict[str, InterfacePeer] = {
        peer.public_key: InterfacePeer(
            frozenset(peer.allowed_ips), persistent_keepalive=peer.persistent_keepalive or 0
        )
        for peer in desired.blocks
    }
    if not desired.operator_peers:
        return peers
    named = Counter(peer.public_key for peer in desired.operator_peers)
    # An address that several peers claim goes to the last of them, and ours are behind all others.
    owners: dict[str, str] = {}
    for operators in desired.operator_peers:
        owners.update(dict.fromkeys(map(cidr, operators.allowed_ips), operators.public_key))
    for peer in desired.blocks:
        owners.update(dict.fromkeys(peer.allowed_ips, peer.public_key))
    for operators in desired.operator_peers:
        key = operators.public_key
        if named[key] > 1 or key in peers or key == desired.hub_public_key:
            continue
        peers[key] = InterfacePeer(
            frozenset(text for text in map(cidr, operators.allowed_ips) if owners[text] == key),
            None if operators.preshared_key is None else preshared_key_digest(operators.preshared_key),
            operators.persistent_keepalive,
        )
    return peers
