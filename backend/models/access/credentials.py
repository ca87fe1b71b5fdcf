"""Enrolment tokens and operators' keys: how they are stored, and their shapes over HTTP."""

import hmac
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, Any, ClassVar, Final, NoReturn, Self

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    StringConstraints,
)

from backend.models.fields import (
    SECRET_TEXT,
    FrozenModel,
    StrictModel,
    is_mapped,
    printable,
    require_no_secret,
    unmapped,
)
from backend.models.wireguard.provisioning import UtcSecond

_HOUR: Final = 3600
_YEAR: Final = 365 * 24 * _HOUR

Network = IPv4Network | IPv6Network


class Role(StrEnum):
    """The role of an operator's key. Each role covers the ones before it."""

    READ = "read"
    OPERATE = "operate"
    ADMIN = "admin"

    def covers(self, other: "Role") -> bool:
        """Say whether this role may do everything that the other one may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


class Permission(StrEnum):
    """What an endpoint requires of its caller."""

    PROVISION = "provision"
    READ = "read"
    OPERATE = "operate"
    ADMINISTER = "administer"

    @property
    def role(self) -> Role:
        """The least role that has it."""
        return _LEAST_ROLE[self]


_LEAST_ROLE: Final = {
    Permission.PROVISION: Role.OPERATE,
    Permission.READ: Role.READ,
    Permission.OPERATE: Role.OPERATE,
    Permission.ADMINISTER: Role.ADMIN,
}


class CredentialKind(StrEnum):
    """A token enrols nodes; a key is an operator's."""

    TOKEN = "token"  # noqa: S105 - a kind, no secret
    KEY = "key"


class CredentialState(StrEnum):
    """Whether a credential is still valid. Where several apply: revoked before expired before used up."""

    ACTIVE = "active"
    USED_UP = "used_up"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """The text `ocw_<id>_<secret>` that a caller shows. Only `reveal` returns it."""

    id: str
    _secret: str

    @classmethod
    def generate(cls) -> Self:
        """Make a new one, of 256 random bits."""
        return cls(secrets.token_hex(8), secrets.token_hex(32))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what a caller sent; raise a ValueError that doesn't repeat it."""
        found = SECRET_TEXT.fullmatch(text)
        if found is None:
            raise ValueError("a credential is ocw_, 16 hexadecimal digits, _, and 64 more, in lower case")
        return cls(found[1], found[2])

    @property
    def digest(self) -> str:
        """What is stored: the SHA-256 of the secret's 64 characters, in hexadecimal.

        A slow hash is for passwords that people choose; 2^256 secrets can't be tried.
        """
        return sha256(self._secret.encode("ascii")).hexdigest()

    def reveal(self) -> str:
        """Return the whole text, for the one answer that shows it."""
        return f"ocw_{self.id}_{self._secret}"

    def __repr__(self) -> str:
        return f"Secret(ocw_{self.id}_***)"

    def __reduce__(self) -> NoReturn:
        # What is pickled may end in a file or a database, where no secret may come.
        raise TypeError("a secret is not pickled")


@dataclass(frozen=True, slots=True)
class Credential:
    """One credential as it is stored. A token has `max_uses` and no role, a key the other way round."""

    id: str
    kind: CredentialKind
    secret_hash: str = field(repr=False)
    note: str
    created_at: datetime
    # An audit name: `key:<id>`, `cli:<os user>`, `local`.
    created_by: str
    # None: never.
    expires_at: datetime | None = None
    role: Role | None = None
    max_uses: int | None = None
    uses: int = 0
    node_id_pattern: str | None = None
    source_cidr: Network | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None

    def matches(self, secret: Secret) -> bool:
        """Say whether this is the credential that the secret is of, in constant time."""
        return hmac.compare_digest(self.id + self.secret_hash, secret.id + secret.digest)

    def may(self, permission: Permission) -> bool:
        """Say whether it gives the permission."""
        if self.role is None:
            return permission is Permission.PROVISION
        return self.role.covers(permission.role)

    def refusal(self, now: datetime, source: str | None) -> str | None:
        """Return why it doesn't authenticate a caller from this source, as a word for the audit log, or None.

        `source` is an IP address, or None for a UNIX socket, which is in no network. Whether a token has a
        use left is for TokenUses to say, and in the end for the records.
        """
        ended = self.ended(now)
        if ended is None and self.source_cidr is not None and not _within(source, self.source_cidr):
            return "source"
        return ended

    def ended(self, now: datetime) -> str | None:
        """Return `revoked` or `expired`, or None while neither applies."""
        if self.revoked_at is not None:
            return CredentialState.REVOKED.value
        if self.expires_at is not None and self.expires_at <= now:
            return CredentialState.EXPIRED.value
        return None

    def is_for(self, node_id: str) -> bool:
        """Say whether it may enrol a node of this name."""
        return self.node_id_pattern is None or fnmatchcase(node_id, self.node_id_pattern)

    def state(self, now: datetime) -> CredentialState:
        """Return its state, by the uses that its row has."""
        if ended := self.ended(now):
            return CredentialState(ended)
        used_up = self.max_uses is not None and self.uses >= self.max_uses
        return CredentialState.USED_UP if used_up else CredentialState.ACTIVE


