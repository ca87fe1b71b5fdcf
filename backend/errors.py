"""The domain's errors. No HTTP in it: api/errors.py says which status each one gets.

    ProvisioningError
    ├── InvalidCredentialsError     the request can never succeed as it stands
    ├── DuplicatePeerError          the node is already known
    │   └── KeyTakenError           the WireGuard key is
    ├── PeerNotFoundError           nobody of that name
    ├── IPPoolExhaustedError        no address is left
    │   └── PeerLimitError          the interface takes no more peers, however many addresses there are
    ├── AddressTakenError           an operator's peer took the address meanwhile
    ├── HubUpdateError              wg0.conf or the interface could not be brought up to date
    │   ├── ConfigFileError         wg0.conf itself is unusable, and only an operator can mend it
    │   └── PausedError             the records don't fit the hub, and an operator has to decide
    ├── RecordsUnavailableError     the records could not be read or written
    │   ├── OvertakenError          another process writes them; this one must not any more
    │   └── OutcomeUnknownError     nobody can say yet whether the change happened
    ├── AccessError                 the caller isn't let in, or not to do that
    │   ├── UnauthenticatedError    no credential that lets anybody in
    │   ├── ForbiddenError          the credential isn't for that
    │   ├── RateLimitedError        too often
    │   └── CredentialNotFoundError no credential of that id
    ├── IdempotencyKeyError         the Idempotency-Key can't be used for this
    └── ProofError                  the sender hasn't proved to be who it says
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
    """The request could not be carried out."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else (type(self).__doc__ or "")


class InvalidCredentialsError(ProvisioningError):
    """A field of the request is well-formed but can't be accepted from anybody."""

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

    def __init__(self, node_id: str) -> None:
        super().__init__(node_id)
        self.node_id = node_id

    def __str__(self) -> str:
        return f"Peer {self.node_id} not found"


class IPPoolExhaustedError(ProvisioningError):
    """No free address is left."""

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

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"Address {self.address} was taken by another peer in the meantime; try again"


class HubUpdateError(ProvisioningError):
    """wg0.conf or the interface could not be brought up to date; nothing was changed."""


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


class OvertakenError(RecordsUnavailableError):
    """The records aren't as this process left them: stop whatever else writes them, and restart this.

    Another process has written to them, or an older copy has taken their place.
    """

    def __str__(self) -> str:
        return (
            "Another process has written to the records, or an older copy has taken their place; stop what "
            "else uses them, and restart this service, which then compares them with the hub"
        )


class OutcomeUnknownError(RecordsUnavailableError):
    """Whether the change happened can't be said before the records answer again; ask again."""


class AccessError(ProvisioningError):
    """The caller isn't let in, or not to do that; `reason` is one word for the audit log."""

    reason = "access"


class UnauthenticatedError(AccessError):
    """The caller has shown no credential that lets it in; `reason` is for the audit log alone."""

    def __init__(self, reason: str, credential_id: str | None = None) -> None:
        super().__init__(reason, credential_id)
        self.reason = reason
        self.credential_id = credential_id

    def __str__(self) -> str:
        return (
            "send a valid credential, Authorization: Bearer ocw_..., or ask the hub's operator for one; on "
            "the hub's own host there is one in the file admin.header of STATE_DIRECTORY: curl -H @FILE"
        )


class ForbiddenError(AccessError):
    """The credential lets its holder in, but is not for this."""

    reason = "forbidden"

    def __init__(self, role: str) -> None:
        super().__init__(role)
        self.role = role

    def __str__(self) -> str:
        return f"this credential is not for that: it takes an operator's key with the role {self.role}"


class AuthenticationOffError(ForbiddenError):
    """The hub asks for no credentials (WIREGUARD_AUTH=off), so it hands out none."""

    reason = "authentication_off"

    def __str__(self) -> str:
        return (
            "this hub asks for no credentials (WIREGUARD_AUTH=off), so none are made, listed or revoked over "
            "HTTP; use `python -m backend key` and `python -m backend token` on its host"
        )


class RateLimitedError(AccessError):
    """The caller comes too often; `credential_id` is that of a real credential of which it tried a secret."""

    reason = "rate"

    def __init__(self, retry_after: int, credential_id: str | None = None) -> None:
        super().__init__(retry_after, credential_id)
        self.retry_after = retry_after
        self.credential_id = credential_id

    def __str__(self) -> str:
        return f"too many requests; come back in {self.retry_after} seconds"


class CredentialNotFoundError(AccessError):
    """No credential of that id exists."""

    reason = "not_found"

    def __init__(self, credential_id: str) -> None:
        super().__init__(credential_id)
        self.credential_id = credential_id

    def __str__(self) -> str:
        return f"{self.credential_id} not found"


class IdempotencyKeyError(ProvisioningError):
    """The Idempotency-Key can't be used for this request."""


class StartRefusedError(Exception):
    """The service must not start. The message is one sentence that says what to do."""


class InUseError(StartRefusedError):
    """Another process has it for itself."""


class ProofError(ProvisioningError):
    """The sender hasn't proved to be who it says; `reason` is one word for the audit log."""

    reason: ClassVar[str] = "proof"


class ProofMissingError(ProofError):
    """A header of the proof isn't there."""

    reason = "missing"

    def __init__(self, header: str) -> None:
        super().__init__(header)
        self.header = header

    def __str__(self) -> str:
        return f"{self.header} is missing: this hub asks for proof of the node's identity and WireGuard key"


class ClockError(ProofError):
    """X-Node-Timestamp must be Unix seconds: sign again with a clock within 60 s of the hub's."""

    reason = "clock"


class SignatureError(ProofError):
    """X-Node-Signature isn't public_key's for this request: sign what is sent, send 64 bytes in base64."""

    reason = "signature"


class NonceError(ProofError):
    """X-Node-Nonce must be new, of 16 to 64 letters, digits, dashes and underscores: sign with another."""

    reason = "nonce"


class ChallengeError(ProofError):
    """X-WireGuard-Proof doesn't answer the challenge, which is good for one try in 60 s: ask for another."""

    reason = "challenge"
