"""The domain's errors, each with its word for the audit log. Their HTTP statuses are in api/errors.py.

    ProvisioningError
    ├── InvalidCredentialsError     the request can never succeed as it stands
    ├── DuplicatePeerError          the node is already known
    │   └── KeyTakenError           the WireGuard key is
    ├── PeerNotFoundError           no peer of that name
    ├── IPPoolExhaustedError        no address is left
    │   └── PeerLimitError          the interface takes no more peers, however many addresses there are
    ├── AddressTakenError           an operator's peer took the address meanwhile
    ├── HubUpdateError              wg0.conf or the interface could not be brought up to date
    │   ├── ConfigFileError         wg0.conf itself is unusable, and only an operator can mend it
    │   └── PausedError             the records don't fit the hub, and an operator has to decide
    ├── RecordsUnavailableError     the records could not be read or written
    │   ├── OvertakenError          another process writes them; this one must not any more
    │   └── OutcomeUnknownError     it isn't known yet whether the change happened
    ├── AccessError                 the caller isn't authenticated or authorized
    │   ├── UnauthenticatedError    no valid credential
    │   ├── ForbiddenError          the credential isn't for that
    │   ├── RateLimitedError        too often
    │   └── CredentialNotFoundError no credential of that id
    ├── NoProofAskedError           a challenge was asked for, and this hub asks for no proof
    ├── IdempotencyKeyError         the Idempotency-Key can't be used for this
    └── ProofError                  the sender hasn't proved its identity or its WireGuard key
        ├── ProofMissingError       it didn't try
        ├── ClockError              it signed at another time than now
        ├── SignatureError          the signature isn't that of the identity's key for this request
        ├── NonceError              it signed with a nonce that was used before
        └── ChallengeError          the WireGuard key's challenge isn't answered

    StartRefusedError               the process must not start; the message says what to do
    └── InUseError                  because another process has what it needs for itself

Every error survives ``pickle``: its arguments are positional and are the ones of its ``__init__``.
"""

from collections.abc import Mapping
from typing import ClassVar


class ProvisioningError(Exception):
    """The request could not be carried out.

    `audit_reason` is its word in the audit log, `message` the sentence of one without arguments.
    """

    audit_reason: str = "failed"
    message: ClassVar[str] = "the request could not be carried out"

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else self.message


class InvalidCredentialsError(ProvisioningError):
    """A field of the request is well-formed but can't be accepted from any caller."""

    audit_reason = "invalid"

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class DuplicatePeerError(ProvisioningError):
    """The node is already provisioned.

    existing_config is what this caller may know of the peer in its way: everything, its name and
    address, or nothing.
    """

    audit_reason = "duplicate"

    def __init__(self, peer_id: str, existing_config: Mapping[str, object]) -> None:
        super().__init__(peer_id, existing_config)
        self.peer_id = peer_id
        self.existing_config = existing_config

    def __str__(self) -> str:
        return f"Peer {self.peer_id} is already provisioned"


class KeyTakenError(DuplicatePeerError):
    """A peer holds the WireGuard key already; the caller learns nothing of that peer."""

    def __init__(self, peer_id: str) -> None:
        super().__init__(peer_id, {})
        # What a pickle makes it from.
        self.args = (peer_id,)

    def __str__(self) -> str:
        return f"The WireGuard public key sent for {self.peer_id} is already provisioned"


class PeerNotFoundError(ProvisioningError):
    """No peer of that name is provisioned."""

    audit_reason = "not_found"

    def __init__(self, node_id: str) -> None:
        super().__init__(node_id)
        self.node_id = node_id

    def __str__(self) -> str:
        return f"Peer {self.node_id} not found"


class IPPoolExhaustedError(ProvisioningError):
    """No free address is left."""

    audit_reason = "pool_exhausted"

    def __init__(self, pool_range: str, allocated_count: int) -> None:
        super().__init__(pool_range, allocated_count)
        self.pool_range = pool_range
        self.allocated_count = allocated_count

    def __str__(self) -> str:
        return f"IP pool exhausted: {self.allocated_count} addresses allocated from range {self.pool_range}"


class PeerLimitError(IPPoolExhaustedError):
    """The interface has as many peers as whatever implements it can take."""

    def __init__(self, interface: str, limit: int) -> None:
        super().__init__(interface, limit)

    def __str__(self) -> str:
        interface, limit = self.args
        return f"Interface {interface} takes no more than {limit} peers and has them all; delete some first"


class AddressTakenError(ProvisioningError):
    """A peer that this service doesn't manage holds the address."""

    audit_reason = "address_taken"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"Address {self.address} was taken by another peer in the meantime; try again"


class HubUpdateError(ProvisioningError):
    """wg0.conf or the interface could not be brought up to date; nothing was changed."""

    audit_reason = "hub"


