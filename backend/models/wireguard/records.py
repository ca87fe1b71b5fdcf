"""What the records say of a hub beside the changes of its peers."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from backend.models.access.audit import AuditEvent
from backend.models.wireguard.peer import Peer


@dataclass(frozen=True, slots=True)
class RecordedState:
    """The desired state: the peers in the order in which they were added, and the hub's generations.

    Peers whose removal is committed are left out. `observed_generation` is the last generation that the hub
    is known to have reached.
    """

    peers: Sequence[Peer]
    generation: int
    observed_generation: int


class Decision(StrEnum):
    """What an operator has decided about peers that the hub has and the records don't."""

    # Take them into the records.
    ADOPT = "adopt"
    # Take them off the hub.
    FORCE = "force"


@dataclass(frozen=True, slots=True)
class HubStatus:
    """An operator's decision that is still to be carried out, the notices, and the end of the audit log."""

    decision: Decision | None
    # The fingerprint of the unknown peers that the decision is about; None where it is about any.
    basis: str | None
    notices: tuple[str, ...]
    # Sequence and hash of the last row.
    audit_head: tuple[int, str]


@dataclass(frozen=True, slots=True)
class NewGeneration:
    """A generation that comes from the hub and not from a request: peers that are adopted, and why.

    `removed` are the (key, label) of peers that the hub is to lose.
    """

    generation: int
    peers: Sequence[Peer]
    removed: Sequence[tuple[str, str]]
    event: AuditEvent
    # What `/readyz` says until an operator has acknowledged it.
    notice: str | None = None
