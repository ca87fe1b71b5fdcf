"""The domain's errors, each with its word for the audit log. Their HTTP statuses are in api/errors.py.

    ProvisioningError
    ├── InvalidCredentialsError     the request can never succeed as it stands
    ├── DuplicatePeerError          the node is already known
    │   └── KeyTakenError           the WireGuard key is already known
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
    ├── InUseError                  another process holds the config, the interface or the database
    └── BackupError                 a backup can't be made, read or restored

Every error survives ``pickle``, which makes it again from its positional arguments: give it no others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar


class ProvisioningError(Exception):
    """The request could not be carried out.

    `audit_reason` is its word in the audit log, `message` its sentence for the caller, with places for its
    arguments.
    """

    audit_reason: str = "failed"
    message: ClassVar[str] = "{}"

    def __str__(self) -> str:
        return self.message.format(*self.args or ("the request could not be carried out",))


@dataclass(eq=False, repr=False)
class InvalidCredentialsError(ProvisioningError):
    """A field of the request is well-formed but can't be accepted from any caller."""

    audit_reason = "invalid"
    message = "{1}"

    field: str
    reason: str


@dataclass(eq=False, repr=False)
class DuplicatePeerError(ProvisioningError):
    """The node is already provisioned.

    existing_config has what this caller may know of the existing peer: everything, its name and address, or
    nothing.
    """

    audit_reason = "duplicate"
    message = "Peer {} is already provisioned"

    peer_id: str
    existing_config: Mapping[str, object] = field(default_factory=dict)


class KeyTakenError(DuplicatePeerError):
    """A peer holds the WireGuard key already; the caller learns nothing of that peer."""

    message = "The WireGuard public key sent for {} is already provisioned"


@dataclass(eq=False, repr=False)
class PeerNotFoundError(ProvisioningError):
    """No peer of that name is provisioned."""

    audit_reason = "not_found"
    message = "Peer {} not found"

    node_id: str


@dataclass(eq=False, repr=False)
class InterfaceNotFoundError(ProvisioningError):
    """The request names another interface than the hub's, which is `interface`."""

    audit_reason = "not_found"
    message = "This hub has no such interface; its interface is {}"

    interface: str


@dataclass(eq=False, repr=False)
class IPPoolExhaustedError(ProvisioningError):
    """No free address is left."""

    audit_reason = "pool_exhausted"
    message = "IP pool exhausted: {1} addresses allocated from range {0}"

    pool_range: str
    allocated_count: int


class PeerLimitError(IPPoolExhaustedError):
    """The interface has as many peers as its implementation takes: `allocated_count` on `pool_range`."""

    message = "Interface {} takes no more than {} peers and has them all; delete some first"


class AddressTakenError(ProvisioningError):
    """A peer that this service doesn't manage holds the address."""

    audit_reason = "address_taken"
    message = "Address {} was taken by another peer in the meantime; try again"


class HubUpdateError(ProvisioningError):
    """wg0.conf or the interface could not be brought up to date; nothing was changed."""

    audit_reason = "hub"


@dataclass(eq=False, repr=False)
class ConfigFileError(HubUpdateError):
    """wg0.conf can't be used as it is."""

    message = "{}: {}. {}"

    path: str
    problem: str
    remedy: str


class PausedError(HubUpdateError):
    """The records don't fit the hub: nothing is changed until an operator decides.

    Its arguments: the reason, how many peers of the hub are in no record, how many it has, and the command
    that the operator types.
    """

    message = (
        "the service is paused and changes nothing: {}; {} of {} peers on the hub are in no record. {} lists "
        "them; with `--adopt` in place of `--show` it takes them into the records, with `--force` off the hub"
    )


class RecordsUnavailableError(ProvisioningError):
    """The records could not be read or written; nothing was changed."""

    audit_reason = "records"


class OvertakenError(RecordsUnavailableError):
    """The records' generation isn't this process's: another process writes them, or a copy replaced them."""

    message = (
        "Another process has written to the records, or an older copy has taken their place; stop what "
        "else uses them, and restart this service, which then compares them with the hub"
    )


class OutcomeUnknownError(RecordsUnavailableError):
    """It isn't known whether the change happened until the records answer again; ask again."""


class AccessError(ProvisioningError):
    """The caller isn't authenticated, or isn't authorized for that."""


@dataclass(eq=False, repr=False)
class UnauthenticatedError(AccessError):
    """The caller has shown no valid credential. The reason goes to the audit log and not to the caller."""

    message = (
        "send a valid credential, Authorization: Bearer ocw_..., or ask the hub's operator for one; on "
        "the hub's own host there is one in the file admin.header of STATE_DIRECTORY: curl -H @FILE"
    )

    audit_reason: str
    credential_id: str | None = None


class ForbiddenError(AccessError):
    """The credential is valid, but not for this: that takes a key with the role in its argument."""

    audit_reason = "forbidden"
    message = "this credential is not for that: it takes an operator's key with the role {}"


class AuthenticationOffError(ForbiddenError):
    """The hub asks for no credentials (WIREGUARD_AUTH=off), so it hands out none."""

    audit_reason = "authentication_off"
    message = (
        "this hub asks for no credentials (WIREGUARD_AUTH=off), so none are made, listed or revoked over "
        "HTTP; use `python -m backend key` and `python -m backend token` on its host"
    )


@dataclass(eq=False, repr=False)
class RateLimitedError(AccessError):
    """The caller comes too often. `credential_id` is set where it tried a secret of a real credential."""

    audit_reason = "rate"
    message = "too many requests; come back in {} seconds"

    retry_after: int
    credential_id: str | None = None


class CredentialNotFoundError(AccessError):
    """No credential of that id exists."""

    audit_reason = "not_found"
    message = "{} not found"


class IdempotencyKeyError(ProvisioningError):
    """The Idempotency-Key can't be used for this request."""

    audit_reason = "idempotency_key"


class NoProofAskedError(ProvisioningError):
    """A challenge was asked for, and this hub asks for no proof of identity."""

    audit_reason = "status_404"
    message = "this hub asks for no proof: provision without one"


class StartRefusedError(Exception):
    """The service must not start. The message is one sentence that says what to do."""


class InUseError(StartRefusedError):
    """Another process holds the config, the interface or the database."""


class NewerSchemaError(StartRefusedError):
    """A newer version of the service has made the database."""


class BackupError(StartRefusedError):
    """A backup can't be made, read or restored; nothing was changed."""


class ProofError(ProvisioningError):
    """The sender hasn't proved its identity or its WireGuard key."""


class ProofMissingError(ProofError):
    """A header of the proof isn't there."""

    audit_reason = "missing"
    message = "{} is missing: this hub asks for proof of the node's identity and WireGuard key"


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