class ConfigFileError(HubUpdateError):
    """wg0.conf can't be used as it is."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path = path
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}. {self.remedy}"


class PausedError(HubUpdateError):
    """The records don't fit the hub: nothing is changed until an operator decides.

    `unknown` of the hub's `present` peers are in no record. `command` is what the operator types.
    """

    def __init__(self, reason: str, unknown: int, present: int, command: str) -> None:
        super().__init__(reason, unknown, present, command)
        self.reason = reason
        self.unknown = unknown
        self.present = present
        self.command = command

    def __str__(self) -> str:
        return (
            f"the service is paused and changes nothing: {self.reason}; {self.unknown} of {self.present} "
            f"peers on the hub are in no record. {self.command} lists them; with `--adopt` in place of "
            "`--show` it takes them into the records, with `--force` off the hub"
        )


class RecordsUnavailableError(ProvisioningError):
    """The records could not be read or written; nothing was changed."""

    audit_reason = "records"


class OvertakenError(RecordsUnavailableError):
    """The records aren't as this process left them: an older copy, or another process writes them too."""

    message = (
        "Another process has written to the records, or an older copy has taken their place; stop what "
        "else uses them, and restart this service, which then compares them with the hub"
    )


class OutcomeUnknownError(RecordsUnavailableError):
    """Whether the change happened can't be said before the records answer again; ask again."""


class AccessError(ProvisioningError):
    """The caller isn't authenticated, or isn't authorized for that."""


class UnauthenticatedError(AccessError):
    """The caller has shown no valid credential; the audit log alone is told why it isn't."""

    def __init__(self, audit_reason: str, credential_id: str | None = None) -> None:
        super().__init__(audit_reason, credential_id)
        self.audit_reason = audit_reason
        self.credential_id = credential_id

    def __str__(self) -> str:
        return (
            "send a valid credential, Authorization: Bearer ocw_..., or ask the hub's operator for one; on "
            "the hub's own host there is one in the file admin.header of STATE_DIRECTORY: curl -H @FILE"
        )


class ForbiddenError(AccessError):
    """The credential is valid, but not for this."""

    audit_reason = "forbidden"

    def __init__(self, role: str) -> None:
        super().__init__(role)
        self.role = role

    def __str__(self) -> str:
        return f"this credential is not for that: it takes an operator's key with the role {self.role}"


class AuthenticationOffError(ForbiddenError):
    """The hub asks for no credentials (WIREGUARD_AUTH=off), so it hands out none."""

    audit_reason = "authentication_off"

    def __str__(self) -> str:
        return (
            "this hub asks for no credentials (WIREGUARD_AUTH=off), so none are made, listed or revoked over "
            "HTTP; use `python -m backend key` and `python -m backend token` on its host"
        )


class RateLimitedError(AccessError):
    """The caller comes too often. `credential_id` is set where it tried a secret of a real credential."""

    audit_reason = "rate"

    def __init__(self, retry_after: int, credential_id: str | None = None) -> None:
        super().__init__(retry_after, credential_id)
        self.retry_after = retry_after
        self.credential_id = credential_id

    def __str__(self) -> str:
        return f"too many requests; come back in {self.retry_after} seconds"


class CredentialNotFoundError(AccessError):
    """No credential of that id exists."""

    audit_reason = "not_found"

    def __init__(self, credential_id: str) -> None:
        super().__init__(credential_id)
        self.credential_id = credential_id

    def __str__(self) -> str:
        return f"{self.credential_id} not found"


class IdempotencyKeyError(ProvisioningError):
    """The Idempotency-Key can't be used for this request."""

    audit_reason = "idempotency_key"


class NoProofAskedError(ProvisioningError):
    """A challenge was asked for, and this hub asks for no proof of identity."""

    audit_reason = "status_404"


class StartRefusedError(Exception):
    """The service must not start. The message is one sentence that says what to do."""


class InUseError(StartRefusedError):
    """Another process holds what this one needs for itself."""


class ProofError(ProvisioningError):
    """The sender hasn't proved its identity or its WireGuard key."""


class ProofMissingError(ProofError):
    """A header of the proof isn't there."""

    audit_reason = "missing"

    def __init__(self, header: str) -> None:
        super().__init__(header)
        self.header = header

    def __str__(self) -> str:
        return f"{self.header} is missing: this hub asks for proof of the node's identity and WireGuard key"


class ClockError(ProofError):
    """The signature was made at another time than now, or names no time."""

    audit_reason = "clock"
    message = "X-Node-Timestamp must be Unix seconds: sign again with a clock within 60 s of the hub's."


class SignatureError(ProofError):
    """The signature isn't that of the identity's key for this request."""

    audit_reason = "signature"
    message = (
        "X-Node-Signature isn't public_key's for this request: sign what is sent, send 64 bytes in base64."
    )


class NonceError(ProofError):
    """The nonce was used before, or isn't one."""

    audit_reason = "nonce"
    message = (
        "X-Node-Nonce must be new, of 16 to 64 letters, digits, dashes and underscores: sign with another."
    )


class ChallengeError(ProofError):
    """The WireGuard key's challenge isn't answered, or there is none."""

    audit_reason = "challenge"
    message = (
        "X-WireGuard-Proof doesn't answer the challenge, which is good for one try in 60 s: ask for another."
    )
