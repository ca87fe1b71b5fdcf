"""Makes the interface equal to wg0.conf, and remembers what it was made equal to."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Final

from backend.errors import HubUpdateError
from backend.models.operator_commands import bring_up, command, put_key_back
from backend.models.wireguard.health import LostEndpoint
from backend.models.wireguard.interface import InterfaceState
from backend.models.wireguard.peer import Peer
from backend.services.hub.drift import Drift, compare
from backend.services.hub.interface_observer import InterfaceObserver
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.ports import Hub
from backend.services.wireguard_config_manager import WireGuardConfigManager

log = logging.getLogger(__name__)

# The whole interface is compared with the whole file so often: seconds. With the loop's second and a burst of
# batches, which it has to wait for, that is ten seconds at the latest.
_VERIFY_INTERVAL_SECONDS: Final = 6.0
# A comparison takes at most this share of the time.
_VERIFY_SHARE: Final = 0.1
# The most endpoints that are set in one call of `restore_endpoints`, which is made each second.
_MAX_ENDPOINTS: Final = 500


class InterfaceSync:
    """`wg set` for a few changes, `wg syncconf` for everything else. Used by one thread at a time."""

    def __init__(
        self,
        config: WireGuardConfigManager,
        hub: Hub,
        operator_peers: OperatorPeers,
        observer: InterfaceObserver,
    ) -> None:
        self._config = config
        self._hub = hub
        self._observer = observer
        self._metrics = observer.metrics
        self._operator_peers = operator_peers
        # The index of the interface that is known to equal the file, and the operator's part of the file that
        # it was told; None while there is none.
        self._confirmed: tuple[int | None, bytes] | None = None
        # When the look began by which the whole interface was last compared with the whole file, how long
        # that took, and when the interface was changed last.
        self._verified_at = float("-inf")
        self._verify_seconds = 0.0
        self._changed_at = float("-inf")
        # Whether peers may have lost their endpoints, because `wg syncconf` may have added them anew.
        self._endpoints_lost = False

    def require_full_sync(self) -> None:
        """Make the next `finish` run `wg syncconf` with the whole file."""
        self._confirmed = None

    def require(self) -> None:
        """Raise HubUpdateError unless there is an interface to tell."""
        if self._hub.live and self._hub.ifindex() is None:
            raise self._no_interface()

    def check(self) -> None:
        """Raise HubUpdateError unless the interface has its peers, and they reach the hub through it."""
        if self._hub.live and not self._is_known():
            raise HubUpdateError(
                f"interface {self._config.interface} is new and gets its peers within a second or two"
            )
        if (problem := self._hub.link_problem()) is not None:
            raise HubUpdateError(problem)

    def inspect(self) -> InterfaceState | None:
        """Return what the interface has, None where there is none; raise HubUpdateError for another's."""
        if not self._hub.live or self._hub.ifindex() is None:
            return None
        return self._require_ours(self._observer.look(keep=False))

    def start(self, added: Sequence[Peer], removed: Sequence[Peer]) -> Callable[[], bool]:
        """Start `wg set` for these changes, unless a full sync is needed anyway.

        It runs while the directory is synced. Returns a function that waits for it, and then returns False
        where a full sync is still needed.
        """
        # An interface that was made anew meanwhile may be another program's.
        if not self._is_known() or self._operator_peers.overlaps(removed):
            return lambda: False
        if not (added or removed):
            return lambda: True
        self._changed_at = time.monotonic()
        try:
            end = self._hub.change(added, removed)
        except HubUpdateError as exc:
            return partial(_not_told, exc)
        return partial(_told, end)

    def finish(self, *, told: bool, inspected: bool = False) -> None:
        """Run `wg syncconf`, unless the interface is known to equal the file; raise HubUpdateError.

        `told` says that `wg set` of `start` succeeded, `inspected` that `inspect` was called just now.
        """
        if not self._hub.live:
            return
        ifindex = self._hub.ifindex()
        if ifindex is None:
            raise self._no_interface()
        # A look that began before this moment may not show what `start` has changed.
        self._changed_at = time.monotonic()
        present = (ifindex, self._config.parsed.operator_stripped)
        if told and self._confirmed == present:
            return
        self._confirmed = None
        if not inspected:
            self.inspect()
        try:
            self._sync()
        except HubUpdateError:
            self._metrics.reloaded(succeeded=False)
            raise
        self._metrics.reloaded(succeeded=True)
        self._confirmed = present

    def find_drift(self, *, idle: bool) -> Drift | None:
        """Return how the interface differs from the file; None where a full sync is needed anyway.

        That is a new interface, or an edit of the operator's part. The comparison is made when it is due,
        sooner when the service is `idle` or the interface was looked at meanwhile; an empty Drift is returned
        in between.
        """
        if not self._hub.live:
            return Drift()
        if self._confirmed != (self._hub.ifindex(), self._config.parsed.operator_stripped):
            return None
        since = time.monotonic() - self._verified_at
        if since < self._verify_seconds / _VERIFY_SHARE:
            return Drift()
        look = self._observer.take(self._changed_at)
        changed = self._changed_at > self._verified_at
        if look is None and since < _VERIFY_INTERVAL_SECONDS and not (changed and idle):
            return Drift()
        return self._verify(look)

    def restore_endpoints(self) -> int:
        """Set the last endpoint of each peer that has none, after `wg syncconf` has run.

        An interface that was made anew, as at a restart of the hub, has no endpoints: an idle peer would stay
        unreachable for minutes, until it makes a handshake by itself. Sets at most 500; returns how many.
        Raises HubUpdateError.
        """
        if not self._endpoints_lost:
            return 0
        state = self.inspect()
        if state is None:
            return 0
        lost = self._observer.lost_endpoints(state)
        part = [
            LostEndpoint(key, lost[key], state.peers[key].persistent_keepalive)
            for key in islice(lost, _MAX_ENDPOINTS)
        ]
        if part:
            try:
                self._hub.restore(part)
            finally:
                # Looks from between its two steps show the nudge, also where it fails.
                self._changed_at = time.monotonic()
            self._metrics.endpoints_restored(len(part))
        self._endpoints_lost = len(part) < len(lost)
        return len(part)

    def _require_ours(self, state: InterfaceState) -> InterfaceState:
        new = state.public_key is None and not state.peers
        key = self._config.parsed.hub_public_key
        if state.public_key != key and not new:
            name = self._config.interface
            raise HubUpdateError(
                f"interface {name} has another private key (its public key is {state.public_key}) than "
                f"{self._config.path} ({key}), so it may belong to another program "
                "and was left alone. If it does, give this hub another name with WIREGUARD_CONFIG_PATH. If "
                f"it is this hub's: {put_key_back(name)}. Where the key was changed on purpose, run "
                f"{command('hub up --replace-key')}"
            )
        return state

    def _sync(self) -> None:
        """Run `wg syncconf` with the whole file, and compare afterwards; raise HubUpdateError."""
        self._hub.sync(self._config.parsed.stripped)
        self._endpoints_lost = True
        drift = self._verify()
        if drift:
            self._hub.clear(drift)
            drift = self._verify()
        if drift:
            raise HubUpdateError(f"interface {self._config.interface} did not take the config: {drift}")

    def _verify(self, look: tuple[float, InterfaceState] | None = None) -> Drift:
        """Compare the interface with the file: `wg` answers 0 to several things that it doesn't do.

        `look` was made since the last change, and when it began; without it one is made.
        """
        began = time.monotonic()
        actual = self.inspect() if look is None else self._require_ours(look[1])
        if actual is None:
            raise self._no_interface()
        drift = compare(actual, self._config.parsed)
        # What came after the look's begin is for the next one, however long this one has waited.
        self._verified_at = began if look is None else look[0]
        self._verify_seconds = time.monotonic() - began
        return drift

    def _is_known(self) -> bool:
        """Say whether the interface is the one that was made equal to the file last."""
        return self._confirmed is not None and self._confirmed[0] == self._hub.ifindex()

    def _no_interface(self) -> HubUpdateError:
        name = self._config.interface
        return HubUpdateError(f"interface {name} does not exist; bring it up with {bring_up(name)}")


def _told(end: Callable[[], object]) -> bool:
    try:
        end()
    except HubUpdateError as exc:
        return _not_told(exc)
    return True


def _not_told(exc: HubUpdateError) -> bool:
    log.warning("change_failed", extra={"reason": str(exc), "next": "syncconf"})
    return False