@lru_cache(maxsize=4096)
def _within(source: str | None, network: Network) -> bool:
    try:
        address = ip_address(source or "")
    except ValueError:
        return False
    return unmapped(address) in network


def _network(value: Any) -> Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if not isinstance(value, str) or "%" in value:
        raise ValueError("a network is written like 192.0.2.0/24 or 2001:db8::/32, without a zone")
    try:
        network = ip_network(value)
    except ValueError:
        # Its own message repeats what was sent.
        raise ValueError(
            "not a network; write one like 192.0.2.0/24 or 2001:db8::/32, without host bits"
        ) from None
    if is_mapped(network):
        raise ValueError("IPv4 callers count as IPv4; write the network as such, like 192.0.2.0/24")
    return network


Note = Annotated[
    str,
    StringConstraints(max_length=256),
    AfterValidator(printable),
    Field(description="What the operator wants to remember."),
]
NodeIdPattern = Annotated[
    str,
    # No brackets: fnmatch would read a set of characters.
    StringConstraints(max_length=128, pattern=r"^[A-Za-z0-9_*?-]{1,128}$"),
    AfterValidator(require_no_secret),
    Field(
        description="Only nodes of such a name are let in: `*` is any run of characters, `?` any one.",
        examples=["swarm-node-*"],
    ),
]
SourceNetwork = Annotated[
    Network,
    PlainValidator(_network, json_schema_input_type=str),
    Field(description="Only callers from this network are let in.", examples=["192.0.2.0/24"]),
]


class _Request(StrictModel):
    """The request for a new credential: its fields, and how long it is valid."""

    kind: ClassVar[CredentialKind]
    expires_in: int | None

    def make(self, created_by: str, now: datetime) -> tuple[Credential, Secret]:
        """Make the credential; its secret is kept nowhere else."""
        secret = Secret.generate()
        asked = {name: value for name, value in self if name != "expires_in"}
        credential = Credential(
            id=secret.id,
            kind=self.kind,
            secret_hash=secret.digest,
            created_at=now,
            created_by=created_by,
            expires_at=None if self.expires_in is None else now + timedelta(seconds=self.expires_in),
            **asked,
        )
        return credential, secret


class TokenRequest(_Request):
    """The request for a new enrolment token."""

    kind = CredentialKind.TOKEN
    max_uses: int = Field(default=1, ge=1, le=1_000_000, description="How many nodes it lets in.")
    expires_in: int = Field(default=_HOUR, ge=1, le=_YEAR, description="Seconds from now.")
    node_id_pattern: NodeIdPattern | None = None
    source_cidr: SourceNetwork | None = None
    note: Note = ""


class KeyRequest(_Request):
    """The request for a new operator's key."""

    kind = CredentialKind.KEY
    # A role comes as its text, which a strict model takes from JSON alone.
    role: Annotated[Role, Field(strict=False)]
    expires_in: int | None = Field(
        default=None, ge=1, le=10 * _YEAR, description="Seconds from now; null for never."
    )
    note: Note = ""


class _Info(FrozenModel):
    """The fields that are shown of both kinds."""

    id: str = Field(examples=["3f1c0e5a9b7d2468"])
    note: str
    created_at: UtcSecond = Field(description="RFC 3339, UTC.")
    created_by: str = Field(examples=["cli:root"])
    expires_at: UtcSecond | None
    revoked_at: UtcSecond | None
    last_used_at: UtcSecond | None
    state: CredentialState

    @classmethod
    def of(cls, credential: Credential, now: datetime, **secret: str) -> Self:
        """Show all of a credential but its hash, and the secret where the model has it."""
        stored = [name for name in cls.model_fields if name in Credential.__dataclass_fields__]
        shown = {name: getattr(credential, name) for name in stored}
        return cls(**shown, state=credential.state(now), **secret)


class TokenInfo(_Info):
    """An enrolment token, without its secret."""

    max_uses: int
    uses: int
    node_id_pattern: str | None
    source_cidr: Network | None


class KeyInfo(_Info):
    """An operator's key, without its secret."""

    role: Role


class MadeToken(TokenInfo):
    """A token that was just made, with its secret, which is never shown again."""

    secret: str = Field(repr=False, description="Shown this once: ocw_<id>_<secret>.")


class MadeKey(KeyInfo):
    """A key that was just made, with its secret, which is never shown again."""

    secret: str = Field(repr=False, description="Shown this once: ocw_<id>_<secret>.")
