"""Whatever fails in whichever order: memory, records, file and interface are equal in the end."""

import logging
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st

from backend.errors import ProvisioningError
from backend.models.wireguard.peer import Change, ChangeUnderWayError, Peer, PeerState
from tests.harness.core import NEVER, Ends, World, request
from tests.harness.fakes import FakeHub, FlakyRecords
from tests.harness.requests import new_key
from tests.harness.three_places import in_file
from tests.harness.torture import tried

NODES: Final = [f"node-{number}" for number in range(4)]
KEYS: Final = [new_key() for _ in range(4)]
MOMENTS: Final = ("check", "load", "commit", "committed", "compensate", "note_observed")

Step = tuple[Any, ...]


class Story:
    """A service to which a sequence of steps happens."""

    def __init__(self, directory: Path) -> None:
        self.hub = FakeHub()
        self.records = FlakyRecords(is_durable=True)
        self.world = World(directory, self.records, self.hub, look_every=NEVER)
        self.ends = Ends()
        self.changes: list[Change] = []

    def happen(self, step: Step) -> None:
        """Let a step happen, and not wait for its end."""
        name, *arguments = step
        getattr(self, name)(*arguments)

    def provision(self, node: int, key: int) -> None:
        self._begin(lambda: self.world.service.provision(request(NODES[node], KEYS[key])))

    def deprovision(self, node: int) -> None:
        self._begin(lambda: self.world.service.deprovision(NODES[node]))

    def hub_fails(self, times: int) -> None:
        self.hub.failures = times

    def hub_is_broken(self, is_broken: bool) -> None:
        self.hub.broken = "out of order" if is_broken else None

    def hub_changes_but_fails(self, does: bool) -> None:
        self.hub.takes_it_but_fails = does

    def interface_exists(self, does: bool) -> None:
        if not does:
            self.hub.vanish()
        elif self.hub.ifindex() is None:
            self.hub.come_back()

    def records_fail_at(self, moments: frozenset[str]) -> None:
        self.records.failing_at = set(moments)

    def look(self) -> None:
        self.world.look()

    def end(self) -> None:
        """Mend everything, and wait until the agent has caught up."""
        self.hub_fails(0)
        self.hub_is_broken(False)
        self.hub_changes_but_fails(False)
        self.interface_exists(True)
        self.records_fail_at(frozenset())
        for _ in range(2):
            self.world.look()

    def _begin(self, decide: Callable[[], Change]) -> None:
        try:
            change = decide()
        except (ProvisioningError, ChangeUnderWayError):
            return
        self.changes.append(change)
        self.ends.count(change)

    def check(self) -> None:
        """Check that all four are equal, and are what the changes were answered."""
        world = self.world
        recorded = places(self.records.load().peers)
        assert places(world.directory.list()) == recorded
        assert in_file(world.path) == recorded
        assert self.hub.table == {key: {f"{address}/32"} for key, address in recorded.values()}
        assert world.pool.get_pool_stats()["allocated_addresses"] == len(recorded)
        assert self.records.states() == dict.fromkeys(recorded, PeerState.ACTIVE)
        assert self.ends.all_once()
        present = set()
        for change in self.changes:
            if change.applied.exception(0) is not None:
                continue
            if change.removes:
                present.discard(change.peer.node_id)
            else:
                present.add(change.peer.node_id)
        assert present == set(recorded)


def places(peers: Iterable[Peer]) -> dict[str, tuple[str, str]]:
    """Return key and address by node_id."""
    return {peer.node_id: (str(peer.wireguard_public_key), str(peer.address)) for peer in peers}


numbers: Final = st.integers(0, 3)
provisions: Final = st.tuples(st.just("provision"), numbers, numbers)
steps: Final = st.lists(
    st.one_of(
        provisions,
        provisions,
        st.tuples(st.just("deprovision"), numbers),
        st.tuples(st.just("hub_fails"), st.integers(0, 5)),
        st.tuples(st.just("hub_is_broken"), st.booleans()),
        st.tuples(st.just("hub_changes_but_fails"), st.booleans()),
        st.tuples(st.just("interface_exists"), st.booleans()),
        st.tuples(st.just("records_fail_at"), st.frozensets(st.sampled_from(MOMENTS), max_size=2)),
        st.tuples(st.just("records_fail_at"), st.just(frozenset[str]())),
        st.tuples(st.just("look")),
    ),
    max_size=30,
)


@tried(25)
@given(steps=steps)
def test_memory_records_file_and_interface_are_equal_in_the_end(steps: list[Step]) -> None:
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as directory:
            story = Story(Path(directory))
            story.world.start()
            try:
                for step in steps:
                    story.happen(step)
                story.end()
                story.check()
            finally:
                story.world.stop()
                story.records.database.close()
    finally:
        logging.disable(logging.NOTSET)
